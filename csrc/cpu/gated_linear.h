// What the launcher (gated_linear.cpp) hands to the kernels (gated_linear_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

constexpr int64_t kGatedPad = 32;  // a widened row's length is a multiple of this: the widest pair

// rows of floats [count, padded] in the pair order of `dtype`, from rows of `dtype`, or of float when `source_float`.
struct WidenArgs {
  DType dtype;
  bool source_float;
  int64_t count, length, padded;
  const void* const* source;
  float* target;
};

// For each of `count` rows: out[i] = weight[i]·row, and for the last factor out[i] = x[i] + gate·(weight[i]·row).
struct GatedArgs {
  DType dtype;
  int64_t count, length, padded;  // rows, and their size, that of weight's rows
  const float* rows;              // widened
  const void* weight;
  int64_t weight_stride;
  float* partial;  // [count, outputs] for the first of two factors; else null
  int64_t outputs;
  const void* const* x;
  void* const* out;
  const float* gates;
};

RAS_FAST_DECLARE(gated_widen, const WidenArgs& args)
RAS_FAST_DECLARE(gated_outputs, const GatedArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
