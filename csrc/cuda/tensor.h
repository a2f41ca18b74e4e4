// Small helpers between torch's stable tensors and the CUDA launchers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common.cuh"

// Weak: a CPU build of torch lacks it, and still loads this library (to list its ops, or to check that it links).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace ras::cuda {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "ras_fast: ", what, ": ", cudaGetErrorString(status));
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::kFloat32;
    case torch::headeronly::ScalarType::Half: return DType::kFloat16;
    case torch::headeronly::ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "ras_fast: a CUDA kernel got a tensor that is not float32, float16 or bfloat16");
  }
}

inline int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// An uninitialised tensor beside `like`. The C shim rather than stable::new_empty: that one looks its operator up by name,
// which costs more than a small launch.
inline Tensor new_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                          int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
  return new_strided(like, sizes, strides, dtype);
}

inline Tensor new_like(const Tensor& like, const std::vector<int64_t>& sizes) { return empty(like, sizes, raw_dtype(like)); }

inline Tensor new_float(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty(like, sizes, aoti_torch_dtype_float32());
}

// Whether `tensor` lies on the device of `like` with a contiguous last dimension. What would be read or written out of
// bounds is refused by the launchers; ras_fast/ops/ then names the argument.
inline bool rows_beside(const Tensor& like, const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  return tensor.is_cuda() && tensor.get_device_index() == like.get_device_index() && dim > 0 &&
         (tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "ras_fast: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Device {
  int multiprocessors;
  std::unordered_map<const void*, bool> waiting;  // kernels asked about so far: kernel_waits
};

// Facts about a device, asked for once per thread: a query costs as much as a small launch.
inline Device& device_of(const Tensor& tensor) {
  thread_local std::vector<std::optional<Device>> known;
  const auto index = static_cast<size_t>(tensor.get_device_index());
  if (known.size() <= index) known.resize(index + 1);
  if (!known[index]) {
    Device device{};
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, int(index)), "device query");
    known[index] = device;
  }
  return *known[index];
}

// Whether wait_for_previous_kernel() (common.cuh) does anything in the code of `kernel` that the device runs. The chip does not
// say: it also runs code that was compiled for an older one (a library built for 8.0 on a Hopper chip), which does not wait.
inline bool kernel_waits(const void* kernel, const Tensor& on) {
  auto& waiting = device_of(on).waiting;
  if (const auto known = waiting.find(kernel); known != waiting.end()) return known->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "kernel query");
  return waiting[kernel] = attributes.ptxVersion >= 90;
}

// Launches `kernel(args)`, where it waits as a programmatic dependent of the kernel before it: the kernel must call
// wait_for_previous_kernel() before it reads or writes anything another kernel may touch.
template <typename Args>
void launch(void (*kernel)(Args), const Args& args, dim3 grid, dim3 block, size_t shared_bytes, const Tensor& on) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream(on);
  config.attrs = &overlap;
  config.numAttrs = kernel_waits(reinterpret_cast<const void*>(kernel), on) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), "kernel launch");
}

}  // namespace ras::cuda
