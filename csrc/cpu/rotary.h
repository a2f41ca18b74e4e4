// What the launcher (rotary.cpp) hands to the kernel (rotary_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

// Queries or keys: [B, H, L, D] in any strides, and where they go, [B, L, H, D].
struct RotaryHeads {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
  int64_t heads;
  void* out;
};

struct RotaryTable {
  const void* data;  // [B, L, rotated]
  int64_t batch_stride, token_stride;
};

struct RotaryArgs {
  DType dtype, table_dtype;  // tables: of the same dtype, or f32
  bool interleaved;
  RotaryHeads query, key;
  RotaryTable cos, sin;
  int64_t length, dim, rotated;
};

// Of the B·L tokens those from `begin` up to `end`.
RAS_FAST_DECLARE(rotary_tokens, const RotaryArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
