// What the kernels read off their arguments: where rows, region ids and biases lie, and which keys a query row sees.
#pragma once

#include "cpu/attention_args.h"

namespace ras::cpu::RAS_FAST_ISA {  // as everything that a kernel inlines (vec.h)

// Row `row` of a head of a [B, H, L, D] tensor.
template <class T>
const T* row_of(const void* tensor, const int64_t (&stride)[3], int64_t batch, int64_t head, int64_t row = 0) {
  return static_cast<const T*>(tensor) + batch * stride[0] + head * stride[1] + row * stride[2];
}

// The regions of a batch element's keys from `first` on; null: none.
inline const int32_t* ids_of(const AttentionArgs& args, int64_t batch, int64_t first = 0) {
  return args.region_ids ? args.region_ids + batch * args.region_stride + first : nullptr;
}

// A query head's biases [R]; null: none.
inline const float* bias_of(const AttentionArgs& args, int64_t batch, int64_t head) {
  return args.region_bias ? args.region_bias + batch * args.bias_batch_stride + head * args.bias_head_stride : nullptr;
}

// Keys [low, high]: as a rule those that a query row sees.
struct Span {
  int64_t low, high;

  Span(int64_t low, int64_t high) : low(low), high(high) {}
  // What row `index` of a batch element sees, clamped to the memory there is.
  Span(const AttentionArgs& args, int64_t batch, int64_t index) {
    const int64_t at = batch * args.bound_rows + (args.bound_rows > 1 ? index : 0);
    const int64_t end = args.kv_end && args.kv_end[at] < args.length_k ? args.kv_end[at] : args.length_k;
    low = args.kv_start && args.kv_start[at] > 0 ? args.kv_start[at] : 0;
    high = end - 1;
    const int64_t own = index + end - args.length_q;
    if (args.causal && own < high) high = own;
    if (args.window && own - args.window + 1 > low) low = own - args.window + 1;
  }

  bool empty() const { return low > high; }
};

}  // namespace ras::cpu::RAS_FAST_ISA
