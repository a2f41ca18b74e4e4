// CPU launchers of linear, linear_glu and gated_linear: they pack the rows once and share the outputs out over the threads.
#include "cpu/linear.h"

#include <cstring>

#include "common/linear.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

// Below this many multiplications one thread is faster than waking a second.
constexpr int64_t kWorkPerThread = 1 << 16;

int64_t padded(int64_t length) { return (length + kLinearPad - 1) / kLinearPad * kLinearPad; }

// `weight` applied to the rows at `source`; see LinearArgs for the rest.
void apply(LinearArgs args, const std::vector<const void*>& source, bool source_float, const Tensor& weight) {
  args.source_float = source_float;
  args.length = weight.size(1);
  args.padded = padded(args.length);
  args.weight = data_of<const void>(weight);
  args.weight_stride = weight.stride(0);
  args.outputs = weight.size(0);
  const int64_t count = int64_t(source.size());
  std::vector<float> rows(std::min(count, kLinearRows) * args.padded);
  args.rows = rows.data();
  auto* outputs = pick_linear_outputs();
  for (int64_t first = 0; first < count; first += kLinearRows) {
    args.count = std::min(count - first, kLinearRows);
    pick_linear_pack()({args.dtype, source_float, args.count, args.length, args.padded, &source[first], rows.data()});
    const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (args.length * args.count));
    share_out(args.outputs, grain, [&](int64_t begin, int64_t end) { outputs(args, begin, end); });
    if (args.partial) args.partial += args.count * args.outputs;
    if (args.base) args.base += args.count;
    if (args.factor) args.factor += args.count;
    args.out += args.count;
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

// Of all rows of x, in tensors that are guarded.
Tensor outputs_of(LinearArgs args, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = weight.size(0);
  const Tensor out = empty(sizes, raw_dtype(x));
  if (out.numel() == 0) return out;
  const int64_t size = x.element_size();
  const RowMap map = row_map(x);
  std::vector<const void*> source(out.numel() / weight.size(0)), base(source.size(), data_of<const void>(bias));
  std::vector<void*> target(source.size());
  for (size_t t = 0; t < source.size(); ++t) {
    source[t] = static_cast<const char*>(map.data) + map.offset(int64_t(t)) * size;
    target[t] = data_of<char>(out) + int64_t(t) * weight.size(0) * size;
  }
  args.dtype = dtype_of(x);
  args.base = bias ? base.data() : nullptr;
  args.out = target.data();
  apply(args, source, false, weight);
  return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  guard_linear(x, weight, bias, rows_contiguous);
  return outputs_of({}, x, weight, bias);
}

Tensor linear_glu(const Tensor& x, const Tensor& gate, const Tensor& up, std::string activation) {
  const Activation known = guard_glu(x, gate, up, activation, rows_contiguous);
  return outputs_of({.up = data_of<const void>(up), .up_stride = up.stride(0), .activation = known}, x, gate, {});
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
    apply(args, on.x, false, weight);
    return out;
  }
  const int64_t rank = right->size(0);
  std::vector<float> inner(on.x.size() * rank);
  std::vector<const void*> source(on.x.size());
  for (size_t r = 0; r < source.size(); ++r) source[r] = inner.data() + int64_t(r) * rank;
  args.partial = inner.data();
  apply(args, on.x, false, *right);
  args.partial = nullptr;
  apply(args, source, true, weight);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
}

}  // namespace ras::cpu
