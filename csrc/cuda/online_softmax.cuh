// What the attention kernels share: quads of lanes that hold a row of an mma's scores, base-2 logarithms, sums by region.
// Framework-free.
#pragma once

#include <cmath>

#include "common.cuh"

namespace ras::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kSharedRegions = 32;  // up to this many regions a block of warps sums in shared memory

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
  Pack<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Sum, or maximum, over the four lanes that share a row of scores.
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(kFullWarp, v, 1);
  return v + __shfl_xor_sync(kFullWarp, v, 2);
}

__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
}

// One instruction each, wrong by 2^-22 of the result and of 1; what lies below 2^-126 counts as 0. exp2f and log2f take 4 and
// 20.
__device__ inline float exp2_approximate(float v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return std::exp2(v);
#endif
}

__device__ inline float log2_approximate(float v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return std::log2(v);
#endif
}

// exp2_approximate(-inf - finite_or_zero(-inf)) is 0 and never NaN.
__device__ inline float finite_or_zero(float v) { return v == -INFINITY ? 0.f : v; }

// log2 of the sum of 2^v
template <int kCount>
__device__ inline float log2_sum(const float (&v)[kCount]) {
  float top = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = fmaxf(top, v[i]);
  top = finite_or_zero(top);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += exp2_approximate(v[i] - top);
  return top + log2_approximate(sum);
}

// Sums probabilities by region while a warp walks the keys. A run is keys that follow each other and share a region; their sum is
// the one that a softmax has anyway (`sum`, this lane's part, which the caller keeps), so that a step without a new region costs
// nothing but to see that. When the run ends, the sum is added to the region's total in memory and starts anew.
// kLog: totals are base-2 logarithms, and probabilities in units of 2^top; else they are sums.
template <int kRowTiles, bool kLog>
struct RegionSums {
  float* totals[kRowTiles];  // of row g + 8 half: [regions]
  bool ok[kRowTiles];
  int regions;
  int current;              // the run's region
  float before[kRowTiles];  // kLog: this lane's part of all earlier runs, of whatever region, in units of 2^top as `sum` is

  __device__ void begin(bool (&exists)[kRowTiles]) {
    current = -1;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      before[half] = 0.f;
      ok[half] = exists[half];
    }
  }

  __device__ void clear() const {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      if (!ok[half]) continue;
#pragma unroll 1
      for (int r = threadIdx.x % 4; r < regions; r += 4) totals[half][r] = kLog ? -INFINITY : 0.f;
    }
    __syncwarp();
  }

  // Adds this lane's part of a region's sum. One lane owns each row of the totals, so what it reads is what it wrote. Logarithms
  // of both rows are read before either is written, since the compiler must take them for the same memory.
  __device__ void fold(int region, const float (&part)[kRowTiles], const float (&top)[kRowTiles]) {
    float sum[kRowTiles], total[kRowTiles] = {};
    bool own[kRowTiles];
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      sum[half] = quad_sum(part[half]);
      own[half] = ok[half] && threadIdx.x % 4 == 0;
      if (!kLog && own[half]) totals[half][region] += sum[half];
      if (kLog && own[half]) total[half] = totals[half][region];
    }
    if constexpr (kLog) {
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) sum[half] = log2_sum({total[half], log2_approximate(sum[half]) + top[half]});
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
        if (own[half]) totals[half][region] = sum[half];
      }
    }
  }

  // Where a maximum has grown, what was summed before shrinks.
  __device__ void rescale(const float (&factor)[kRowTiles]) {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) before[half] *= factor[half];
  }

  // Ends the last run. kLog: `sum` becomes that of all keys.
  __device__ void close(float (&sum)[kRowTiles], const float (&top)[kRowTiles]) {
    if (current >= 0) fold(current, sum, top);
#pragma unroll
    for (int half = 0; kLog && half < kRowTiles; ++half) sum[half] += before[half];
  }

  // Says where the next keys lie, before any is added to `sum`.
  __device__ void enter(int region, float (&sum)[kRowTiles], const float (&top)[kRowTiles]) {
    if (region == current) return;
    if (current >= 0) fold(current, sum, top);
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      if (kLog) before[half] += sum[half];
      sum[half] = 0.f;
    }
    current = region;
  }

  // Adds 4 kCount keys to `sum`, where they mix regions one region after the other. p[half][2 t + e]: row g + 8 half and key
  // 8 t + 2 c + e, for the lane 4 g + c; id: the region of key lane % (4 kCount), or -1.
  template <int kCount>
  __device__ void add(const float (&p)[kRowTiles][kCount], int id, float (&sum)[kRowTiles], const float (&top)[kRowTiles]) {
    if (__all_sync(kFullWarp, id == current)) {
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[half] += p[half][i];
      }
      return;
    }
    const int c = threadIdx.x % 4;
    int mine[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine[i] = __shfl_sync(kFullWarp, id, 8 * (i / 2) + 2 * c + i % 2);
    unsigned left = kFullWarp;
#pragma unroll 1
    while (left != 0) {
      const int region = __shfl_sync(kFullWarp, id, __ffs(left) - 1);
      enter(region, sum, top);
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[half] += mine[i] == region ? p[half][i] : 0.f;
      }
      left &= ~__ballot_sync(kFullWarp, id == region);
    }
  }
};

}  // namespace ras::cuda
