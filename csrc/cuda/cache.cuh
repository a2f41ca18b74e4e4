// New keys and values into their slots of a cache, both in one launch: a thread moves 16 bytes of a head, or an element where
// rows are aligned otherwise.
//
// Framework-free: cache.cu is the launcher.
#pragma once

#include "common.cuh"

namespace ras::cuda {

// New rows [B, H, T, D] and where they go, [B, H, C, D]; strides in elements.
template <typename T>
struct CacheRows {
  const T* from;
  T* to;
  int64_t from_batch, from_head, from_token, to_batch, to_head, to_slot;
  int dim;
};

// T: a type of the elements' size; what they mean is nothing to a copy.
template <typename T>
struct CacheArgs {
  CacheRows<T> key, value;
  const int64_t* slots;  // [B, T]
  int64_t slots_batch, slots_token;
  int64_t capacity;
  int heads, tokens;
};

constexpr int kCacheThreads = 256;

// Grid (B·T tokens, accesses of all heads' keys and then values / kCacheThreads, rounded up). kVec: elements of an access.
template <typename T, int kVec>
__global__ void __launch_bounds__(kCacheThreads) write_cache_kernel(const __grid_constant__ CacheArgs<T> args) {
  using Access = Pack<T, kVec>;
  int index = blockIdx.y * kCacheThreads + threadIdx.x;
  const int keys = args.heads * (args.key.dim / kVec);
  const bool is_value = index >= keys;
  const CacheRows<T>& rows = is_value ? args.value : args.key;
  if (is_value) index -= keys;
  const int pieces = rows.dim / kVec, head = pieces ? index / pieces : args.heads, first = (index - head * pieces) * kVec;
  allow_next_kernel();
  wait_for_previous_kernel();  // also by threads without work: the kernel after this one waits for this one alone
  if (head >= args.heads) return;
  const int batch = blockIdx.x / unsigned(args.tokens), token = blockIdx.x - batch * args.tokens;
  const int64_t slot = args.slots[batch * args.slots_batch + token * args.slots_token];
  if (slot < 0 || slot >= args.capacity) return;
  const T* from = rows.from + batch * rows.from_batch + head * rows.from_head + token * rows.from_token + first;
  T* to = rows.to + batch * rows.to_batch + head * rows.to_head + slot * rows.to_slot + first;
  *reinterpret_cast<Access*>(to) = *reinterpret_cast<const Access*>(from);
}

// ------------------------------------------------------------------------------------------------------------ host

// How many elements an access may hold: 16 bytes of them, where rows and bases are multiples of that.
template <typename T>
int cache_width(const CacheArgs<T>& args) {
  constexpr int kVec = kAccessBytes / sizeof(T);
  const auto whole = [](int64_t elements) { return elements % kVec == 0; };
  const auto based = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0; };
  const auto aligned = [&](const CacheRows<T>& r) {
    return based(r.from) && based(r.to) && whole(r.dim) && whole(r.from_batch) && whole(r.from_head) && whole(r.from_token) &&
           whole(r.to_batch) && whole(r.to_head) && whole(r.to_slot);
  };
  return aligned(args.key) && aligned(args.value) ? kVec : 1;
}

// Calls start(kernel, grid) for the instance that fits.
template <typename T, typename Start>
void with_cache_kernel(const CacheArgs<T>& args, int64_t tokens, Start&& start) {
  const int vec = cache_width(args), all = args.heads * (args.key.dim / vec + args.value.dim / vec);
  const dim3 grid(unsigned(tokens), unsigned((all + kCacheThreads - 1) / kCacheThreads));
  vec == 1 ? start(write_cache_kernel<T, 1>, grid) : start(write_cache_kernel<T, kAccessBytes / sizeof(T)>, grid);
}

}  // namespace ras::cuda
