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

// Sums probabilities by region while a warp walks the keys. While the keys stay in one region, each lane adds to a running sum
// (`open`); when the region changes, that sum is added to the region's total in memory (`totals`).
// kLog: totals are base-2 logarithms, and probabilities are in units of 2^top; else they are sums.
template <int kRowTiles, bool kLog>
struct RegionSums {
  float* totals[kRowTiles];  // of row g + 8 half: [regions]
  bool ok[kRowTiles];
  int regions;
  float open[kRowTiles];  // this lane's part of the running sum of region `current`
  int current;

  __device__ void begin(bool (&exists)[kRowTiles]) {
    current = -1;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      open[half] = 0.f;
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

  // One lane owns each row of the totals, so what it reads is what it wrote.
  __device__ void fold(int region, const float (&part)[kRowTiles], const float (&top)[kRowTiles]) {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      const float sum = quad_sum(part[half]);
      if (!ok[half] || threadIdx.x % 4 != 0) continue;
      float& total = totals[half][region];
      total = kLog ? log2_sum({total, log2_approximate(sum) + top[half]}) : total + sum;
    }
  }

  __device__ void close(const float (&top)[kRowTiles]) {
    if (current >= 0) fold(current, open, top);
  }

  __device__ void rescale(const float (&factor)[kRowTiles]) {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) open[half] *= factor[half];
  }

  __device__ void add_open(const float (&part)[kRowTiles]) {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) open[half] += part[half];
  }

  // Adds keys of one region; part: this lane's part of their row sums. Keys without a region (-1) leave the run as it is.
  __device__ void run(int region, const float (&part)[kRowTiles], const float (&top)[kRowTiles]) {
    if (region < 0) return;
    if (region != current) close(top);
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) open[half] = part[half] + (region == current ? open[half] : 0.f);
    current = region;
  }

  // Adds a step of 4 kCount keys, of one region or several. p[half][2 t + e]: row g + 8 half and key 8 t + 2 c + e, for the
  // lane 4 g + c; id: the region of key lane % (4 kCount).
  template <int kCount>
  __device__ void add(const float (&p)[kRowTiles][kCount], int id, const float (&top)[kRowTiles]) {
    if (__all_sync(kFullWarp, id == current)) {
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) open[half] += p[half][i];
      }
      return;
    }
    const int c = threadIdx.x % 4;
    int mine[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine[i] = __shfl_sync(kFullWarp, id, 8 * (i / 2) + 2 * c + i % 2);
    unsigned left = __ballot_sync(kFullWarp, id >= 0);
#pragma unroll 1
    while (left != 0) {
      const int region = __shfl_sync(kFullWarp, id, __ffs(left) - 1);
      float part[kRowTiles] = {};
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) part[half] += mine[i] == region ? p[half][i] : 0.f;
      }
      run(region, part, top);
      left &= ~__ballot_sync(kFullWarp, id == region);
    }
  }
};

}  // namespace ras::cuda
