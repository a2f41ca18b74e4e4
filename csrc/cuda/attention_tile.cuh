// A tile of query rows against keys, scored with tensor cores: what the attention kernels without shared memory have in common.
//
// Keys go from memory straight into mma fragments by 16-byte loads. Scores sum over head dimensions, so any order of them will do
// if queries use the same: a thread's 8 neighbouring dimensions of a key are its share of two mma steps.
//
// Framework-free.
#pragma once

#include <cmath>
#include <type_traits>

#include "mma.cuh"
#include "online_softmax.cuh"

namespace ras::cuda {

constexpr int kStepKeys = 16;   // keys a warp takes at a time
constexpr int kTileRows = 16;   // rows of an mma
constexpr int kBlockWarps = 4;

struct AttentionStrides {
  int64_t batch, head, row;  // in elements; the last dimension is contiguous
};

// What every kernel needs to score keys. `pack` query heads that share a key/value head lie side by side in a tile: its packed row r
// is query row first_row + r / pack of query head first_head + r % pack. pack divides `group`, the heads that share one, into sets.
template <typename T>
struct ScoreArgs {
  const T* query;
  const T* key;
  AttentionStrides query_stride, key_stride;
  const int32_t* region_ids;  // [B, Lk]; null: no regions
  const int32_t* kv_start;    // [B] or [B, Lq], or null
  const int32_t* kv_end;      // likewise
  const float* region_bias;   // [B, Hq, R] by strides, or null
  int64_t ids_batch_stride, bias_batch_stride, bias_head_stride;
  int64_t bounds_batch_stride, bounds_row_stride;  // row stride 0: the rows of a batch element share their valid keys
  int batch, kv_heads, group, dim;
  int query_rows, keys;       // Lq, Lk
  int first_row, packed_rows; // packed_rows = (Lq - first_row) * pack
  int regions, window;        // window 0: none
  bool causal;
  float scale, softcap;       // base-2 scores are scale q k, or softcap tanh(scale q k) unless softcap is 0: see set_scale
  int pack;                   // last, where padding would be: one more word before it, and sm_100 spills in decode
};

// ------------------------------------------------------------------------------------------------------- scoring

struct Place {
  int head, row;
};

// A tile of 16 packed rows: lane (g, c) of a warp owns rows g and g + 8, and in a step the keys
// 8 t + 2 c and 8 t + 2 c + 1 for t = 0, 1. Rows from 8 on exist only with kRowTiles == 2.
// kRowBounds: whether rows may have valid keys of their own.
template <typename T, int kDim, int kRowTiles, bool kRowBounds>
struct Tile {
  static constexpr int kLoads = kDim / 32;  // 16-byte loads of a key by its four lanes

  const ScoreArgs<T>& args;
  const T* keys;             // of this batch element and head
  const int32_t* ids;
  int lane, g, c, batch, first_head, tile_row;
  int before[kRowTiles];     // query rows before those of this lane
  int start, end;            // keys that are valid for some row of the tile; before take_rows: for the first row
  int low, high;             // keys that some row of the tile sees
  int full_low, full_high;   // keys that every row sees
  uint4 query[kRowTiles][kLoads];

  __device__ int packed(int half) const { return tile_row + g + 8 * half; }
  __device__ bool exists(int half) const { return packed(half) < args.packed_rows; }
  // How many query rows lie before that of a packed row. With a single one, as in most of decode, nothing need be divided.
  __device__ int rows_before(int packed) const {
    return args.packed_rows == args.pack ? 0 : int(unsigned(packed) / unsigned(args.pack));
  }
  __device__ Place place(int packed, int before) const {
    return {first_head + packed - before * args.pack, args.first_row + before};
  }
  __device__ Place place(int packed) const { return place(packed, rows_before(packed)); }
  __device__ Place own_place(int half) const { return place(packed(half), before[half]); }
  __device__ int limit(int row) const { return row + end - args.query_rows; }
  __device__ int64_t bound(int row) const {
    return kRowBounds ? batch * args.bounds_batch_stride + row * args.bounds_row_stride : batch;
  }
  __device__ int first_valid(int row) const { return args.kv_start ? max(args.kv_start[bound(row)], 0) : 0; }
  __device__ int end_valid(int row) const { return args.kv_end ? min(args.kv_end[bound(row)], args.keys) : args.keys; }
  __device__ bool in_dim(int d) const { return d < args.dim; }

  __device__ Tile(const ScoreArgs<T>& args, int batch, int kv_head, int set = 0)
      : args(args), lane(threadIdx.x % kWarp), g(lane / 4), c(lane % 4), batch(batch) {
    first_head = kv_head * args.group + set * args.pack;
    keys = args.key + batch * args.key_stride.batch + kv_head * args.key_stride.head;
    ids = args.region_ids ? args.region_ids + batch * args.ids_batch_stride : nullptr;
    start = first_valid(args.first_row);
    end = end_valid(args.first_row);
  }

  __device__ void move_to(int at) {
    tile_row = at;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) before[half] = rows_before(packed(half));
  }

