// CPU launcher of decode_attention, region_attention's path for few query rows per sequence.
#include "cpu/decode.h"

#include "cpu/attention_guard.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

constexpr int64_t kMinSplit = 256;       // keys: fewer do not pay for the merge
constexpr int64_t kMaxSplit = 4096;      // keys
constexpr int64_t kMaxScores = 1 << 16;  // of a piece, over its queries: they stay in L2

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                    bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                    int64_t window, double softcap, const MaybeTensor& sinks,
                                                    const MaybeTensor& region_bias, int64_t mass_rows) {
  DecodeArgs args{};
  set_attention(args, query, key, mass_rows, region_ids, num_regions, {scale, is_causal, kv_start, kv_end, window, softcap},
                region_bias);
  set_values(args, query, key, value, sinks);
  args.mass_rows = mass_rows;

  const int64_t groups = args.batch * args.kv_heads, queries = args.batch * args.length_q * args.heads;
  const int64_t wanted = groups ? (4 * torch::stable::get_num_threads() + groups - 1) / groups : 1;  // pieces, for balance
  const int64_t piece = (args.length_k + wanted - 1) / std::max<int64_t>(wanted, 1);
  const int64_t most = kMaxScores / std::max<int64_t>(1, args.length_q * args.heads / args.kv_heads);
  args.split_keys = std::clamp(piece, kMinSplit, std::clamp(most, kMinSplit, kMaxSplit));
  args.splits = std::max<int64_t>(1, (args.length_k + args.split_keys - 1) / args.split_keys);
  args.partial_size = 2 + num_regions + (args.dim + 63) / 64 * 64;  // any ISA's pair divides 64
  const Tensor partials = empty_float({queries * args.splits, args.partial_size});
  args.partials = data_of<float>(partials);

  Tensor out = empty_heads(query);
  Tensor lse = empty_float({args.batch, args.heads, args.length_q});
  Tensor mass = empty_float({args.batch, args.heads, mass_rows, num_regions});
  args.out = data_of<void>(out);
  args.lse = data_of<float>(lse);
  args.mass = mass_rows && region_ids ? data_of<float>(mass) : nullptr;

  auto* split = pick_decode_split();
  torch::stable::parallel_for(0, groups * args.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) split(args, item / args.splits, item % args.splits);
  });
  auto* merge = pick_decode_merge();
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (args.splits * args.partial_size));
  share_out(queries, grain, [&](int64_t begin, int64_t end) { merge(args, begin, end); });
  return {out, lse, mass};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace ras::cpu
