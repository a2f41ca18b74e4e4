// CUDA launcher of decode_attention and selected_region_mass: shapes, scratch memory and launches; the kernels are in
// attention.cuh. Which calls come here is decided in ras_fast/ops/attention_plan.py.
#include "attention.cuh"

#include <algorithm>

#include "ops.h"

namespace ras::cuda {
namespace {

struct Masks {
  double scale;
  bool causal;
  const MaybeTensor &start, &end;
  int64_t window;
  double softcap;
};

template <typename T>
const T* data_of(const MaybeTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Whether bounds are [B, Lq], each row's own, and not [B].
bool is_per_row(const MaybeTensor& bounds) { return bounds && bounds->dim() == 2; }

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

AttentionStrides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

template <typename T>
ScoreArgs<T> score_args(const Tensor& query, const Tensor& key, const MaybeTensor& ids, int64_t regions, const Masks& masks,
                        const MaybeTensor& bias, int64_t rows) {
  STD_TORCH_CHECK(supports_head_dim(int(query.size(3))), "ras_fast: the CUDA attention kernels take a head dimension that is a "
                                                         "multiple of 8 and at most 256, not ", query.size(3));
  STD_TORCH_CHECK(key.size(1) <= 65535 && query.size(0) <= 65535, "ras_fast: batch or heads are too many for one launch");
  ScoreArgs<T> a{};
  a.query = static_cast<const T*>(query.const_data_ptr());
  a.key = static_cast<const T*>(key.const_data_ptr());
  a.query_stride = strides_of(query);
  a.key_stride = strides_of(key);
  a.region_ids = data_of<int32_t>(ids);
  a.kv_start = data_of<int32_t>(masks.start);
  a.kv_end = data_of<int32_t>(masks.end);
  a.region_bias = data_of<float>(bias);
  const bool own_bounds = is_per_row(masks.start) || is_per_row(masks.end);
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
  a.packed_rows = int(rows) * a.group;
  a.regions = int(regions);
  a.window = int(masks.window);
  a.causal = masks.causal;
  a.scale = float(masks.scale);
  a.softcap = float(masks.softcap);
  return a;
}

// Enough blocks to fill the device twice over, but at least two steps of keys for every warp of a block.
int plan_splits(int64_t blocks, int keys, const Tensor& on) {
  const int64_t wanted = 2 * device_of(on).multiprocessors / std::max<int64_t>(blocks, 1);
  const int64_t most = keys / (2 * kDecodeWarps * kStepKeys);
  return int(std::clamp<int64_t>(std::min(wanted, most), 1, 128));
}

template <typename T>
void run_decode(const Tensor& query, const Tensor& key, const Tensor& value, const ScoreArgs<T>& score,
                const MaybeTensor& sinks, int64_t mass_rows, const Tensor& out, const Tensor& lse, const Tensor& mass) {
  DecodeArgs<T> a{};
  a.score = score;
  a.value = static_cast<const T*>(value.const_data_ptr());
  a.value_stride = strides_of(value);
  a.out = static_cast<T*>(out.mutable_data_ptr());
  a.lse = floats_of(lse);
  a.mass = mass.numel() ? floats_of(mass) : nullptr;
  a.sinks = data_of<float>(sinks);
  a.mass_rows = int(mass_rows);
  with_decode_kernel<T>(score.dim, score.packed_rows, a.mass != nullptr, [&](auto kernel, int tile_rows) {
    const int64_t tiles = (score.packed_rows + tile_rows - 1) / tile_rows, blocks = tiles * score.kv_heads * score.batch;
    a.splits = plan_splits(blocks, score.keys, query);
    const int64_t rows = query.size(0) * query.size(1) * query.size(2), parts = a.splits > 1 ? a.splits * rows : 0;
    const Tensor part_out = new_float(query, {parts, score.dim}), part_lse = new_float(query, {parts});
    const Tensor part_mass = new_float(query, {a.mass ? parts : 0, score.regions});
    const Tensor slab = new_float(query, {a.mass ? blocks * a.splits * kDecodeWarps * tile_rows : 0, score.regions});
    a.part_out = floats_of(part_out);
    a.part_lse = floats_of(part_lse);
    a.part_mass = floats_of(part_mass);
    a.slab = floats_of(slab);
    launch(kernel, a, dim3(unsigned(tiles * a.splits), score.kv_heads, score.batch), kDecodeWarps * kWarp, 0, query);
    if (a.splits > 1) launch(merge_splits<T>, a, unsigned(rows), kDecodeWarps * kWarp, 0, query);
  });
}

template <typename T>
void run_mass(const Tensor& query, const Tensor& lse, const ScoreArgs<T>& score, const Tensor& mass) {
  MassArgs<T> a{};
  a.score = score;
  a.lse = static_cast<const float*>(lse.const_data_ptr());
  a.lse_stride = strides_of(lse);
  const int64_t tiles = (score.packed_rows + kTileRows - 1) / kTileRows;
  a.splits = plan_splits(tiles * score.kv_heads * score.batch, score.keys, query);
  const Tensor part = new_float(query, {a.splits * kDecodeWarps, mass.numel()});
  a.part = floats_of(part);
  with_mass_kernel<T>(score.dim, [&](auto kernel) {
    launch(kernel, a, dim3(unsigned(tiles * a.splits), score.kv_heads, score.batch), kDecodeWarps * kWarp, 0, query);
  });
  const SumArgs sum{a.part, floats_of(mass), mass.numel(), a.splits * kDecodeWarps};
  launch(sum_parts, sum, unsigned((sum.size + 255) / 256), 256, 0, query);
}

template <typename Run>
void with_half_type(const Tensor& tensor, Run&& run) {
  switch (dtype_of(tensor)) {
    case DType::kFloat16: return run(__half{});
    case DType::kBFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "ras_fast: the CUDA attention kernels take float16 or bfloat16 queries");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                    bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                    int64_t window, double softcap, const MaybeTensor& sinks,
                                                    const MaybeTensor& region_bias, int64_t mass_rows) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2);
  const int64_t dim = query.size(3);
  const std::tuple<Tensor, Tensor, Tensor> result{new_strided(query, {batch, heads, rows, dim},
                                                              {rows * heads * dim, dim, heads * dim, 1}, raw_dtype(query)),
                                                  new_float(query, {batch, heads, rows}),
                                                  new_float(query, {batch, heads, mass_rows, num_regions})};
  if (batch * heads * rows == 0) return result;
  const Masks masks{scale, is_causal, kv_start, kv_end, window, softcap};
  with_half_type(query, [&](auto zero) {
    using T = decltype(zero);
    const auto score = score_args<T>(query, key, region_ids, num_regions, masks, region_bias, rows);
    run_decode<T>(query, key, value, score, sinks, mass_rows, std::get<0>(result), std::get<1>(result), std::get<2>(result));
  });
  return result;
}

Tensor selected_region_mass(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& region_ids,
                            int64_t num_regions, double scale, bool is_causal, const MaybeTensor& kv_start,
                            const MaybeTensor& kv_end, int64_t window, double softcap, const MaybeTensor& region_bias,
                            int64_t mass_rows) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor mass = new_float(query, {query.size(0), query.size(1), mass_rows, num_regions});
  if (mass.numel() == 0) return mass;
  const Masks masks{scale, is_causal, kv_start, kv_end, window, softcap};
  with_half_type(query, [&](auto zero) {
    using T = decltype(zero);
    run_mass<T>(query, lse, score_args<T>(query, key, region_ids, num_regions, masks, region_bias, mass_rows), mass);
  });
  return mass;
}

}  // namespace ras::cuda
