// Where the rows of a [..., d] tensor of any strides start.
#pragma once

#include <cstdint>

namespace ras {

constexpr int kMaxDims = 8;

// The leading dimensions, innermost first, merged where strides allow; row_map (tensor.h) makes one.
struct RowMap {
  const void* data = nullptr;
  int dims = 0;
  int64_t sizes[kMaxDims] = {}, strides[kMaxDims] = {};

  int64_t offset(int64_t row) const {
    if (dims == 1) return row * strides[0];
    int64_t result = 0;
    for (int i = 0; i < dims; ++i) {
      result += row % sizes[i] * strides[i];
      row /= sizes[i];
    }
    return result;
  }
};

}  // namespace ras
