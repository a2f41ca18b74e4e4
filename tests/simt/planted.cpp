// Small kernels, each right or with one planted mistake: the emulator must find every mistake, and nothing else.
#include <cuda_runtime.h>

#include <cstddef>

namespace {

// Out of bounds: the guard lets one thread too many through.
template <bool kFaulty>
__global__ void copy(const float* from, float* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kFaulty ? i <= n : i < n) to[i] = from[i];
}

// Missing barrier: each thread reads what its neighbour wrote.
template <bool kFaulty>
__global__ void rotate(const float* from, float* to) {
  __shared__ float row[256];
  row[threadIdx.x] = 0.f;
  __syncthreads();
  row[threadIdx.x] = from[threadIdx.x];
  if (!kFaulty) __syncthreads();
  to[threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}

// The same mistake on the way back: a scratch row used twice in a loop with one barrier a turn.
template <bool kFaulty>
__global__ void rotate_twice(const float* from, float* to) {
  __shared__ float row[256];
  float v = from[threadIdx.x];
  for (int turn = 0; turn < 2; ++turn) {
    row[threadIdx.x] = v;
    __syncthreads();
    v = row[(threadIdx.x + 1) % blockDim.x];
    if (!kFaulty) __syncthreads();
  }
  to[threadIdx.x] = v;
}

// Wrong mask: the whole warp shuffles, the mask names half of it.
template <bool kFaulty>
__global__ void warp_total(const float* from, float* to) {
  float v = from[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFaulty ? 0x0000ffffu : 0xffffffffu, v, offset);
  to[threadIdx.x] = v;
}

// Wrong mask, other way round: lanes that have left are named.
template <bool kFaulty>
__global__ void half_total(const float* from, float* to) {
  if (threadIdx.x % 32 >= 16) return;
  float v = from[threadIdx.x];
  for (int offset = 8; offset > 0; offset /= 2) v += __shfl_xor_sync(kFaulty ? 0xffffffffu : 0x0000ffffu, v, offset);
  to[threadIdx.x] = v;
}

// A barrier inside a branch that not every thread takes.
template <bool kFaulty>
__global__ void divergent(const float* from, float* to) {
  if (kFaulty && threadIdx.x >= 32) return;
  __syncthreads();
  to[threadIdx.x] = from[threadIdx.x];
}

// Shared memory that one element of is never written.
template <bool kFaulty>
__global__ void unwritten(const float* from, float* to) {
  __shared__ float row[256];
  if (!kFaulty || threadIdx.x != 5) row[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = row[threadIdx.x];
}

// An array of a thread overrun by one.
template <bool kFaulty>
__global__ void local(const float* from, float* to) {
  float value[4];
  for (int i = 0; i < 4; ++i) value[i] = from[threadIdx.x] * i;
  float sum = 0.f;
  for (int i = 0; i < 4 + (kFaulty && to != nullptr); ++i) sum += value[i];
  to[threadIdx.x] = sum;
}

template <bool kFaulty>
bool run(int which, const float* from, float* to, int threads) {
  const auto go = [&](auto kernel) { return simt::launch(1, threads, 0, [&] { kernel(from, to); }); };
  switch (which) {
    case 0: return simt::launch((threads + 31) / 32, 32, 0, [&] { copy<kFaulty>(from, to, threads - 7); });
    case 1: return go(rotate<kFaulty>);
    case 2: return go(rotate_twice<kFaulty>);
    case 3: return go(warp_total<kFaulty>);
    case 4: return go(half_total<kFaulty>);
    case 5: return go(divergent<kFaulty>);
    case 6: return go(unwritten<kFaulty>);
    default: return go(local<kFaulty>);
  }
}

}  // namespace

extern "C" int planted_run(int which, int faulty, const float* from, float* to, int threads) {
  return faulty ? run<true>(which, from, to, threads) : run<false>(which, from, to, threads);
}
