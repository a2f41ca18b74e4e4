// What every attention launcher refuses; ras_fast/ops/attention.py names the argument.
#pragma once

#include "cpu/tensor.h"

namespace ras::cpu {

inline void guard_attention(const Tensor& query, const Tensor& key, int64_t rows, const MaybeTensor& kv_start,
                            const MaybeTensor& kv_end, const MaybeTensor& region_ids, const MaybeTensor& region_bias) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && rows_contiguous(query) && rows_contiguous(key) &&
                      raw_dtype(query) == raw_dtype(key) && key.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                      key.size(1) > 0 && query.size(1) % key.size(1) == 0 && rows >= 0 && rows <= query.size(2),
                  "ras_fast attention: query must be [B, Hq, Lq, D] and key [B, Hkv, Lk, D] of the same dtype, Hkv a divisor of "
                  "Hq, rows in 0..Lq");
  const int64_t batch = query.size(0), heads = query.size(1);
  const int32_t int32 = aoti_torch_dtype_int32(), float32 = aoti_torch_dtype_float32();
  const auto bound = [&](const MaybeTensor& tensor) {
    return !tensor || (is(*tensor, int32, {batch}) && rows_contiguous(*tensor));
  };
  STD_TORCH_CHECK(bound(kv_start) && bound(kv_end), "ras_fast attention: kv_start and kv_end must be contiguous [B] int32");
  STD_TORCH_CHECK(!region_ids || (is(*region_ids, int32, {batch, key.size(2)}) && rows_contiguous(*region_ids)),
                  "ras_fast attention: region_ids must be [B, Lk] int32");
  if (!region_bias) return;
  const int64_t regions = region_bias->size(region_bias->dim() - 1);
  STD_TORCH_CHECK(region_ids && rows_contiguous(*region_bias) &&
                      (is(*region_bias, float32, {heads, regions}) || is(*region_bias, float32, {batch, heads, regions})),
                  "ras_fast attention: region_bias must be [Hq, R] or [B, Hq, R] float32, given with region_ids");
}

inline void guard_value(const Tensor& value, const Tensor& key) {
  STD_TORCH_CHECK(rows_contiguous(value) && same_sizes(key, value) && raw_dtype(key) == raw_dtype(value),
                  "ras_fast attention: value must be like key");
}

inline void guard_sinks(const MaybeTensor& sinks, const Tensor& query) {
  STD_TORCH_CHECK(!sinks || is(*sinks, aoti_torch_dtype_float32(), {query.size(1)}),
                  "ras_fast attention: sinks must be [Hq] float32");
}

inline void guard_lse(const Tensor& lse, const Tensor& query) {
  STD_TORCH_CHECK(is(lse, aoti_torch_dtype_float32(), {query.size(0), query.size(1), query.size(2)}),
                  "ras_fast attention: lse must be [B, Hq, Lq] float32");
}

// region_bias's pointer and strides, which every attention kernel's arguments have; a bias without a batch serves all.
template <class Args>
void set_region_bias(Args& args, const MaybeTensor& region_bias) {
  if (!region_bias) return;
  const bool batched = region_bias->dim() == 3;
  args.region_bias = data<const float>(region_bias);
  args.bias_batch_stride = batched ? region_bias->stride(0) : 0;
  args.bias_head_stride = region_bias->stride(batched ? 1 : 0);
}

}  // namespace ras::cpu
