// Small helpers between torch's stable tensors and the CPU launchers.
#pragma once

#include <initializer_list>

#include "common/tensor.h"
#include "cpu/row_map.h"

namespace ras::cpu {

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  return ras::empty_strided(sizes, strides, dtype, aoti_torch_device_type_cpu(), 0);
}

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype);
}

inline Tensor empty_float(const std::vector<int64_t>& sizes) { return empty(sizes, aoti_torch_dtype_float32()); }

inline bool is(const Tensor& tensor, int32_t dtype, std::initializer_list<int64_t> sizes) {
  return tensor.is_cpu() && raw_dtype(tensor) == dtype && std::ranges::equal(tensor.sizes(), sizes);
}

inline bool rows_contiguous(const Tensor& tensor) { return tensor.is_cpu() && last_dim_contiguous(tensor); }

inline RowMap row_map(const Tensor& tensor) {
  RowMap map;
  map.data = data_of<const void>(tensor);
  for (int64_t i = tensor.dim() - 2; i >= 0; --i) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    if (size == 1) continue;
    if (map.dims && map.strides[map.dims - 1] * map.sizes[map.dims - 1] == stride) {
      map.sizes[map.dims - 1] *= size;
      continue;
    }
    STD_TORCH_CHECK(map.dims < kMaxDims, "ras_fast: at most ", kMaxDims, " non-mergeable leading dimensions are supported");
    map.sizes[map.dims] = size;
    map.strides[map.dims++] = stride;
  }
  return map;
}

}  // namespace ras::cpu
