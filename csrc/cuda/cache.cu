// CUDA launcher of write_cache_: shapes, pointers and the launch; the kernel is in cache.cuh.
#include "cache.cuh"

#include "common/cache.h"
#include "tensor.h"

namespace ras::cuda {
namespace {

template <typename T>
CacheRows<T> rows_of(const Tensor& cache, const Tensor& fresh) {
  return {data_of<const T>(fresh), data_of<T>(cache),   fresh.stride(0), fresh.stride(1), fresh.stride(2),
          cache.stride(0),         cache.stride(1),     cache.stride(2), int(fresh.size(3))};
}

template <typename T>
void run(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& key, const Tensor& value) {
  const CacheArgs<T> args{rows_of<T>(keys, key), rows_of<T>(values, value), data_of<const int64_t>(slots), slots.stride(0),
                          slots.stride(1),       keys.size(2),              int(keys.size(1)),             int(slots.size(1))};
  with_cache_kernel(args, slots.numel(), [&](auto kernel, dim3 grid) { launch(kernel, args, grid, kCacheThreads, 0, keys); });
}

}  // namespace

void write_cache(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& key, const Tensor& value) {
  const bool slots_beside = slots.is_cuda() && slots.get_device_index() == keys.get_device_index();
  guard_cache(keys, values, slots, key, value, slots_beside, [&](const Tensor& tensor) { return rows_beside(keys, tensor); });
  STD_TORCH_CHECK(slots.numel() < (int64_t(1) << 31) && keys.size(1) * (key.size(3) + value.size(3)) <= 65535 * kCacheThreads,
                  "ras_fast cache: tokens or heads are too many for one launch");
  if (key.numel() + value.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  keys.element_size() == 2 ? run<uint16_t>(keys, values, slots, key, value) : run<uint32_t>(keys, values, slots, key, value);
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) { m.impl("write_cache_", TORCH_BOX(&write_cache)); }

}  // namespace ras::cuda
