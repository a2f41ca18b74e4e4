// Small helpers between torch's stable tensors and the CPU launchers.
#pragma once

#include <initializer_list>

#include "common/tensor.h"

namespace ras::cpu {

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  return ras::empty_strided(sizes, strides, dtype, aoti_torch_device_type_cpu(), 0);
}

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype);
}

// Like heads x [B, H, L, D], in memory [B, L, H, D], as projections leave them.
inline Tensor empty_heads(const Tensor& x) { return empty_strided(sizes_of(x), head_strides(x), raw_dtype(x)); }

inline Tensor empty_float(const std::vector<int64_t>& sizes) { return empty(sizes, aoti_torch_dtype_float32()); }

inline bool is(const Tensor& tensor, int32_t dtype, std::initializer_list<int64_t> sizes) {
  return tensor.is_cpu() && raw_dtype(tensor) == dtype && std::ranges::equal(tensor.sizes(), sizes);
}

inline bool rows_contiguous(const Tensor& tensor) { return tensor.is_cpu() && last_dim_contiguous(tensor); }

// Below this many elements a call stays on its own thread: waking a second takes longer (docs/kernels.md, "Threads").
constexpr int64_t kElementsPerThread = 1 << 15;

// body(begin, end) for parts of 0 .. count, each of at least `grain` unless all stay on this thread.
template <class Body>
void share_out(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace ras::cpu
