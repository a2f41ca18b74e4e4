// The attention kernels of csrc/cuda behind C functions: fill the arguments and launch as attention_{decode,stats}.cu do.
#include "cuda/attention_decode.cuh"
#include "cuda/attention_stats.cuh"

using namespace ras::cuda;
using ras::Reduce;

// Mirrored by a ctypes structure in test_attention_simt.py: 8-byte fields only.
struct Call {
  const void *query, *key, *value;
  void* out;
  float *lse, *mass, *scores, *part_out, *part_lse, *part_mass, *slab;
  const int32_t *region_ids, *kv_start, *kv_end;
  const float *region_bias, *sinks;
  int64_t query_stride[3], key_stride[3], value_stride[3], lse_stride[3], bias_stride[2], ids_stride;
  int64_t half, batch, heads, kv_heads, dim, query_rows, keys, regions, mass_rows, window, causal, splits, own_bounds, reduce;
  double scale, softcap;
};

static AttentionStrides strides(const int64_t (&s)[3]) { return {s[0], s[1], s[2]}; }

template <typename T>
static ScoreArgs<T> score_args(const Call& c, int64_t rows) {
  ScoreArgs<T> a{};
  a.query = static_cast<const T*>(c.query);
  a.key = static_cast<const T*>(c.key);
  a.query_stride = strides(c.query_stride);
  a.key_stride = strides(c.key_stride);
  a.region_ids = c.region_ids;
  a.kv_start = c.kv_start;
  a.kv_end = c.kv_end;
  a.region_bias = c.region_bias;
  a.bounds_batch_stride = c.own_bounds ? c.query_rows : 1;
  a.bounds_row_stride = c.own_bounds;
  a.ids_batch_stride = c.ids_stride;
  a.bias_batch_stride = c.bias_stride[0];
  a.bias_head_stride = c.bias_stride[1];
  a.batch = int(c.batch);
  a.kv_heads = int(c.kv_heads);
  a.group = int(c.heads / c.kv_heads);
  a.dim = int(c.dim);
  a.query_rows = int(c.query_rows);
  a.keys = int(c.keys);
  a.first_row = int(c.query_rows - rows);
  a.pack = a.group;
  a.packed_rows = int(rows) * a.group;
  a.regions = int(c.regions);
  a.window = int(c.window);
  a.causal = c.causal != 0;
  set_scale(a, float(c.scale), float(c.softcap));
  return a;
}

template <typename T>
static bool decode(const Call& c) {
  DecodeArgs<T> a{};
  a.score = score_args<T>(c, c.query_rows);
  a.value = static_cast<const T*>(c.value);
  a.value_stride = strides(c.value_stride);
  a.out = static_cast<T*>(c.out);
  a.lse = c.lse;
  a.mass = c.mass;
  a.part_out = c.part_out;
  a.part_lse = c.part_lse;
  a.part_mass = c.part_mass;
  a.slab = c.slab;
  a.sinks = c.sinks;
  a.mass_rows = int(c.mass_rows);
  a.splits = int(c.splits);
  bool ok = false;
  with_decode_kernel<T>(a.score.dim, a.score.packed_rows, a.mass != nullptr, [&](auto kernel, int tile_rows) {
    const unsigned tiles = unsigned((a.score.packed_rows + tile_rows - 1) / tile_rows);
    ok = simt::launch(dim3(tiles * a.splits, unsigned(c.kv_heads), unsigned(c.batch)), dim3(kBlockWarps * kWarp), 0,
                      [&] { kernel(a); });
  });
  const unsigned rows = unsigned(c.batch * c.heads * c.query_rows);
  return ok && (a.splits == 1 || simt::launch(merge_grid(rows, c.dim), dim3(kMergeThreads), 0, [&] { merge_splits<T>(a); }));
}

template <typename T>
static StatsArgs<T> stats_args(const Call& c) {
  StatsArgs<T> a{};
  a.score = score_args<T>(c, c.mass_rows);
  a.lse = c.lse;
  a.lse_stride = strides(c.lse_stride);
  a.part = c.part_mass;
  a.splits = int(c.splits);
  return a;
}

static bool sum(const Call& c, int parts) {
  const SumArgs a{c.part_mass, c.mass, c.batch * c.heads * c.mass_rows * c.regions, parts};
  return simt::launch(dim3(unsigned((a.size + kWarp - 1) / kWarp)), dim3(kSumWarps * kWarp), 0, [&] { sum_parts(a); });
}

template <typename T>
static bool mass(const Call& c) {
  auto a = stats_args<T>(c);
  const int parts = mass_parts(a.score.regions, a.splits);
  if (parts == 1) a.part = c.mass;
  const unsigned tiles = unsigned((a.score.packed_rows + kTileRows - 1) / kTileRows);
  bool ok = false;
  with_mass_kernel<T>(a.score.dim, [&](auto kernel) {
    ok = simt::launch(dim3(tiles * a.splits, unsigned(c.kv_heads), unsigned(c.batch)), dim3(kBlockWarps * kWarp), 0,
                      [&] { kernel(a); });
  });
  return ok && (parts == 1 || sum(c, parts));
}

// Key scores, and the masses of the same rows where c.mass is set.
template <typename T>
static bool keys(const Call& c) {
  auto a = stats_args<T>(c);
  a.scores = c.scores;
  a.reduce = static_cast<Reduce>(c.reduce);
  a.score.pack = heads_side_by_side(int(c.mass_rows), a.score.group);
  a.score.packed_rows = int(c.mass_rows) * a.score.pack;
  a.sets = a.score.group / a.score.pack;
  bool ok = false;
  with_key_kernel<T>(a.score.dim, c.mass != nullptr, [&](auto kernel) {
    ok = simt::launch(dim3(a.sets * a.splits, unsigned(c.kv_heads), unsigned(c.batch)), dim3(kBlockWarps * kWarp), 0,
                      [&] { kernel(a); });
  });
  return ok && (!c.mass || sum(c, a.splits * kBlockWarps));
}

extern "C" int decode_plan(int64_t blocks, int64_t slots, int64_t keys) { return plan_decode(blocks, slots, int(keys)); }
extern "C" int decode_run(const Call* c) { return c->half ? decode<__half>(*c) : decode<__nv_bfloat16>(*c); }
extern "C" int mass_run(const Call* c) { return c->half ? mass<__half>(*c) : mass<__nv_bfloat16>(*c); }
extern "C" int keys_run(const Call* c) { return c->half ? keys<__half>(*c) : keys<__nv_bfloat16>(*c); }
