// What the launcher (prefill.cpp) hands to the prefill kernel (prefill_kernel.cpp): attention of many query rows.
#pragma once

#include <cstdint>

#include "cpu/attention_args.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

struct PrefillArgs : ValueArgs {
  int64_t mass_rows;   // how many of the last query rows have their masses taken

  void* out;    // [B, Lq, Hq, D]
  float* lse;   // [B, Hq, Lq]
  float* mass;  // [B, Hq, mass_rows, R] or null
};

// Query rows [row_begin, row_end) of every head that reads kv head `group` = b · kv_heads + kv_head.
RAS_FAST_DECLARE_PAIRS(prefill, const PrefillArgs& args, int64_t group, int64_t row_begin, int64_t row_end)

}  // namespace ras::cpu
