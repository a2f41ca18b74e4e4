// Small helpers between torch's stable tensors and the kernels' plain structs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dtype.h"

namespace ras::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, "ras_fast: float32, float16 or bfloat16 is needed, got another dtype");
  }
}

inline Tensor new_like(const Tensor& like, std::vector<int64_t> sizes) { return torch::stable::new_empty(like, sizes); }

inline Tensor new_float(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Float);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const MaybeTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace ras::cpu
