// Products by tensor cores of fragments that come straight from memory, by loads that nothing reorders.
//
// Framework-free. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include <type_traits>

#include "common.cuh"

namespace ras::cuda {

__device__ inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | (b << 16); }
__device__ inline uint32_t high_halves(uint32_t a, uint32_t b) { return (a >> 16) | (b & 0xffff0000u); }

template <typename T>
__device__ inline float half_of(uint32_t pair, int which) {
  return to_float(reinterpret_cast<const Pack<T, 2>*>(&pair)->value[which]);
}

// c[16, 8] += a[16, 16] b[16, 8] by one warp. Off the GPU: the same product through shuffles, from the documented layout.
template <typename T>
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  const int lane = threadIdx.x % kWarp, group = lane / 4, member = lane % 4;
  for (int k = 0; k < 4; ++k) {
    uint32_t row[4], left[2], right[2];
    for (int i = 0; i < 4; ++i) row[i] = __shfl_sync(kFullWarp, a[i], group * 4 + k);
    for (int i = 0; i < 2; ++i) left[i] = __shfl_sync(kFullWarp, b[i], member * 8 + k);
    for (int i = 0; i < 2; ++i) right[i] = __shfl_sync(kFullWarp, b[i], member * 8 + 4 + k);
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) {
        c[0] += half_of<T>(row[2 * i], e) * half_of<T>(left[i], e);
        c[1] += half_of<T>(row[2 * i], e) * half_of<T>(right[i], e);
        c[2] += half_of<T>(row[2 * i + 1], e) * half_of<T>(left[i], e);
        c[3] += half_of<T>(row[2 * i + 1], e) * half_of<T>(right[i], e);
      }
    }
  }
#endif
}

// Keeps the compiler from moving later loads before this point: two fragments at once would not fit into registers.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// 8 neighbouring elements, or zeros, which are written before the load begins. Left to choose between both afterwards, the
// compiler takes more registers.
template <typename T>
__device__ inline uint4 load_eight(const T* from, bool ok) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile(
      "{.reg .pred ok;\n"
      "setp.ne.b32 ok, %5, 0;\n"
      "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@ok ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"(int(ok))
      : "memory");
  return v;
#else
  return ok ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}

// The same by loads of two elements. An mma's rows g and g + 8 alternate in its registers: 16 bytes at once would have to be
// moved there, and whatever the compiler puts behind these moves, other loads as well, would wait for the load.
template <typename T>
__device__ inline uint32_t load_two(const T* from, bool ok) {
#if defined(__CUDA_ARCH__)
  uint32_t v;
  asm volatile("{.reg .pred ok;\nsetp.ne.b32 ok, %2, 0;\nmov.b32 %0, 0;\n@ok ld.global.b32 %0, [%1];}"
               : "=&r"(v)
               : "l"(from), "r"(int(ok))
               : "memory");
  return v;
#else
  return ok ? *reinterpret_cast<const uint32_t*>(from) : 0;
#endif
}

template <typename T>
__device__ inline uint4 load_apart(const T* from, bool ok) {
  return {load_two(from, ok), load_two(from + 2, ok), load_two(from + 4, ok), load_two(from + 6, ok)};
}

// 4 neighbouring elements, or zeros, as load_eight.
template <typename T>
__device__ inline uint2 load_four(const T* from, bool ok) {
#if defined(__CUDA_ARCH__)
  uint2 v;
  asm volatile(
      "{.reg .pred ok;\nsetp.ne.b32 ok, %3, 0;\nmov.b32 %0, 0; mov.b32 %1, 0;\n@ok ld.global.v2.b32 {%0, %1}, [%2];}"
      : "=&r"(v.x), "=&r"(v.y)
      : "l"(from), "r"(int(ok))
      : "memory");
  return v;
#else
  return ok ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
#endif
}

}  // namespace ras::cuda
