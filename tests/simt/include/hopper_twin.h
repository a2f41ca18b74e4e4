// The functions of csrc/cuda/hopper_ptx.cuh on top of the emulator.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda/common.cuh"

namespace ras::cuda {

struct Mbarrier {
  uint64_t state;
};

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - simt::dynamic_shared()); }
inline char* dynamic_shared() { return simt::dynamic_shared(); }

inline void mbarrier_init(Mbarrier& barrier, unsigned arrivals) { simt::mbarrier_init(&barrier, arrivals); }
inline void mbarrier_init_fence() { simt::mbarrier_init_fence(); }
inline void mbarrier_arrive(Mbarrier& barrier) { simt::mbarrier_arrive(&barrier, 0); }
inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, unsigned bytes) { simt::mbarrier_arrive(&barrier, bytes); }
inline void mbarrier_wait(Mbarrier& barrier, unsigned parity) { simt::mbarrier_wait(&barrier, parity); }

inline void tma_prefetch_descriptor(const CUtensorMap&) {}
inline void tma_load(void* to, const CUtensorMap& map, Mbarrier& barrier, int x, int y, int z, int w) {
  simt::tma_load(to, map.map, &barrier, {x, y, z, w});
}

inline void bar_sync(int name, int threads) { simt::named_barrier(name, threads, true); }
inline void bar_arrive(int name, int threads) { simt::named_barrier(name, threads, false); }
template <int kCount>
void setmaxnreg_inc() {}
template <int kCount>
void setmaxnreg_dec() {}

inline void wgmma_fence() { simt::wgmma_fence(); }
inline void wgmma_commit() { simt::wgmma_commit(); }
template <typename T, int kCount>
void keep_in_registers(T (&)[kCount]) {}
template <int kPending, typename... Values>
void wgmma_wait(Values&...) { simt::wgmma_wait(kPending); }

template <typename T, int kCount>
void wgmma_shared(float (&d)[kCount], uint64_t a, uint64_t b, bool add) {
  simt::wgmma({d, 2 * kCount, nullptr, a, b, false, add, std::is_same_v<T, __half>});
}
template <typename T, int kCount>
void wgmma_registers(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  simt::wgmma({d, 2 * kCount, a, 0, b, true, true, std::is_same_v<T, __half>});
}

}  // namespace ras::cuda
