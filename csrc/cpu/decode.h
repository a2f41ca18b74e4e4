// What the launcher (decode.cpp) hands to the decode kernels (decode_kernel.cpp): attention of few query rows per sequence.
#pragma once

#include <cstdint>

#include "cpu/attention_args.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

struct DecodeArgs : ValueArgs {
  // The keys are cut into `splits` pieces of `split_keys`; each leaves, for every query, its softmax numerator and what is needed
  // to rescale it: [B, Hkv, Lq, heads of a group, splits] times `partial_size` floats, laid out as (peak, total, mass[R],
  // out[padded D]).
  int64_t splits, split_keys, partial_size;
  float* partials;

  void* out;   // [B, Lq, Hq, D]
  float* lse;  // [B, Hq, Lq]
  int64_t mass_rows;
  float* mass;  // [B, Hq, mass_rows, R] or null
};

// One piece of the keys for every query that reads kv head `group` = b · kv_heads + kv_head.
RAS_FAST_DECLARE(decode_split, const DecodeArgs& args, int64_t group, int64_t split)

// Merges the pieces of queries [begin, end) of [B, Lq, Hq].
RAS_FAST_DECLARE(decode_merge, const DecodeArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