  // The tile that begins at packed row `at`.
  __device__ void take_rows(int at) {
    move_to(at);
    const int first = place(tile_row).row, last = place(min(tile_row + 8 * kRowTiles, args.packed_rows) - 1).row;
    start = full_low = first_valid(first);
    end = full_high = end_valid(first);
#pragma unroll 1
    for (int r = first + 1; kRowBounds && args.bounds_row_stride && r <= last; ++r) {
      const int valid = first_valid(r), past = end_valid(r);
      start = min(start, valid), full_low = max(full_low, valid);
      end = max(end, past), full_high = min(full_high, past);
    }
    low = start;
    high = end;
    if (args.causal) {
      high = min(end, limit(last) + 1);
      full_high = min(end, limit(first) + 1);
    }
    if (args.window) {
      low = max(start, limit(first) - args.window + 1);
      full_low = max(start, limit(last) - args.window + 1);
    }
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      const auto [head, row] = own_place(half);
      const T* from = args.query + batch * args.query_stride.batch + head * args.query_stride.head +
                      row * args.query_stride.row + 8 * c;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) query[half][i] = load_apart(from + 32 * i, exists(half) & in_dim(32 * i + 8 * c));
    }
  }

  // The key itself, or another in the place of one that no row may see and whose score is masked: loads need no condition then.
  __device__ int64_t valid_key(int key) const { return max(min(max(key, start), end - 1), 0); }

  __device__ void load_keys(uint4 (&fragment)[2][kLoads], int step) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const T* from = keys + valid_key(step + 8 * t + g) * args.key_stride.row + 8 * c;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) fragment[t][i] = load_eight(from + 32 * i, in_dim(32 * i + 8 * c));
    }
  }

  // The id of key `step + lane % 16`, not looked at yet: a test here would wait for it before the products that do not need it.
  __device__ int load_id(int step) const { return ids[valid_key(step + lane % kStepKeys)]; }
  // The region that it means; ids outside 0 .. regions - 1 count as none.
  __device__ int region_of(int id) const { return id >= 0 && id < args.regions ? id : -1; }

  // Base-2 scores of a step, -inf where masked: s[half][2 t + e] for row g + 8 half and key 8 t + 2 c + e.
  __device__ void score(float (&s)[kRowTiles][4], const uint4 (&fragment)[2][kLoads], int step, int id) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint4 q = query[0][i], r = kRowTiles == 2 ? query[kRowTiles - 1][i] : uint4{0, 0, 0, 0}, k = fragment[t][i];
        mma_16x8x16<T>(sum, {q.x, r.x, q.y, r.y}, {k.x, k.y});
        mma_16x8x16<T>(sum, {q.z, r.z, q.w, r.w}, {k.z, k.w});
      }
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
        s[half][2 * t] = sum[2 * half];
        s[half][2 * t + 1] = sum[2 * half + 1];
      }
    }
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[half][i] *= args.scale;
    }
    if (args.softcap != 0.f) cap(s);
    if (args.region_bias) add_bias(s, id);
    if (step < full_low || step + kStepKeys > full_high) mask(s, step);
  }

  // Where score i of a lane lies among the keys of a step.
  __device__ int offset(int i) const { return 8 * (i / 2) + 2 * c + i % 2; }

  // The steps of score() that few calls or few steps need, each behind one test.
  __device__ void cap(float (&s)[kRowTiles][4]) const {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[half][i] = args.softcap * tanhf(s[half][i]);
    }
  }

  __device__ void add_bias(float (&s)[kRowTiles][4], int id) const {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      const Place at = place(packed(half), in_place(before[half]));
      const float* bias = args.region_bias + batch * args.bias_batch_stride + at.head * args.bias_head_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int region = region_of(__shfl_sync(kFullWarp, id, offset(i)));
        if (region >= 0 && exists(half)) s[half][i] += kLog2e * bias[region];
      }
    }
  }

  __device__ void mask(float (&s)[kRowTiles][4], int step) const {
    const bool alike = !kRowBounds || !args.bounds_row_stride;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      const int r = min(place(packed(half), in_place(before[half])).row, args.query_rows - 1);
      int first = alike ? start : first_valid(r), past = alike ? end : end_valid(r);
      if (args.causal) past = min(past, limit(r) + 1);
      if (args.window) first = max(first, limit(r) - args.window + 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = step + offset(i);
        if (key < first || key >= past) s[half][i] = -INFINITY;
      }
    }
  }
};

// The steps [first, last) of a split, in units of 16 keys, counted from the step in which `low` lies.
struct SplitSteps {
  int first, last;
  __device__ SplitSteps(int low, int high, int split, int splits) {
    const int begin = low / kStepKeys, steps = low < high ? (high + kStepKeys - 1) / kStepKeys - begin : 0;
    const int share = unsigned(steps + splits - 1) / unsigned(splits);
    first = begin + min(split * share, steps);
    last = begin + min((split + 1) * share, steps);
  }
};

// ------------------------------------------------------------------------------------------------------------ host

template <typename T>
void set_scale(ScoreArgs<T>& args, float scale, float softcap) {
  args.scale = softcap == 0.f ? scale * kLog2e : scale / softcap;
  args.softcap = softcap * kLog2e;
}

// Whether these kernels take such tensors: whole 16-byte loads need a head dimension of whole eights.
constexpr bool supports_head_dim(int dim) { return dim % 8 == 0 && dim <= 256; }

// Calls use(an integral constant): the kDim of the kernels that take this head dimension.
template <typename Use>
void with_width(int dim, Use&& use) {
  if (dim <= 64) return use(std::integral_constant<int, 64>{});
  if (dim <= 96) return use(std::integral_constant<int, 96>{});
  if (dim <= 128) return use(std::integral_constant<int, 128>{});
  use(std::integral_constant<int, 256>{});
}

}  // namespace ras::cuda
