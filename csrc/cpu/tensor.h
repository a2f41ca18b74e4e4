// Small helpers between torch's stable tensors and the kernels' plain structs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/row_map.h"

namespace ras::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline DType dtype_of(const Tensor& tensor) {
  const int32_t dtype = raw_dtype(tensor);
  if (dtype == aoti_torch_dtype_float32()) return DType::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), "ras_fast: float32, float16 or bfloat16 is needed, got another dtype");
  return DType::f16;
}

// An uninitialised CPU tensor. The C shim rather than stable::new_empty: that one looks its operator up by name,
// which costs more than a decode step's whole row.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
  return empty_strided(sizes, strides, dtype);
}

// Guards: what would read or write out of bounds is refused here; ras_fast/ops/ then names the argument.

inline bool is(const Tensor& tensor, int32_t dtype, std::initializer_list<int64_t> sizes) {
  if (!tensor.is_cpu() || raw_dtype(tensor) != dtype || tensor.dim() != int64_t(sizes.size())) return false;
  return std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin());
}

inline bool rows_contiguous(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.dim() > 0 && (tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

inline Tensor empty_float(const std::vector<int64_t>& sizes) { return empty(sizes, aoti_torch_dtype_float32()); }

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const MaybeTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline RowMap row_map(const Tensor& tensor) {
  RowMap map;
  map.data = tensor.data_ptr();
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
