// Small helpers between torch's stable tensors and the launchers of every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/row_map.h"

namespace ras {

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

template <class T>
T* data_of(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}
template <class T>
T* data_of(const MaybeTensor& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
  return strides;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// The strides of [B, H, L, D] that in memory is [B, L, H, D].
inline std::vector<int64_t> head_strides(const Tensor& x) {
  const int64_t heads = x.size(1), length = x.size(2), dim = x.size(3);
  return {length * heads * dim, dim, heads * dim, 1};
}

// Where the rows of a tensor [..., d] start.
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

// An uninitialised tensor. The C shim rather than stable::new_empty: that one looks its operator up by name, which costs more
// than a decode step's whole row on a CPU, or a small launch on a GPU.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                            int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
                                                         device_index, &handle));
  return Tensor(handle);
}

// Guards: what would read or write out of bounds is refused by the launchers; ras_fast/ops/ then names the argument.

inline bool last_dim_contiguous(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  return dim > 0 && (tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) { return std::ranges::equal(a.sizes(), b.sizes()); }

// Whether two tensors of one size and dtype, both to be written, are contiguous and share no memory.
inline bool apart(const Tensor& a, const Tensor& b) {
  const int64_t bytes = a.numel() * int64_t(a.element_size());
  return a.is_contiguous() && b.is_contiguous() && std::abs(data_of<char>(a) - data_of<char>(b)) >= bytes;
}

}  // namespace ras
