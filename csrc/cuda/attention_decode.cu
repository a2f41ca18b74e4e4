// CUDA launcher of decode_attention: scratch memory and launches; the kernel is in attention_decode.cuh. Which calls come here is
// decided in ras_fast/ops/attention_plan.py.
#include "attention_decode.cuh"

#include "attention_args.h"
#include "tensor.h"

namespace ras::cuda {
namespace {

template <typename T>
void run_decode(const Tensor& query, const Tensor& key, const Tensor& value, const ScoreArgs<T>& score,
                const MaybeTensor& sinks, int64_t mass_rows, const Tensor& out, const Tensor& lse, const Tensor& mass) {
  DecodeArgs<T> a{};
  a.score = score;
  a.value = data_of<const T>(value);
  a.value_stride = strides_of(value);
  a.out = data_of<T>(out);
  a.lse = data_of<float>(lse);
  a.mass = mass.numel() ? data_of<float>(mass) : nullptr;
  a.sinks = data_of<const float>(sinks);
  a.mass_rows = int(mass_rows);
  with_decode_kernel<T>(score.dim, score.packed_rows, a.mass != nullptr, [&](auto kernel, int tile_rows) {
    const int64_t tiles = (score.packed_rows + tile_rows - 1) / tile_rows, blocks = tiles * score.kv_heads * score.batch;
    a.splits = plan_decode(blocks, resident_blocks(kernel, kBlockWarps * kWarp, query), score.keys);
    const int64_t rows = query.size(0) * query.size(1) * query.size(2), parts = a.splits > 1 ? a.splits * rows : 0;
    const Tensor part_out = new_float(query, {parts, score.dim}), part_lse = new_float(query, {parts});
    const Tensor part_mass = new_float(query, {a.mass ? parts : 0, score.regions});
    const bool in_memory = a.mass && score.regions > kSharedRegions;
    const Tensor slab = new_float(query, {in_memory ? blocks * a.splits * kBlockWarps * tile_rows : 0, score.regions});
    a.part_out = data_of<float>(part_out);
    a.part_lse = data_of<float>(part_lse);
    a.part_mass = data_of<float>(part_mass);
    a.slab = data_of<float>(slab);
    launch(kernel, a, dim3(unsigned(tiles * a.splits), score.kv_heads, score.batch), kBlockWarps * kWarp, 0, query);
    if (a.splits > 1) launch(merge_splits<T>, a, merge_grid(rows, score.dim), kMergeThreads, 0, query);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                    bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                    int64_t window, double softcap, const MaybeTensor& sinks,
                                                    const MaybeTensor& region_bias, int64_t mass_rows) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const auto [out, lse, mass] = new_outputs(query, mass_rows, num_regions);
  if (lse.numel() == 0) return {out, lse, mass};
  const Masks masks{scale, is_causal, kv_start, kv_end, window, softcap};
  with_half_type(query, [&](auto zero) {
    using T = decltype(zero);
    const auto score = score_args<T>(query, key, region_ids, num_regions, masks, region_bias, query.size(2));
    run_decode<T>(query, key, value, score, sinks, mass_rows, out, lse, mass);
  });
  return {out, lse, mass};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace ras::cuda
