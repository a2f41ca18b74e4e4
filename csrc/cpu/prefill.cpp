// CPU launcher of prefill_attention, region_attention's path for many query rows.
#include "cpu/prefill.h"

#include "cpu/attention_guard.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

constexpr int64_t kMostRows = 256;  // of a tile, over the heads of a group: their queries and outputs stay in L2
constexpr int64_t kLeastRows = 48;  // fewer do not pay for widening a block of keys

// Tiles of a group in an order in which neighbours together have as much to do as any others under a causal mask.
int64_t balanced(int64_t item, int64_t tiles) { return item % 2 ? tiles - 1 - item / 2 : item / 2; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> prefill_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                     bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                     int64_t window, double softcap, const MaybeTensor& sinks,
                                                     const MaybeTensor& region_bias, int64_t mass_rows) {
  PrefillArgs args{};
  set_attention(args, query, key, mass_rows, region_ids, num_regions, {scale, is_causal, kv_start, kv_end, window, softcap},
                region_bias);
  set_values(args, query, key, value, sinks);
  args.mass_rows = mass_rows;

  const int64_t batch = args.batch, heads = args.heads, rows = args.length_q;
  Tensor out = empty_heads(query);
  Tensor lse = empty_float({batch, heads, rows});
  Tensor mass = empty_float({batch, heads, mass_rows, num_regions});
  args.out = data_of<void>(out);
  args.lse = data_of<float>(lse);
  args.mass = mass.numel() ? data_of<float>(mass) : nullptr;

  const int64_t groups = batch * args.kv_heads, per_group = heads / args.kv_heads;
  if (groups * rows == 0 || heads == 0) return {out, lse, mass};
  const int64_t wanted = 4 * torch::stable::get_num_threads() / groups + 1;  // tiles of a group, for balance
  const int64_t packed = std::clamp(per_group * rows / wanted, kLeastRows, kMostRows);
  const int64_t tile = std::max<int64_t>(1, packed / per_group), tiles = (rows + tile - 1) / tile;
  auto* kernel = pick_prefill();
  torch::stable::parallel_for(0, groups * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = balanced(item % tiles, tiles) * tile;
      kernel(args, item / tiles, first, std::min(first + tile, rows));
    }
  });
  return {out, lse, mass};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("prefill_attention", TORCH_BOX(&prefill_attention));
}

}  // namespace ras::cpu
