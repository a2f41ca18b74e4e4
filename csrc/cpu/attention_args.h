// What the launchers of all attention kernels hand to them.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ras::cpu {

struct AttentionArgs {
  DType dtype;  // of query, key, value and out
  int64_t batch, heads, kv_heads, length_q, length_k, dim;
  const void *query, *key;
  int64_t query_stride[3], key_stride[3];  // batch, head, row; elements
  float scale, softcap;                    // softcap 0: none
  bool causal;
  int64_t window;  // 0: none
  const int32_t *kv_start, *kv_end;  // [B, bound_rows]
  int64_t bound_rows;                // 1, or length_q where each row has bounds of its own
  const int32_t* region_ids;  // [B, Lk] or null
  int64_t region_stride, num_regions;
  const float* region_bias;  // [B or 1, Hq, R]; null: none
  int64_t bias_batch_stride, bias_head_stride;
};

// Of the kernels that compute attention and do not only recompute its probabilities.
struct ValueArgs : AttentionArgs {
  const void* value;
  int64_t value_stride[3];
  const float* sinks;  // [Hq] or null
};

}  // namespace ras::cpu
