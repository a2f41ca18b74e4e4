// Device building blocks shared by the CUDA kernels: element types, 16-byte access, warp sums, launch overlap.
// Framework-free. tests/simt compiles this very file with g++ (no __CUDA_ARCH__), so inline PTX sits behind that macro.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace ras::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kAccessBytes = 16;  // the widest load or store of one thread on every supported chip

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// The nearest value that T can hold, as float.
template <typename T>
__device__ inline float round_to(float v) { return to_float(from_float<T>(v)); }

// kCount neighbouring elements, moved by as few and as wide accesses as their size allows.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kAccessBytes ? sizeof(T) * kCount : kAccessBytes) Pack {
  T value[kCount];
};

// A value that will not be read again soon: evicted first, so that weights stay in the cache.
template <typename T, int kCount>
__device__ inline Pack<T, kCount> load_streaming(const T* from) {
  static_assert(sizeof(Pack<T, kCount>) == kAccessBytes, "one 16-byte access");
  Pack<T, kCount> pack;
  *reinterpret_cast<uint4*>(&pack) = __ldcs(reinterpret_cast<const uint4*>(from));
  return pack;
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Programmatic dependent launch: a kernel may start while the one before it still runs. Before wait_for_previous_kernel()
// it may touch nothing that the other could write (prefetches into L2 are harmless: L2 is coherent, L1 is not).
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void prefetch_l2(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

}  // namespace ras::cuda
