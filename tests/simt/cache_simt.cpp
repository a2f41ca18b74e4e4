// The kernel of csrc/cuda/cache.cuh behind a C function: fills CacheArgs and launches as cache.cu does, without torch.
#include "cuda/cache.cuh"

using namespace ras::cuda;

// Mirrored by a ctypes structure in test_cache_simt.py: 8-byte fields only, so that there is nothing to pad.
struct Rows {
  const void* from;
  void* to;
  int64_t from_stride[3], to_stride[3], dim;
};
struct Call {
  Rows key, value;
  const int64_t* slots;
  int64_t slots_batch, slots_token, capacity, heads, batch, tokens, bytes;  // bytes: of an element
  int64_t width;                                                            // out: elements of an access
};

template <typename T>
static bool run(Call& c) {
  const auto rows = [](const Rows& r) {
    return CacheRows<T>{static_cast<const T*>(r.from), static_cast<T*>(r.to), r.from_stride[0], r.from_stride[1],
                        r.from_stride[2], r.to_stride[0], r.to_stride[1], r.to_stride[2], int(r.dim)};
  };
  const CacheArgs<T> a{rows(c.key), rows(c.value), c.slots, c.slots_batch, c.slots_token, c.capacity, int(c.heads), int(c.tokens)};
  c.width = cache_width(a);
  bool ok = false;
  with_cache_kernel(a, c.batch * c.tokens, [&](auto kernel, dim3 grid) {
    ok = simt::launch(grid, dim3(kCacheThreads), 0, [&] { kernel(a); });
  });
  return ok;
}

extern "C" int cache_run(Call* c) { return c->bytes == 2 ? run<uint16_t>(*c) : run<uint32_t>(*c); }
