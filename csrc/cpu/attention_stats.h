// What the launcher (attention_stats.cpp) hands to the statistics kernels (attention_stats_kernel.cpp).
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace ras::cpu {

enum class Reduce : int { mean, sum, max };

struct AttentionStatsArgs {
  DType dtype;  // of query and key
  int64_t batch, heads, kv_heads, length_q, length_k, dim;
  const void *query, *key;
  int64_t query_stride[3], key_stride[3];  // batch, head, row; elements
  const float* lse;                        // [B, Hq, Lq], contiguous
  int64_t rows;                            // how many of the last query rows
  float scale, softcap;                    // softcap 0: none
  bool causal;
  int64_t window;  // 0: none
  const int32_t *kv_start, *kv_end;
  const int32_t* region_ids;  // [B, Lk]
  int64_t region_stride, num_regions;
  const float* region_bias;  // [B or 1, Hq, R]; null: none
  int64_t bias_batch_stride, bias_head_stride;

  bool mass;      // whether masses are wanted
  float* scores;  // [B, Hq, Lk], zeroed; null: not wanted
  Reduce reduce;
};

// What one call of the kernel does: query rows [row_begin, row_end) of the last `rows` and keys [key_begin, key_end), for
// every head that reads kv head `group` = b · kv_heads + kv_head.
struct StatsWork {
  int64_t group, row_begin, row_end, key_begin, key_end;
};

// Adds the masses of these rows on these keys to mass [B, Hq, rows, R] and writes the scores of these keys, which take all rows.
RAS_FAST_DECLARE(attention_stats, const AttentionStatsArgs& args, const StatsWork& work, float* mass)

}  // namespace ras::cpu
