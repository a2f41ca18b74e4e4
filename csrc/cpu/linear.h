// What the launchers (linear.cpp) hand to the kernels (linear_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

constexpr int64_t kLinearPad = 32;  // a row is padded to a multiple of this: the widest pair
// Rows that go by each time the weight is read. Packed they stay in a core's second cache.
constexpr int64_t kLinearRows = 16;

// Rows [count, padded] as linear_outputs reads them, from rows of `dtype`, or of float when `source_float`: widened to float, or
// left alone where bf16 is multiplied by itself. `target` has room for floats.
struct PackArgs {
  DType dtype;
  bool source_float;
  int64_t count, length, padded;
  const void* const* source;
  void* target;
};

// For each of `count` rows, at most kLinearRows: out[i] = base[i] + factor·(weight[i]·row), or with `partial` only the product, in
// float, or with `up` activation(weight[i]·row)·(up[i]·row).
struct LinearArgs {
  DType dtype;
  bool source_float;
  int64_t count, length, padded;  // rows, and their size, that of weight's rows
  const void* rows;               // packed
  const void* weight;
  int64_t weight_stride;
  float* partial;  // [count, outputs] or null
  const void* up;  // or null
  int64_t up_stride;
  Activation activation;
  int64_t outputs;
  const void* const* base;  // by row, or null: 0
  const float* factor;      // by row, or null: 1
  void* const* out;         // by row
};

RAS_FAST_DECLARE_PAIRS(linear_pack, const PackArgs& args)
RAS_FAST_DECLARE_PAIRS(linear_outputs, const LinearArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
