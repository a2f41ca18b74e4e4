// Small helpers between torch's stable tensors and the CUDA launchers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <unordered_map>

#include "common/tensor.h"

// Weak: a CPU build of torch lacks it, and still loads this library (to list its ops, or to check that it links).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace ras::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call of whoever catches this would seem to have failed
  STD_TORCH_CHECK(false, "ras_fast: ", what, ": ", cudaGetErrorString(status));
}

// Uninitialised tensors beside `like`.
inline Tensor new_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return empty_strided(sizes, strides, raw_dtype(like), aoti_torch_device_type_cuda(), like.get_device_index());
}

inline Tensor new_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_strided(like, sizes, contiguous_strides(sizes));
}

// Like heads x [B, H, L, D], in memory [B, L, H, D], as projections leave them.
inline Tensor new_heads(const Tensor& x) { return new_strided(x, sizes_of(x), head_strides(x)); }

inline Tensor new_float(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_strided(sizes, contiguous_strides(sizes), aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(),
                       like.get_device_index());
}

// Whether `tensor` lies on the device of `like` with a contiguous last dimension.
inline bool rows_beside(const Tensor& like, const Tensor& tensor) {
  return tensor.is_cuda() && tensor.get_device_index() == like.get_device_index() && last_dim_contiguous(tensor);
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
  std::unordered_map<const void*, int> resident;  // and resident_blocks
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

// How many blocks of `kernel`, which has no dynamic shared memory, the device holds at a time.
template <typename Args>
int resident_blocks(void (*kernel)(Args), int threads, const Tensor& on) {
  Device& device = device_of(on);
  int& blocks = device.resident[reinterpret_cast<const void*>(kernel)];
  if (blocks == 0) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "occupancy query");
    blocks *= device.multiprocessors;
  }
  return blocks;
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
