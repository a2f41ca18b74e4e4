// What the launcher (attention_stats.cpp) hands to the statistics kernels (attention_stats_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/reduce.h"
#include "cpu/attention_args.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

struct AttentionStatsArgs : AttentionArgs {
  const float* lse;  // [B, Hq, Lq], contiguous
  int64_t rows;      // how many of the last query rows
  bool mass;         // whether masses are wanted
  float* scores;     // [B, Hq, Lk], zeroed; null: not wanted
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
