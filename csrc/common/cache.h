// What the launchers of write_cache_ on every device refuse.
#pragma once

#include "common/tensor.h"

namespace ras {

// beside(tensor): whether it lies on the launcher's device with a contiguous last dimension.
template <class Beside>
void guard_cache(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& key, const Tensor& value,
                 bool slots_beside, const Beside& beside) {
  STD_TORCH_CHECK(keys.dim() == 4 && beside(keys) && values.dim() == 4 && beside(values),
                  "ras_fast cache: keys and values must be [B, H, C, D] on this device with a contiguous last dimension");
  dtype_of(keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), capacity = keys.size(2);
  const auto like_keys = [&](const Tensor& tensor, const std::vector<int64_t>& sizes) {
    return beside(tensor) && raw_dtype(tensor) == raw_dtype(keys) && std::ranges::equal(tensor.sizes(), sizes);
  };
  STD_TORCH_CHECK(like_keys(values, {batch, heads, capacity, values.size(3)}),
                  "ras_fast cache: values must be [B, H, C, Dv], like keys");
  STD_TORCH_CHECK(slots_beside && slots.dim() == 2 && slots.size(0) == batch && raw_dtype(slots) == aoti_torch_dtype_int64(),
                  "ras_fast cache: slots must be int64 [B, T] on this device");
  STD_TORCH_CHECK(like_keys(key, {batch, heads, slots.size(1), keys.size(3)}) &&
                      like_keys(value, {batch, heads, slots.size(1), values.size(3)}),
                  "ras_fast cache: key and value must be [B, H, T, D], like keys and values");
}

}  // namespace ras
