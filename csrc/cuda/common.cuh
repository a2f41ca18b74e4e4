// Device building blocks shared by the CUDA kernels: element types, 16-byte access, warp sums, launch overlap.
// Framework-free. tests/simt compiles this very file with g++ (no __CUDA_ARCH__), so inline PTX sits behind that macro.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace ras::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kAccessBytes = 16;  // the widest load or store of one thread on every supported chip

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

template <typename T>
constexpr DType kTypeOf = DType::f32;
template <>
inline constexpr DType kTypeOf<__half> = DType::f16;
template <>
inline constexpr DType kTypeOf<__nv_bfloat16> = DType::bf16;

// Calls use(T{}) with the element type that `dtype` names.
template <typename Use>
auto for_dtype(DType dtype, Use&& use) {
  switch (dtype) {
    case DType::f16: return use(__half{});
    case DType::bf16: return use(__nv_bfloat16{});
    default: return use(float{});
  }
}

// Two values at a time: hardware converts pairs in one instruction, and single values several times slower.
template <typename T>
struct PairOf;
template <>
struct PairOf<float> { using type = float2; };
template <>
struct PairOf<__half> { using type = __half2; };
template <>
struct PairOf<__nv_bfloat16> { using type = __nv_bfloat162; };
template <typename T>
using Pair = typename PairOf<T>::type;

__device__ inline float2 to_float2(float2 v) { return v; }
__device__ inline float2 to_float2(__half2 v) { return __half22float2(v); }
__device__ inline float2 to_float2(__nv_bfloat162 v) { return __bfloat1622float2(v); }

template <typename T>
__device__ inline Pair<T> from_floats(float a, float b);
template <>
__device__ inline float2 from_floats<float>(float a, float b) { return make_float2(a, b); }
template <>
__device__ inline __half2 from_floats<__half>(float a, float b) { return __floats2half2_rn(a, b); }
template <>
__device__ inline __nv_bfloat162 from_floats<__nv_bfloat16>(float a, float b) { return __floats2bfloat162_rn(a, b); }

// Rounds kCount values (an even number) to what T can hold.
template <typename T, int kCount>
__device__ inline void round_all(float* v) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const float2 rounded = to_float2(from_floats<T>(v[i], v[i + 1]));
    v[i] = rounded.x;
    v[i + 1] = rounded.y;
  }
}

// Two values that lie side by side in memory. A bfloat16 is the upper half of a float: said so, it takes half the instructions
// of the header's conversion, which takes a word apart first.
template <typename T>
__device__ inline float2 unpack_pair(const Pair<T>& pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t bits = reinterpret_cast<const uint32_t&>(pair);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    return to_float2(pair);
  }
}

// 16 bytes of T to and from float.
template <typename T>
__device__ inline void unpack(const uint4& bits, float* out) {
  const auto* pairs = reinterpret_cast<const Pair<T>*>(&bits);
#pragma unroll
  for (int i = 0; i < kAccessBytes / int(2 * sizeof(T)); ++i) {
    const float2 v = unpack_pair<T>(pairs[i]);
    out[2 * i] = v.x;
    out[2 * i + 1] = v.y;
  }
}

template <typename T>
__device__ inline uint4 pack(const float* v) {
  uint4 bits;
  auto* pairs = reinterpret_cast<Pair<T>*>(&bits);
#pragma unroll
  for (int i = 0; i < kAccessBytes / int(2 * sizeof(T)); ++i) pairs[i] = from_floats<T>(v[2 * i], v[2 * i + 1]);
  return bits;
}

// kCount neighbouring elements, moved by as few and as wide accesses as their size allows.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kAccessBytes ? sizeof(T) * kCount : kAccessBytes) Pack {
  T value[kCount];
};

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

// v itself. What is computed from it stays in its place: moved before a loop, it would hold registers through all of it.
__device__ inline int in_place(int v) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(v));
#endif
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

// `bytes` of memory, in whole 16s as the address, by the chips that can do so at once.
__device__ inline void prefetch_l2(const void* address, unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
#else
  (void)address, (void)bytes;
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
