// What the launcher (prefill.cpp) hands to the prefill kernel (prefill_kernel.cpp): attention of many query rows.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace ras::cpu {

struct PrefillArgs {
  DType dtype;  // of query, key, value and out
  int64_t batch, heads, kv_heads, length_q, length_k, dim;
  const void *query, *key, *value;
  int64_t query_stride[3], key_stride[3], value_stride[3];  // batch, head, row; elements
  float scale, softcap;                                     // softcap 0: none
  bool causal;
  int64_t window;  // 0: none
  const int32_t *kv_start, *kv_end;
  const int32_t* region_ids;  // [B, Lk] or null
  int64_t region_stride, num_regions;
  const float* region_bias;  // [B or 1, Hq, R]; null: none
  int64_t bias_batch_stride, bias_head_stride;
  const float* sinks;  // [Hq] or null
  int64_t mass_rows;   // how many of the last query rows have their masses taken

  void* out;    // [B, Lq, Hq, D]
  float* lse;   // [B, Hq, Lq]
  float* mass;  // [B, Hq, mass_rows, R] or null
};

// Query rows [row_begin, row_end) of every head that reads kv head `group` = b · kv_heads + kv_head.
RAS_FAST_DECLARE(prefill, const PrefillArgs& args, int64_t group, int64_t row_begin, int64_t row_end)

}  // namespace ras::cpu
