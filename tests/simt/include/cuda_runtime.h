// Stand-in for the CUDA header of this name: just what the kernels use, on top of emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // emulator.cpp finds them by that

#define threadIdx simt::thread_index()
#define blockIdx simt::block_index()
#define blockDim simt::block_dim()
#define gridDim simt::grid_dim()
constexpr int warpSize = 32;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_barrier(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) { return simt::shuffle_value(mask, value, source & 31); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) { return simt::shuffle_value(mask, value, simt::lane() ^ bits); }
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int source = simt::lane() + int(delta);
  return simt::shuffle_value(mask, value, source > 31 ? simt::lane() : source);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int source = simt::lane() - int(delta);
  return simt::shuffle_value(mask, value, source < 0 ? simt::lane() : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  int votes[32];
  simt::gather(mask, &predicate, votes, sizeof(int));
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= unsigned(votes[i] != 0) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  unsigned values[32];
  simt::gather(mask, &value, values, sizeof(unsigned));
  unsigned result = value;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1 && values[i] < result) result = values[i];
  }
  return result;
}

template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }

inline float atomicAdd(float* p, float v) {
  simt::atomic_access(p, sizeof(float));
  float old;
  std::memcpy(&old, p, sizeof old);
  const float sum = old + v;
  std::memcpy(p, &sum, sizeof sum);
  return old;
}

inline int __ffs(unsigned v) { return __builtin_ffs(int(v)); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int_as_float(int v) { float f; std::memcpy(&f, &v, 4); return f; }
inline int __float_as_int(float v) { int i; std::memcpy(&i, &v, 4); return i; }
inline unsigned __float_as_uint(float v) { unsigned i; std::memcpy(&i, &v, 4); return i; }
inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
using std::max;
using std::min;
