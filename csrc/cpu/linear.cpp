// CPU launchers of linear, linears, linear_glu and gated_linear: they pack the rows once and share the outputs out over the
// threads.
#include "cpu/linear.h"

#include <cstring>

#include "common/linear.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

// Below this many multiplications one thread is faster than waking a second.
constexpr int64_t kWorkPerThread = 1 << 16;

int64_t padded(int64_t length) { return (length + kLinearPad - 1) / kLinearPad * kLinearPad; }

LinearArgs with_weight(LinearArgs args, const Tensor& weight) {
  args.length = weight.size(1);
  args.padded = padded(args.length);
  args.weight = data_of<const void>(weight);
  args.weight_stride = weight.stride(0);
  args.outputs = weight.size(0);
  return args;
}

void next_rows(LinearArgs& args) {
  if (args.partial) args.partial += args.count * args.outputs;
  if (args.base) args.base += args.count;
  if (args.factor) args.factor += args.count;
  args.out += args.count;
}

// Weights of one width applied to the rows at `source`; see LinearArgs for the rest.
void apply(std::vector<LinearArgs> parts, const std::vector<const void*>& source, bool source_float) {
  const int64_t count = int64_t(source.size()), length = parts[0].length;
  std::vector<float> rows(std::min(count, kLinearRows) * parts[0].padded);
  int64_t all = 0;
  for (const LinearArgs& part : parts) all += part.outputs;
  auto* outputs = pick_linear_outputs();
  for (int64_t first = 0; first < count; first += kLinearRows) {
    const int64_t these = std::min(count - first, kLinearRows);
    for (LinearArgs& part : parts) part.rows = rows.data(), part.count = these, part.source_float = source_float;
    pick_linear_pack()({parts[0].dtype, source_float, these, length, parts[0].padded, &source[first], rows.data()});
    const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (length * these));
    share_out(all, grain, [&](int64_t begin, int64_t end) {
      for (const LinearArgs& part : parts) {
        if (begin < part.outputs && end > 0) outputs(part, std::max<int64_t>(begin, 0), std::min(end, part.outputs));
        begin -= part.outputs;
        end -= part.outputs;
      }
    });
    for (LinearArgs& part : parts) next_rows(part);
  }
}

void guard_gated(const Tensor& x, const Tensor& weight, const MaybeTensor& right, const Tensor& gate) {
  STD_TORCH_CHECK(x.dim() > 0 && rows_contiguous(x) && x.size(x.dim() - 1) > 0,
                  "ras_fast gated_linear: x must be a CPU tensor [..., d] with a contiguous last dimension");
  const int64_t d = x.size(x.dim() - 1);
  const int64_t inner = right && right->dim() == 2 ? right->size(0) : d;
  STD_TORCH_CHECK(inner > 0 && is(weight, raw_dtype(x), {d, inner}) && rows_contiguous(weight) &&
                      (!right || (is(*right, raw_dtype(x), {inner, d}) && rows_contiguous(*right))),
                  "ras_fast gated_linear: weight must be [d, d], or [d, r] with right [r, d], in x's dtype");
  STD_TORCH_CHECK(is(gate, aoti_torch_dtype_float32(), {x.numel() / d}) && rows_contiguous(gate),
                  "ras_fast gated_linear: gate must be [T] float32");
}

struct Rows {
  std::vector<const void*> x;
  std::vector<void*> out;
  std::vector<float> gates;
};

// Copies the rows that are off; lists the others. NaN is not 0: it is on.
Rows split(const Tensor& x, const Tensor& gate, const Tensor& out) {
  const int64_t d = x.size(x.dim() - 1), size = x.element_size();
  const RowMap map = row_map(x);
  const float* gates = data_of<const float>(gate);
  Rows on;
  for (int64_t t = 0; t < x.numel() / d; ++t) {
    const char* from = static_cast<const char*>(map.data) + map.offset(t) * size;
    char* to = data_of<char>(out) + t * d * size;
    if (gates[t] == 0) {
      std::memcpy(to, from, d * size);
      continue;
    }
    on.x.push_back(from);
    on.out.push_back(to);
    on.gates.push_back(gates[t]);
  }
  return on;
}

// Where the rows of `out`, [..., N] and contiguous, start.
std::vector<void*> rows_of(const Tensor& out, int64_t count, int64_t row_bytes) {
  std::vector<void*> rows(count);
  for (int64_t t = 0; t < count; ++t) rows[t] = data_of<char>(out) + t * row_bytes;
  return rows;
}

// Of all rows of x, in tensors that are guarded. `args`: what else there is to say.
std::vector<Tensor> outputs_of(const LinearArgs& args, const Tensor& x, const std::vector<Tensor>& weights,
                               const std::vector<MaybeTensor>& biases) {
  const int64_t size = x.element_size(), count = x.numel() / x.size(x.dim() - 1);
  std::vector<Tensor> outs;
  std::vector<std::vector<const void*>> base(weights.size());
  std::vector<std::vector<void*>> target(weights.size());
  std::vector<LinearArgs> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = weights[i].size(0);
    outs.push_back(empty(sizes, raw_dtype(x)));
    target[i] = rows_of(outs[i], count, weights[i].size(0) * size);
    parts.push_back(with_weight(args, weights[i]));
    parts[i].dtype = dtype_of(x);
    parts[i].out = target[i].data();
    if (!biases[i]) continue;
    base[i].assign(count, data_of<const void>(biases[i]));
    parts[i].base = base[i].data();
  }
  const RowMap map = row_map(x);
  std::vector<const void*> source(count);
  for (int64_t t = 0; t < count; ++t) source[t] = static_cast<const char*>(map.data) + map.offset(t) * size;
  apply(parts, source, false);
  return outs;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  guard_linear(x, weight, bias, rows_contiguous);
  return outputs_of({}, x, {weight}, {bias})[0];
}

std::vector<Tensor> linears(const Tensor& x, std::vector<Tensor> weights, std::vector<MaybeTensor> biases) {
  guard_linears(x, weights, biases, rows_contiguous);
  return outputs_of({}, x, weights, biases);
}

Tensor linear_glu(const Tensor& x, const Tensor& gate, const Tensor& up, std::string activation) {
  const Activation known = guard_glu(x, gate, up, activation, rows_contiguous);
  return outputs_of({.up = data_of<const void>(up), .up_stride = up.stride(0), .activation = known}, x, {gate}, {{}})[0];
}

Tensor gated_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& right, const Tensor& gate) {
  guard_gated(x, weight, right, gate);
  Tensor out = empty(sizes_of(x), raw_dtype(x));
  const Rows on = split(x, gate, out);
  if (on.x.empty()) return out;
  LinearArgs args{.dtype = dtype_of(x)};
  args.base = on.x.data();
  args.out = on.out.data();
  args.factor = on.gates.data();
  if (!right) {
    apply({with_weight(args, weight)}, on.x, false);
    return out;
  }
  const int64_t rank = right->size(0);
  std::vector<float> inner(on.x.size() * rank);
  std::vector<const void*> source(on.x.size());
  for (size_t r = 0; r < source.size(); ++r) source[r] = inner.data() + int64_t(r) * rank;
  args.partial = inner.data();
  apply({with_weight(args, *right)}, on.x, false);
  args.partial = nullptr;
  apply({with_weight(args, weight)}, source, true);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
}

}  // namespace ras::cpu
