// CPU launcher of region_mass and key_attention: shapes, pointers and threads; the arithmetic is in the kernel file.
#include "cpu/attention_stats.h"

#include "cpu/attention_guard.h"
#include "cpu/tensor.h"
#include "ops.h"

namespace ras::cpu {
namespace {

constexpr int64_t kMinRows = 24;  // per work item: enough to pay for packing a key block
constexpr int64_t kKeys = 128;    // per work item of key_attention

AttentionStatsArgs common(const Tensor& query, const Tensor& key, const Tensor& lse, int64_t rows, double scale,
                          bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end, int64_t window,
                          double softcap, const MaybeTensor& region_bias) {
  AttentionStatsArgs args{};
  args.dtype = dtype_of(query);
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.length_q = query.size(2);
  args.dim = query.size(3);
  args.kv_heads = key.size(1);
  args.length_k = key.size(2);
  args.query = query.data_ptr();
  args.key = key.data_ptr();
  for (int i = 0; i < 3; ++i) {
    args.query_stride[i] = query.stride(i);
    args.key_stride[i] = key.stride(i);
  }
  args.lse = data<const float>(lse);
  args.rows = rows;
  args.scale = float(scale);
  args.softcap = float(softcap);
  args.causal = is_causal;
  args.window = window;
  args.kv_start = data<const int32_t>(kv_start);
  args.kv_end = data<const int32_t>(kv_end);
  set_region_bias(args, region_bias);
  if (region_bias) args.num_regions = region_bias->size(region_bias->dim() - 1);
  return args;
}

void set_regions(AttentionStatsArgs& args, const Tensor& region_ids) {
  args.region_ids = data<const int32_t>(region_ids);
  args.region_stride = region_ids.stride(0);
}

// Runs body(group, begin, end) over every group's [0, length) in chunks, on as many threads as there is work for.
template <class Body>
void for_chunks(int64_t groups, int64_t length, int64_t chunk, const Body& body) {
  const int64_t chunks = (length + chunk - 1) / chunk;
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item % chunks * chunk;
      body(item / chunks, begin, std::min(begin + chunk, length));
    }
  });
}

}  // namespace

Tensor region_mass(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& region_ids, int64_t num_regions,
                   double scale, bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end, int64_t window,
                   double softcap, const MaybeTensor& region_bias, int64_t mass_rows) {
  guard_attention(query, key, mass_rows, kv_start, kv_end, region_ids, region_bias);
  guard_lse(lse, query);
  const Tensor dense = torch::stable::contiguous(lse);
  AttentionStatsArgs args = common(query, key, dense, mass_rows, scale, is_causal, kv_start, kv_end, window, softcap, region_bias);
  Tensor mass = empty_float({args.batch, args.heads, mass_rows, num_regions});
  torch::stable::zero_(mass);
  set_regions(args, region_ids);
  args.num_regions = num_regions;
  args.mass = data<float>(mass);
  const int64_t groups = args.batch * args.kv_heads;
  if (mass_rows == 0 || groups == 0) return mass;
  const int64_t wanted = 4 * torch::stable::get_num_threads() / groups + 1;  // chunks a group, to balance the threads
  const int64_t chunk = std::max(kMinRows, (mass_rows + wanted - 1) / wanted);
  auto* kernel = pick_mass_of_rows();
  for_chunks(groups, mass_rows, chunk, [&](int64_t group, int64_t begin, int64_t end) { kernel(args, group, begin, end); });
  return mass;
}

Tensor key_attention(const Tensor& query, const Tensor& key, const Tensor& lse, int64_t rows, const std::string& reduce,
                     const MaybeTensor& region_ids, double scale, bool is_causal, const MaybeTensor& kv_start,
                     const MaybeTensor& kv_end, int64_t window, double softcap, const MaybeTensor& region_bias) {
  guard_attention(query, key, rows, kv_start, kv_end, region_ids, region_bias);
  guard_lse(lse, query);
  const Tensor dense = torch::stable::contiguous(lse);
  AttentionStatsArgs args = common(query, key, dense, rows, scale, is_causal, kv_start, kv_end, window, softcap, region_bias);
  Tensor scores = empty_float({args.batch, args.heads, args.length_k});
  torch::stable::zero_(scores);
  if (region_ids) set_regions(args, *region_ids);
  args.scores = data<float>(scores);
  args.reduce = reduce == "mean" ? Reduce::mean : reduce == "sum" ? Reduce::sum : Reduce::max;
  const int64_t groups = args.batch * args.kv_heads;
  if (rows == 0 || groups == 0 || args.length_k == 0) return scores;
  auto* kernel = pick_scores_of_keys();
  for_chunks(groups, args.length_k, kKeys, [&](int64_t group, int64_t begin, int64_t end) { kernel(args, group, begin, end); });
  return scores;
}

}  // namespace ras::cpu
