// CUDA launcher of selected_region_mass, selected_key_attention and selected_statistics: scratch memory and launches; the kernels
// are in attention_stats.cuh. Which calls come here is decided in ras_fast/ops/attention_cuda.py.
#include "attention_stats.cuh"

#include <algorithm>

#include "attention_args.h"
#include "tensor.h"

namespace ras::cuda {
namespace {

template <typename T>
StatsArgs<T> stats_args(const Tensor& lse, const ScoreArgs<T>& score) {
  StatsArgs<T> a{};
  a.score = score;
  a.lse = data_of<const float>(lse);
  a.lse_stride = strides_of(lse);
  return a;
}

// How many blocks share the keys: as many as the device holds at once, while each warp has a step and the parts stay few.
int plan_shares(int64_t blocks, int per_multiprocessor, int keys, const Tensor& on) {
  const int64_t wanted = int64_t(per_multiprocessor) * device_of(on).multiprocessors / std::max<int64_t>(blocks, 1);
  return int(std::clamp<int64_t>(std::min<int64_t>(wanted, keys / (kBlockWarps * kStepKeys)), 1, 64));
}

// Calls start(), which leaves `parts` parts of the masses in a.part, and adds them up, where masses are wanted at all.
template <typename T, typename Start>
void with_mass_parts(StatsArgs<T>& a, int parts, const Tensor& mass, const Tensor& on, Start&& start) {
  const bool alone = parts == 1 || !mass.numel();
  const Tensor part = alone ? mass : new_float(on, {parts, mass.numel()});
  a.part = data_of<float>(part);
  start();
  if (alone) return;
  const SumArgs sum{a.part, data_of<float>(mass), mass.numel(), parts};
  launch(sum_parts, sum, unsigned((sum.size + kWarp - 1) / kWarp), kSumWarps * kWarp, 0, on);
}

template <typename T>
void run_mass(const Tensor& query, StatsArgs<T> a, const Tensor& mass) {
  const ScoreArgs<T>& score = a.score;
  const int64_t tiles = (score.packed_rows + kTileRows - 1) / kTileRows;
  a.splits = plan_shares(tiles * score.kv_heads * score.batch, mass_blocks(score.dim), score.keys, query);
  with_mass_parts(a, mass_parts(score.regions, a.splits), mass, query, [&] {
    with_mass_kernel<T>(score.dim, [&](auto kernel) {
      launch(kernel, a, dim3(unsigned(tiles * a.splits), score.kv_heads, score.batch), kBlockWarps * kWarp, 0, query);
    });
  });
}

template <typename T>
void run_keys(const Tensor& query, StatsArgs<T> a, Reduce reduce, const Tensor& mass, const Tensor& scores) {
  ScoreArgs<T>& score = a.score;
  const int rows = score.query_rows - score.first_row;
  score.pack = heads_side_by_side(rows, score.group);
  score.packed_rows = rows * score.pack;
  a.sets = score.group / score.pack;
  const bool masses = mass.numel() != 0;
  a.splits = plan_shares(int64_t(a.sets) * score.kv_heads * score.batch, key_blocks(score.dim, masses), score.keys, query);
  a.scores = data_of<float>(scores);
  a.reduce = reduce;
  with_mass_parts(a, a.splits * kBlockWarps, mass, query, [&] {
    with_key_kernel<T>(score.dim, masses, [&](auto kernel) {
      launch(kernel, a, dim3(unsigned(a.sets * a.splits), score.kv_heads, score.batch), kBlockWarps * kWarp, 0, query);
    });
  });
}

// (masses [B, Hq, rows, R] or, where they are not wanted, R = 0; scores [B, Hq, Lk])
std::tuple<Tensor, Tensor> statistics(const Tensor& query, const Tensor& key, const Tensor& lse, const MaybeTensor& region_ids,
                                      int64_t regions, bool masses, int64_t rows, const std::string& reduce, const Masks& masks,
                                      const MaybeTensor& region_bias) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor mass = new_float(query, {query.size(0), query.size(1), rows, masses ? regions : 0});
  const Tensor scores = new_float(query, {query.size(0), query.size(1), key.size(2)});
  if (mass.numel() + scores.numel() == 0) return {mass, scores};
  with_half_type(query, [&](auto zero) {
    using T = decltype(zero);
    const auto score = score_args<T>(query, key, region_ids, regions, masks, region_bias, rows);
    run_keys<T>(query, stats_args<T>(lse, score), reduce_of(reduce), mass, scores);
  });
  return {mass, scores};
}

}  // namespace

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
    const auto score = score_args<T>(query, key, region_ids, num_regions, masks, region_bias, mass_rows);
    run_mass<T>(query, stats_args<T>(lse, score), mass);
  });
  return mass;
}

Tensor selected_key_attention(const Tensor& query, const Tensor& key, const Tensor& lse, int64_t rows, const std::string& reduce,
                              const MaybeTensor& region_ids, double scale, bool is_causal, const MaybeTensor& kv_start,
                              const MaybeTensor& kv_end, int64_t window, double softcap, const MaybeTensor& region_bias) {
  const int64_t regions = region_bias ? region_bias->size(region_bias->dim() - 1) : 0;
  const Masks masks{scale, is_causal, kv_start, kv_end, window, softcap};
  return std::get<1>(statistics(query, key, lse, region_ids, regions, false, rows, reduce, masks, region_bias));
}

std::tuple<Tensor, Tensor> selected_statistics(const Tensor& query, const Tensor& key, const Tensor& lse,
                                               const Tensor& region_ids, int64_t num_regions, int64_t rows,
                                               const std::string& reduce, double scale, bool is_causal,
                                               const MaybeTensor& kv_start, const MaybeTensor& kv_end, int64_t window,
                                               double softcap, const MaybeTensor& region_bias) {
  const Masks masks{scale, is_causal, kv_start, kv_end, window, softcap};
  return statistics(query, key, lse, region_ids, num_regions, true, rows, reduce, masks, region_bias);
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) {
  m.impl("selected_region_mass", TORCH_BOX(&selected_region_mass));
  m.impl("selected_key_attention", TORCH_BOX(&selected_key_attention));
  m.impl("selected_statistics", TORCH_BOX(&selected_statistics));
}

}  // namespace ras::cuda
