// Runs CUDA kernels on the host, one fiber per thread, and checks them as it goes. For tests only.
//
// A kernel's source is compiled by g++ against the stand-ins in include/, with -fsanitize=thread. That flag makes the
// compiler call a function before every access to memory; emulator.cpp supplies those functions in place of the thread
// sanitizer's own, and so sees each load and store of a kernel without the kernel knowing. It reports
//   - an access outside the buffers that the test registered, the block's shared memory and the thread's own stack;
//   - a hazard: two threads touch the same byte, one of them writing, with no barrier in between;
//   - shared memory read before anyone wrote it;
//   - a shuffle or barrier that lanes named in its mask do not reach, or that a lane outside its mask calls.
// Barriers and shuffles are where fibers switch. Undefined behaviour is UBSan's part, overruns of local arrays ASan's
// (emulator.py). Fragment-level instructions (mma, ldmatrix, cp.async) get portable twins built on gather() and AsyncCopies.
#pragma once

#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// Buffers that kernels may touch from now on. A kernel that writes one that is not `writable` fails.
void allow(const void* data, size_t bytes, bool writable, const char* name);
void forget_buffers();

// Runs every block of a grid, one after the other. Returns false and keeps a message in error() when a check failed.
bool launch_erased(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* kernel);

template <typename Kernel>
bool launch(dim3 grid, dim3 block, size_t shared_bytes, const Kernel& kernel) {
  return launch_erased(grid, block, shared_bytes, [](const void* k) { (*static_cast<const Kernel*>(k))(); }, &kernel);
}

const char* error();

// What a running kernel sees.
dim3 thread_index();
dim3 block_index();
dim3 block_dim();
dim3 grid_dim();
int lane();
char* dynamic_shared();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void block_barrier();
void warp_barrier(unsigned mask);

// Every lane of `mask` calls this with `bytes` bytes; each gets those of lane `source`. The basis of shuffles.
void shuffle(unsigned mask, const void* in, void* out, size_t bytes, int source);
// The same, but each gets all 32 lanes' bytes, lane after lane (zero for lanes outside the mask). The basis of twins of
// warp-wide instructions: gather the fragments, compute this lane's part of the result.
void gather(unsigned mask, const void* in, void* out, size_t bytes);

// cp.async: the copy happens when it is waited for, as late as the hardware may do it.
void async_copy(void* shared, const void* global, size_t bytes, size_t valid_bytes);
void async_commit();
void async_wait(int groups_still_pending);

// Hopper's asynchronous instructions (emulator_hopper.cpp), which happen as late, and are seen by as few, as PTX allows.
void mbarrier_init(void* barrier, unsigned arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(void* barrier, unsigned expected_bytes);
void mbarrier_wait(void* barrier, unsigned parity);
void named_barrier(int name, int threads, bool wait);

struct TensorMap {  // of 2-byte elements, innermost dimension first
  const char* data;
  int64_t size[4], stride[4];  // elements, bytes
  int box[4];
  bool swizzle_128;
};
struct Corner {
  int at[4];
};
void tma_load(void* shared, const TensorMap& map, void* barrier, Corner corner);

struct Wgmma {
  float* d;             // this thread's accumulators
  int columns;
  const uint32_t* a;    // this thread's fragment; null: in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool b_transposed;    // rows of n instead of rows of k
  bool add, half;       // half: float16, else bfloat16
};
void wgmma(const Wgmma& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_still_pending);

// Atomics: checked for bounds, never a hazard.
void atomic_access(const void* address, size_t bytes);

template <typename T>
T shuffle_value(unsigned mask, T value, int source) {
  T result;
  shuffle(mask, &value, &result, sizeof(T), source);
  return result;
}

}  // namespace simt
