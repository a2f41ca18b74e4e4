// What the launcher (norm.cpp) hands to the row kernels (norm_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/row_map.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

// A [rows, d] or [d] tensor; data is null when the caller gave none.
struct Table {
  const void* data = nullptr;
  int64_t rows = 0, stride = 0;
};

struct NormArgs {
  DType dtype;        // of x, residual, y, h
  bool float_tables;  // every table is float; else every table is of `dtype`
  int64_t d;
  RowMap x, residual;
  void *y, *h;  // contiguous; h is null when it is not stored. y may be x, and h residual, if these are contiguous
  Table weight, bias, x_weight;
  Table scale;  // [1], of the sum
  float eps, weight_offset, x_scale;
  bool scales_x;  // whether x_scale is other than 1
  bool rms, hf_rounding;

  Table vectors;  // steering; data is null when nothing is steered
  const int32_t* slot;
  const float* alpha;
  bool lerp;

  Table probes;
  float* probe_dots;  // [T, probes.rows + 1]
};

RAS_FAST_DECLARE(norm_rows, const NormArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
