// Host side that the attention launchers share: arguments from tensors, and the outputs.
#pragma once

#include "attention_tile.cuh"
#include "common/masks.h"
#include "tensor.h"

namespace ras::cuda {

inline AttentionStrides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

template <typename T>
ScoreArgs<T> score_args(const Tensor& query, const Tensor& key, const MaybeTensor& ids, int64_t regions, const Masks& masks,
                        const MaybeTensor& bias, int64_t rows) {
  STD_TORCH_CHECK(supports_head_dim(int(query.size(3))), "ras_fast: the CUDA attention kernels take a head dimension that is a "
                                                         "multiple of 8 and at most 256, not ", query.size(3));
  STD_TORCH_CHECK(key.size(1) <= 65535 && query.size(0) <= 65535, "ras_fast: batch or heads are too many for one launch");
  ScoreArgs<T> a{};
  a.query = data_of<const T>(query);
  a.key = data_of<const T>(key);
  a.query_stride = strides_of(query);
  a.key_stride = strides_of(key);
  a.region_ids = data_of<const int32_t>(ids);
  a.kv_start = data_of<const int32_t>(masks.start);
  a.kv_end = data_of<const int32_t>(masks.end);
  a.region_bias = data_of<const float>(bias);
  const bool own_bounds = masks.per_row();
  a.bounds_batch_stride = own_bounds ? query.size(2) : 1;
  a.bounds_row_stride = own_bounds;
  a.ids_batch_stride = ids ? ids->stride(0) : 0;
  if (bias) {
    a.bias_batch_stride = bias->dim() == 3 ? bias->stride(0) : 0;
    a.bias_head_stride = bias->stride(bias->dim() - 2);
  }
  a.batch = int(query.size(0));
  a.kv_heads = int(key.size(1));
  a.group = int(query.size(1) / key.size(1));
  a.dim = int(query.size(3));
  a.query_rows = int(query.size(2));
  a.keys = int(key.size(2));
  a.first_row = int(query.size(2) - rows);
  a.pack = a.group;
  a.packed_rows = int(rows) * a.group;
  a.regions = int(regions);
  a.window = int(masks.window);
  a.causal = masks.causal;
  set_scale(a, float(masks.scale), float(masks.softcap));
  return a;
}

// What attention writes: out [B, Hq, Lq, D], laid out as [B, Lq, Hq, D], LSE [B, Hq, Lq] and masses [B, Hq, mass_rows, R].
inline std::tuple<Tensor, Tensor, Tensor> new_outputs(const Tensor& query, int64_t mass_rows, int64_t regions) {
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2);
  return {new_heads(query), new_float(query, {batch, heads, rows}), new_float(query, {batch, heads, mass_rows, regions})};
}

template <typename Run>
void with_half_type(const Tensor& tensor, Run&& run) {
  switch (dtype_of(tensor)) {
    case DType::f16: return run(__half{});
    case DType::bf16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "ras_fast: the CUDA attention kernels take float16 or bfloat16 queries");
  }
}

}  // namespace ras::cuda
