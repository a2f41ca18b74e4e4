// Hopper's asynchronous instructions, one function each, named as PTX names them: barriers that count arrivals and bytes,
// tensor copies into shared memory, matrix products by a warpgroup. sm_90a only. The emulation has the same functions
// (tests/simt/include/hopper_twin.h). PTX ISA: "mbarrier", "cp.async.bulk.tensor", "wgmma".
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common.cuh"

namespace ras::cuda {

struct Mbarrier {
  uint64_t state;
};

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ inline void mbarrier_init(Mbarrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Initialised barriers become visible to the copy engine.
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and adds to the bytes that the phase waits for.
__device__ inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over. A new barrier is in phase 0; the phase before it counts as over.
__device__ inline void mbarrier_wait(Mbarrier& barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}

__device__ inline void tma_prefetch_descriptor(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the map's box at these coordinates (innermost first; zeros where outside) and counts its bytes on `barrier`.
__device__ inline void tma_load(void* to, const CUtensorMap& map, Mbarrier& barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)), "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// Named barriers 1 .. 15 (0 is __syncthreads), counted in threads.
__device__ inline void bar_sync(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
__device__ inline void bar_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// A warpgroup's registers a thread, from now on.
template <int kCount>
__device__ inline void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)); }
template <int kCount>
__device__ inline void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)); }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Registers that a product in flight reads or writes: nothing that uses them moves across this.
template <typename T, int kCount>
__device__ inline void keep_in_registers(T (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(values[i])::"memory");
    } else {
      asm volatile("" : "+r"(values[i])::"memory");
    }
  }
}

// Waits until at most kPending groups are in flight; `values` are what the groups that are over have used.
template <int kPending, typename... Values>
__device__ inline void wgmma_wait(Values&... values) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (keep_in_registers(values), ...);
}

// Operand lists of wgmma: the first registers of the accumulator, as text and as operands.
#define RAS_TEXT_32                                                                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define RAS_TEXT_40 RAS_TEXT_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define RAS_TEXT_64 \
  RAS_TEXT_40       \
  ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define RAS_TEXT_128                                                                                                  \
  RAS_TEXT_64                                                                                                         \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,"  \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define RAS_FLOATS_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RAS_FLOATS_32(d, i) RAS_FLOATS_8(d, i), RAS_FLOATS_8(d, i + 8), RAS_FLOATS_8(d, i + 16), RAS_FLOATS_8(d, i + 24)
#define RAS_FLOATS_40(d) RAS_FLOATS_32(d, 0), RAS_FLOATS_8(d, 32)
#define RAS_FLOATS_64(d) RAS_FLOATS_32(d, 0), RAS_FLOATS_32(d, 32)
#define RAS_FLOATS_128(d) RAS_FLOATS_64(d), RAS_FLOATS_32(d, 64), RAS_FLOATS_32(d, 96)

// d[64, 2 kCount] = a[64, 16] b[2 kCount, 16]^T (+ d): both operands in shared memory, rows of k (wgmma_descriptor,
// hopper_prefill.cuh).
template <typename T, int kCount>
__device__ inline void wgmma_shared(float (&d)[kCount], uint64_t a, uint64_t b, bool add) {
  static_assert(kCount == 40 || kCount == 64);
#define RAS_WGMMA(N, TYPE, TEXT, FLOATS, A, B, ADD)                                                                    \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" TEXT "}, " A ", " B ", add, 1, 1, 0, 0;\n}"                                               \
               : FLOATS : "l"(a), "l"(b), "r"(int(add)))
#define RAS_WGMMA_80(TYPE) RAS_WGMMA("80", TYPE, RAS_TEXT_40, RAS_FLOATS_40(d), "%40", "%41", "%42")
#define RAS_WGMMA_128(TYPE) RAS_WGMMA("128", TYPE, RAS_TEXT_64, RAS_FLOATS_64(d), "%64", "%65", "%66")
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kCount == 40) RAS_WGMMA_80("f16"); else RAS_WGMMA_128("f16");
  } else {
    if constexpr (kCount == 40) RAS_WGMMA_80("bf16"); else RAS_WGMMA_128("bf16");
  }
#undef RAS_WGMMA_128
#undef RAS_WGMMA_80
#undef RAS_WGMMA
}

// d[64, 2 kCount] += a[64, 16] b[16, 2 kCount]: a in registers (two elements each), b in shared memory, rows of n.
template <typename T, int kCount>
__device__ inline void wgmma_registers(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
#define RAS_WGMMA(N, TYPE, TEXT, FLOATS, A0, A1, A2, A3, B, P)                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" TEXT "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", add, 1, 1, 1;\n}"                      \
               : FLOATS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1))
#define RAS_WGMMA_64(TYPE) \
  RAS_WGMMA("64", TYPE, RAS_TEXT_32, RAS_FLOATS_32(d, 0), "%32", "%33", "%34", "%35", "%36", "%37")
#define RAS_WGMMA_128(TYPE) RAS_WGMMA("128", TYPE, RAS_TEXT_64, RAS_FLOATS_64(d), "%64", "%65", "%66", "%67", "%68", "%69")
#define RAS_WGMMA_256(TYPE) \
  RAS_WGMMA("256", TYPE, RAS_TEXT_128, RAS_FLOATS_128(d), "%128", "%129", "%130", "%131", "%132", "%133")
#define RAS_WGMMA_OF_COUNT(TYPE)           \
  if constexpr (kCount == 32) {            \
    RAS_WGMMA_64(TYPE);                    \
  } else if constexpr (kCount == 64) {     \
    RAS_WGMMA_128(TYPE);                   \
  } else {                                 \
    RAS_WGMMA_256(TYPE);                   \
  }
  if constexpr (std::is_same_v<T, __half>) {
    RAS_WGMMA_OF_COUNT("f16")
  } else {
    RAS_WGMMA_OF_COUNT("bf16")
  }
#undef RAS_WGMMA_OF_COUNT
#undef RAS_WGMMA_256
#undef RAS_WGMMA_128
#undef RAS_WGMMA_64
#undef RAS_WGMMA
}

}  // namespace ras::cuda
