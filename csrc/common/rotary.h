// What the launchers of rotary_embedding on every device refuse.
#pragma once

#include "common/tensor.h"

namespace ras {

// beside(tensor): whether it lies on the launcher's device with a contiguous last dimension.
template <class Beside>
void guard_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, const Beside& beside) {
  STD_TORCH_CHECK(query.dim() == 4 && beside(query) && query.size(3) > 0,
                  "ras_fast rotary: query must be [B, Hq, L, D] on this device with a contiguous last dimension");
  const auto is = [&](const Tensor& tensor, const std::vector<int64_t>& sizes) {
    return beside(tensor) && std::ranges::equal(tensor.sizes(), sizes);
  };
  const int64_t batch = query.size(0), length = query.size(2), dim = query.size(3);
  STD_TORCH_CHECK(key.dim() == 4 && raw_dtype(key) == raw_dtype(query) && is(key, {batch, key.size(1), length, dim}),
                  "ras_fast rotary: key must be [B, Hkv, L, D], like query");
  const int64_t rotated = cos.dim() == 3 ? cos.size(2) : 0;
  STD_TORCH_CHECK(rotated > 0 && rotated <= dim && rotated % 2 == 0,
                  "ras_fast rotary: cos must be [B or 1, L, r] with r even and 0 < r <= D");
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK(is(*table, {batch, length, rotated}) || is(*table, {1, length, rotated}),
                    "ras_fast rotary: cos and sin must be [B or 1, L, r]");
  }
  STD_TORCH_CHECK(raw_dtype(cos) == raw_dtype(sin) && (raw_dtype(cos) == raw_dtype(query) || dtype_of(cos) == DType::f32),
                  "ras_fast rotary: cos and sin must both be like query or both float32");
}

}  // namespace ras
