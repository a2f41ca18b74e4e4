// CPU launcher of gated_linear: finds the rows that are on, widens them once, and shares the outputs out over the threads.
#include "cpu/gated_linear.h"

#include <cstring>

#include "cpu/row_map.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

// Below this many multiplications one thread is faster than waking a second.
constexpr int64_t kWorkPerThread = 1 << 16;

void guard(const Tensor& x, const Tensor& weight, const MaybeTensor& right, const Tensor& gate) {
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

int64_t padded(int64_t length) { return (length + kGatedPad - 1) / kGatedPad * kGatedPad; }

// The factor `weight` applied to the rows at `source`; see GatedArgs for the rest.
void apply(GatedArgs args, const std::vector<const void*>& source, bool source_float, const Tensor& weight) {
  args.length = weight.size(1);
  args.padded = padded(args.length);
  std::vector<float> rows(args.count * args.padded);
  pick_gated_widen()({args.dtype, source_float, args.count, args.length, args.padded, source.data(), rows.data()});
  args.rows = rows.data();
  args.weight = data_of<const void>(weight);
  args.weight_stride = weight.stride(0);
  args.outputs = weight.size(0);
  auto* outputs = pick_gated_outputs();
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (args.length * args.count));
  share_out(args.outputs, grain, [&](int64_t begin, int64_t end) { outputs(args, begin, end); });
}

}  // namespace

Tensor gated_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& right, const Tensor& gate) {
  guard(x, weight, right, gate);
  Tensor out = empty(sizes_of(x), raw_dtype(x));
  const Rows on = split(x, gate, out);
  if (on.x.empty()) return out;
  GatedArgs args{.dtype = dtype_of(x), .count = int64_t(on.x.size())};
  args.x = on.x.data();
  args.out = on.out.data();
  args.gates = on.gates.data();
  if (!right) {
    apply(args, on.x, false, weight);
    return out;
  }
  const int64_t rank = right->size(0);
  std::vector<float> inner(args.count * rank);
  std::vector<const void*> source(args.count);
  for (int64_t r = 0; r < args.count; ++r) source[r] = inner.data() + r * rank;
  args.partial = inner.data();
  apply(args, on.x, false, *right);
  args.partial = nullptr;
  apply(args, source, true, weight);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
}

}  // namespace ras::cpu
