// CPU launcher of region_mass, key_attention and region_statistics: shapes, pointers and threads; the arithmetic is in the kernel file.
#include "cpu/attention_stats.h"

#include "cpu/attention_guard.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

constexpr int64_t kMinRows = 24;        // per work item of region_mass: enough to pay for packing a key block
constexpr int64_t kMinKeys = 128;       // per work item of the others: enough to pay for widening the queries
constexpr int64_t kMaxParts = 1 << 20;  // floats of masses that chunks of keys sum by themselves: 4 MB

AttentionStatsArgs common(const Tensor& query, const Tensor& key, const Tensor& lse, const MaybeTensor& region_ids,
                          int64_t num_regions, int64_t rows, const Masks& masks, const MaybeTensor& region_bias) {
  AttentionStatsArgs args{};
  set_attention(args, query, key, rows, region_ids, num_regions, masks, region_bias);
  args.lse = data_of<const float>(lse);
  args.rows = rows;
  return args;
}

// The LSE, contiguous.
Tensor guarded_lse(const Tensor& lse, const Tensor& query) {
  guard_lse(lse, query);
  return torch::stable::contiguous(lse);
}

// [0, length) of every group in chunks, as many as the threads need to share the work evenly.
struct Chunks {
  int64_t groups, length, size, count;

  Chunks(int64_t groups, int64_t length, int64_t least, int64_t most = INT64_MAX) : groups(groups), length(length) {
    const int64_t wanted = std::min<int64_t>(4 * torch::stable::get_num_threads() / groups + 1, most);
    size = std::max(least, (length + wanted - 1) / wanted);
    count = (length + size - 1) / size;
  }

  // Runs body(group, chunk, begin, end) for each.
  template <class Body>
  void run(const Body& body) const {
    torch::stable::parallel_for(0, groups * count, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t chunk = item % count, begin = chunk * size;
        body(item / count, chunk, begin, std::min(begin + size, length));
      }
    });
  }
};

Tensor zeros(std::initializer_list<int64_t> shape) {
  Tensor result = empty_float(shape);
  torch::stable::zero_(result);
  return result;
}

// How many chunks of the keys may sum masses [size] of their own.
int64_t most_chunks(int64_t size) { return 1 + kMaxParts / std::max<int64_t>(size, 1); }

// Scores, and masses where args.mass is set: the keys are shared out, and each chunk of them sums masses of its own.
void scan_keys(AttentionStatsArgs& args, const std::string& reduce, const Tensor& mass, const Tensor& scores) {
  args.scores = data_of<float>(scores);
  args.reduce = reduce_of(reduce);
  const int64_t groups = args.batch * args.kv_heads, size = mass.numel();
  if (args.rows == 0 || groups == 0 || args.length_k == 0) return;
  const Chunks chunks(groups, args.length_k, kMinKeys, most_chunks(size));
  const Tensor parts = zeros({chunks.count - 1, size});  // of every chunk but the first
  float *const total = data_of<float>(mass), *const part = data_of<float>(parts);
  auto* kernel = pick_attention_stats();
  chunks.run([&](int64_t group, int64_t chunk, int64_t begin, int64_t end) {
    kernel(args, {group, 0, args.rows, begin, end}, chunk == 0 ? total : part + (chunk - 1) * size);
  });
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
    for (int64_t i = 0; i < size; ++i) total[i] += part[(chunk - 1) * size + i];
}

}  // namespace

Tensor region_mass(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& region_ids, int64_t num_regions,
                   double scale, bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end, int64_t window,
                   double softcap, const MaybeTensor& region_bias, int64_t mass_rows) {
  const Tensor dense = guarded_lse(lse, query);
  AttentionStatsArgs args = common(query, key, dense, region_ids, num_regions, mass_rows,
                                   {scale, is_causal, kv_start, kv_end, window, softcap}, region_bias);
  args.mass = true;
  const Tensor mass = zeros({args.batch, args.heads, mass_rows, num_regions});
  const int64_t groups = args.batch * args.kv_heads;
  if (mass_rows == 0 || groups == 0) return mass;
  auto* kernel = pick_attention_stats();
  Chunks(groups, mass_rows, kMinRows).run([&](int64_t group, int64_t, int64_t begin, int64_t end) {
    kernel(args, {group, begin, end, 0, args.length_k}, data_of<float>(mass));
  });
  return mass;
}

Tensor key_attention(const Tensor& query, const Tensor& key, const Tensor& lse, int64_t rows, const std::string& reduce,
                     const MaybeTensor& region_ids, double scale, bool is_causal, const MaybeTensor& kv_start,
                     const MaybeTensor& kv_end, int64_t window, double softcap, const MaybeTensor& region_bias) {
  const Tensor dense = guarded_lse(lse, query);
  const int64_t num_regions = region_bias ? region_bias->size(region_bias->dim() - 1) : 0;
  AttentionStatsArgs args = common(query, key, dense, region_ids, num_regions, rows,
                                   {scale, is_causal, kv_start, kv_end, window, softcap}, region_bias);
  const Tensor scores = zeros({args.batch, args.heads, args.length_k});
  scan_keys(args, reduce, zeros({0}), scores);
  return scores;
}

std::tuple<Tensor, Tensor> region_statistics(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& region_ids,
                                             int64_t num_regions, int64_t rows, const std::string& reduce, double scale,
                                             bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                             int64_t window, double softcap, const MaybeTensor& region_bias) {
  const Tensor dense = guarded_lse(lse, query);
  AttentionStatsArgs args = common(query, key, dense, region_ids, num_regions, rows,
                                   {scale, is_causal, kv_start, kv_end, window, softcap}, region_bias);
  const int64_t size = args.batch * args.heads * rows * num_regions;
  if (args.batch * args.kv_heads * most_chunks(size) < torch::stable::get_num_threads()) {
    // Chunks too few for the threads: probabilities are taken twice, but by all of them.
    return {region_mass(query, key, dense, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap,
                        region_bias, rows),
            key_attention(query, key, dense, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, window, softcap,
                          region_bias)};
  }
  args.mass = true;
  const Tensor mass = zeros({args.batch, args.heads, rows, num_regions});
  const Tensor scores = zeros({args.batch, args.heads, args.length_k});
  scan_keys(args, reduce, mass, scores);
  return {mass, scores};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("region_mass", TORCH_BOX(&region_mass));
  m.impl("key_attention", TORCH_BOX(&key_attention));
  m.impl("region_statistics", TORCH_BOX(&region_statistics));
}

}  // namespace ras::cpu
