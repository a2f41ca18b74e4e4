// What every attention launcher refuses (ras_fast/ops/attention.py names the argument), and how it fills its kernel's arguments.
#pragma once

#include "common/masks.h"
#include "cpu/attention_args.h"
#include "cpu/tensor.h"

namespace ras::cpu {

inline void guard_attention(const Tensor& query, const Tensor& key, int64_t rows, const MaybeTensor& region_ids,
                            int64_t num_regions, const Masks& masks, const MaybeTensor& region_bias) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && rows_contiguous(query) && rows_contiguous(key) &&
                      raw_dtype(query) == raw_dtype(key) && key.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                      key.size(1) > 0 && query.size(1) % key.size(1) == 0 && rows >= 0 && rows <= query.size(2),
                  "ras_fast attention: query must be [B, Hq, Lq, D] and key [B, Hkv, Lk, D] of the same dtype, Hkv a divisor of "
                  "Hq, rows in 0..Lq");
  const int64_t batch = query.size(0), heads = query.size(1);
  const int32_t int32 = aoti_torch_dtype_int32(), float32 = aoti_torch_dtype_float32();
  const auto bound = [&](const MaybeTensor& tensor) {
    return !tensor || ((masks.per_row() ? is(*tensor, int32, {batch, query.size(2)}) : is(*tensor, int32, {batch})) &&
                       tensor->is_contiguous());
  };
  STD_TORCH_CHECK(bound(masks.start) && bound(masks.end),
                  "ras_fast attention: kv_start and kv_end must be contiguous int32, both [B] or both [B, Lq]");
  STD_TORCH_CHECK(!region_ids || (is(*region_ids, int32, {batch, key.size(2)}) && rows_contiguous(*region_ids)),
                  "ras_fast attention: region_ids must be [B, Lk] int32");
  STD_TORCH_CHECK(region_ids || num_regions == 0, "ras_fast attention: num_regions must be 0 without region_ids");
  STD_TORCH_CHECK(!region_bias || (region_ids && rows_contiguous(*region_bias) &&
                                   (is(*region_bias, float32, {heads, num_regions}) ||
                                    is(*region_bias, float32, {batch, heads, num_regions}))),
                  "ras_fast attention: region_bias must be [Hq, R] or [B, Hq, R] float32, given with region_ids");
}

inline void guard_lse(const Tensor& lse, const Tensor& query) {
  STD_TORCH_CHECK(is(lse, aoti_torch_dtype_float32(), {query.size(0), query.size(1), query.size(2)}),
                  "ras_fast attention: lse must be [B, Hq, Lq] float32");
}

// Guards and fills what every attention kernel's arguments have; rows: how many have their statistics taken.
inline void set_attention(AttentionArgs& args, const Tensor& query, const Tensor& key, int64_t rows,
                          const MaybeTensor& region_ids, int64_t num_regions, const Masks& masks,
                          const MaybeTensor& region_bias) {
  guard_attention(query, key, rows, region_ids, num_regions, masks, region_bias);
  args.dtype = dtype_of(query);
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.length_q = query.size(2);
  args.dim = query.size(3);
  args.kv_heads = key.size(1);
  args.length_k = key.size(2);
  args.query = data_of<const void>(query);
  args.key = data_of<const void>(key);
  for (int i = 0; i < 3; ++i) {
    args.query_stride[i] = query.stride(i);
    args.key_stride[i] = key.stride(i);
  }
  args.scale = float(masks.scale);
  args.softcap = float(masks.softcap);
  args.causal = masks.causal;
  args.window = masks.window;
  args.kv_start = data_of<const int32_t>(masks.start);
  args.kv_end = data_of<const int32_t>(masks.end);
  args.bound_rows = masks.per_row() ? args.length_q : 1;
  args.num_regions = num_regions;
  if (region_ids) {
    args.region_ids = data_of<const int32_t>(region_ids);
    args.region_stride = region_ids->stride(0);
  }
  if (!region_bias) return;
  const bool batched = region_bias->dim() == 3;  // a bias without a batch serves all
  args.region_bias = data_of<const float>(region_bias);
  args.bias_batch_stride = batched ? region_bias->stride(0) : 0;
  args.bias_head_stride = region_bias->stride(batched ? 1 : 0);
}

inline void set_values(ValueArgs& args, const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& sinks) {
  STD_TORCH_CHECK(rows_contiguous(value) && same_sizes(key, value) && raw_dtype(key) == raw_dtype(value) &&
                      (!sinks || (is(*sinks, aoti_torch_dtype_float32(), {query.size(1)}) && rows_contiguous(*sinks))),
                  "ras_fast attention: value must be like key, sinks contiguous [Hq] float32");
  args.value = data_of<const void>(value);
  for (int i = 0; i < 3; ++i) args.value_stride[i] = value.stride(i);
  args.sinks = data_of<const float>(sinks);
}

}  // namespace ras::cpu
