// What selected query rows attend to, recomputed from the LSE that some attention has left: summed by region (region masses)
// and over the rows (what each key receives: the heat map).
//
// region_mass_kernel keeps a tile of rows in registers and walks the keys; it reads only steps in which some key has a region.
// All warps that share a tile take turns at the steps, so that even one short image is divided among all of them.
// key_attention_kernel keeps 16 keys in registers and walks the rows: what these keys receive is complete after the last row and
// is written once. It sums the masses of the same rows on the way where they are wanted as well. Up to 8 heads that share the keys
// go side by side where there are too few rows to fill a tile: the number divides 8, so that a lane's rows are all of one head.
//
// Framework-free: attention_stats.cu is the launcher.
#pragma once

#include "attention_tile.cuh"
#include "common/reduce.h"

namespace ras::cuda {

template <typename T>
struct StatsArgs {
  ScoreArgs<T> score;
  const float* lse;           // [B, Hq, Lq] by strides
  AttentionStrides lse_stride;
  float* part;                // masses: [parts, B, Hq, rows, R]
  float* scores;              // [B, Hq, Lk]
  int splits, sets;           // a set: score.pack query heads
  Reduce reduce;              // over the rows, to scores
};

// Blocks per multiprocessor, for the launch bounds: as many as the registers of each kernel allow.
constexpr int mass_blocks(int dim) { return dim > 128 ? 2 : 5; }
constexpr int key_blocks(int dim, bool mass) { return dim > 128 ? 2 : 5 - dim / 128 - mass; }

// The tile's rows: `shift` turns base-2 scores into probabilities, exp2(score - shift), which are 0 in rows that do not exist;
// `regions` adds to the warp's part of their masses.
template <typename T, typename Tile>
__device__ void open_rows(const StatsArgs<T>& args, const Tile& tile, int64_t part, float (&shift)[2],
                          RegionSums<2, false>& regions) {
  const ScoreArgs<T>& score = args.score;
  const int64_t heads = int64_t(score.kv_heads) * score.group, rows = score.query_rows - score.first_row;
  bool exists[2];
  for (int half = 0; half < 2; ++half) {
    exists[half] = tile.exists(half);
    const auto [head, row] = tile.own_place(half);
    const int64_t part_row = ((part * score.batch + tile.batch) * heads + head) * rows + row - score.first_row;
    regions.totals[half] = args.part + part_row * score.regions;
    const int64_t at = tile.batch * args.lse_stride.batch + head * args.lse_stride.head + row * args.lse_stride.row;
    shift[half] = exists[half] ? finite_or_zero(args.lse[at] * kLog2e) : INFINITY;
  }
  regions.regions = score.regions;
  regions.begin(exists);
}

// ---------------------------------------------------------------------------------------------------- region mass

inline int mass_parts(int regions, int splits) { return regions <= kSharedRegions ? splits : splits * kBlockWarps; }

// Which of 32 steps first, first + apart, ... below `end` have a key with a region. All ids are on their way at once.
template <typename Tile>
__device__ unsigned steps_with_regions(const Tile& tile, int first, int apart, int end) {
  constexpr int kLoads = kStepKeys;  // a load brings two steps
  int ids[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int index = first + (2 * i + tile.lane / kStepKeys) * apart;
    ids[i] = index < end ? tile.region_of(tile.load_id(index * kStepKeys)) : -1;
  }
  unsigned found = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const unsigned keys = __ballot_sync(kFullWarp, ids[i] >= 0);
    found |= unsigned((keys & 0xffffu) != 0) << (2 * i) | unsigned(keys >> 16 != 0) << (2 * i + 1);
  }
  return found;
}

template <typename T, int kDim>
__device__ void prefetch_keys(const Tile<T, kDim, 2, false>& tile, int step) {
  constexpr int kLine = 128 / sizeof(T), kLines = (kDim + kLine - 1) / kLine;
  for (int i = tile.lane; i < kStepKeys * kLines; i += kWarp) {
    const int key = step + i / kLines, d = i % kLines * kLine;
    const bool ok = key >= tile.start && key < tile.end && tile.in_dim(d);
    if (ok) prefetch_l2(tile.keys + int64_t(key) * tile.args.key_stride.row + d);
  }
}

// Grid (row tiles * splits, Hkv, B), kBlockWarps warps that share a tile of 16 packed rows. Leaves mass_parts() parts.
template <typename T, int kDim>
__global__ void __launch_bounds__(kBlockWarps * kWarp, mass_blocks(kDim))
region_mass_kernel(const __grid_constant__ StatsArgs<T> args) {
  wait_for_previous_kernel();
  allow_next_kernel();  // sum_parts, which waits for this one's end: it need not wait for its launch as well
  __shared__ float sums[kBlockWarps][kTileRows * kSharedRegions];
  const ScoreArgs<T>& score = args.score;
  const int warp = threadIdx.x / kWarp, kv_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x % args.splits, tile_row = blockIdx.x / args.splits * kTileRows;
  const bool shared = score.regions <= kSharedRegions;
  Tile<T, kDim, 2, false> tile(score, batch, kv_head);
  tile.take_rows(tile_row);
  float shift[2], sum[2] = {};
  RegionSums<2, false> regions;
  open_rows(args, tile, shared ? split : split * kBlockWarps + warp, shift, regions);
  if (shared) {
    for (int half = 0; half < 2; ++half) regions.totals[half] = sums[warp] + (tile.g + 8 * half) * score.regions;
  }
  regions.clear();

  const int apart = kBlockWarps * args.splits, end = (tile.high + kStepKeys - 1) / kStepKeys;
  for (int first = tile.low / kStepKeys + warp * args.splits + split; first < end; first += kWarp * apart) {
    unsigned left = steps_with_regions(tile, first, apart, end);
    const auto lowest = [&](unsigned steps) { return (first + (__ffs(steps) - 1) * apart) * kStepKeys; };
    // Into L2 at once; registers for the keys of a second step would cost more warps than they gain.
    for (unsigned later = left & (left - 1); later != 0; later &= later - 1) prefetch_keys(tile, lowest(later));
    for (; left != 0; left &= left - 1) {
      const int step = lowest(left), id = tile.region_of(tile.load_id(step));
      uint4 keys[2][kDim / 32];
      tile.load_keys(keys, step);
      float p[2][4];
      tile.score(p, keys, step, id);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[half][i] = exp2_approximate(p[half][i] - shift[half]);
      }
      regions.add(p, id, sum, shift);
    }
  }
  regions.close(sum, shift);
  if (!shared) return;

  __syncthreads();
  const int64_t heads = int64_t(score.kv_heads) * score.group, rows = score.query_rows - score.first_row;
  // The split once more: kept through the loop, it would take the register that some chip lacks.
  const int64_t part = blockIdx.x - tile_row / kTileRows * args.splits;
  const int there = (min(score.packed_rows, tile_row + kTileRows) - tile_row) * score.regions;
  for (int i = threadIdx.x; i < there; i += kBlockWarps * kWarp) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) sum += sums[w][i];
    const int packed = tile_row + i / score.regions, head = tile.first_head + packed % score.pack;
    const int64_t row = ((part * score.batch + batch) * heads + head) * rows + packed / score.pack;
    args.part[row * score.regions + i % score.regions] = sum;
  }
}

// mass[i] = sum over parts of part[p, i]
struct SumArgs {
  const float* part;
  float* mass;
  int64_t size;
  int parts;
};

constexpr int kSumWarps = 8;

// A block for every 32 elements: its warps share the parts, which may be many more than the elements.
__global__ void __launch_bounds__(kSumWarps * kWarp) sum_parts(const __grid_constant__ SumArgs args) {
  wait_for_previous_kernel();
  __shared__ float sums[kSumWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0.f;
  if (i < args.size) {
#pragma unroll 8
    for (int p = warp; p < args.parts; p += kSumWarps) sum += args.part[p * args.size + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= args.size) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  args.mass[i] = sum;
}

// -------------------------------------------------------------------------------------------------- key attention

// The maximum, in which a NaN stays.
__device__ inline float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

// The packed rows [first, last), in whole tiles, that may see one of a step's keys.
struct SeeingRows {
  int first, last;
  template <typename Tile>
  __device__ SeeingRows(const Tile& tile, int step) {
    const auto& args = tile.args;
    const int past = tile.end - args.query_rows;  // row r's own key is r + past
    int low = args.first_row, high = args.query_rows;
    if (args.causal) low = max(low, step - past);
    if (args.window) high = min(high, step + kStepKeys - 1 + args.window - past);
    const bool none = step >= tile.end || step + kStepKeys <= tile.start;
    first = (low - args.first_row) * args.pack / kTileRows * kTileRows;
    last = none ? 0 : (high - args.first_row) * args.pack;
  }
};

// Grid (sets * splits, Hkv, B), kBlockWarps warps that take turns at the keys. kMass: masses of the same rows as well.
template <typename T, int kDim, bool kMass>
__global__ void __launch_bounds__(kBlockWarps * kWarp, key_blocks(kDim, kMass))
key_attention_kernel(const __grid_constant__ StatsArgs<T> args) {
  wait_for_previous_kernel();
  if constexpr (kMass) allow_next_kernel();  // sum_parts, likewise
  const ScoreArgs<T>& score = args.score;
  // The sets of a split, which read the same keys, run side by side.
  const int warp = threadIdx.x / kWarp, set = blockIdx.x % args.sets, split = blockIdx.x / args.sets, batch = blockIdx.z;
  const int64_t part = split * kBlockWarps + warp;
  Tile<T, kDim, 2, false> tile(score, batch, blockIdx.y, set);
  float shift[2];
  RegionSums<2, false> regions;
  if constexpr (kMass) {
    for (int row = 0; row < score.packed_rows; row += kTileRows) {
      tile.move_to(row);
      open_rows(args, tile, part, shift, regions);
      regions.clear();
    }
  }

  const SplitSteps steps(0, score.keys, split, args.splits);
  for (int index = steps.first + warp; index < steps.last; index += kBlockWarps) {
    const int step = index * kStepKeys, id = kMass || score.region_bias ? tile.region_of(tile.load_id(step)) : -1;
    const SeeingRows rows(tile, step);
    uint4 keys[2][kDim / 32];
    tile.load_keys(keys, step);
    float received[4] = {};  // by this lane's keys, from this lane's rows so far
    for (int row = rows.first; row < rows.last; row += kTileRows) {
      tile.take_rows(row);
      open_rows(args, tile, part, shift, regions);
      float p[2][4];
      tile.score(p, keys, step, id);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[half][i] = exp2_approximate(p[half][i] - shift[half]);
          received[i] = args.reduce == Reduce::max ? max_or_nan(received[i], p[half][i]) : received[i] + p[half][i];
        }
      }
      if constexpr (kMass) {
        float sum[2] = {};
        regions.add(p, id, sum, shift);
        regions.close(sum, shift);
      }
    }

    // Lanes whose g is the same modulo `pack` hold rows of the same head.
    const int64_t heads = int64_t(score.kv_heads) * score.group, head = tile.first_head + tile.g;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v = received[i];
      for (int apart = score.pack; apart < 8; apart *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, v, 4 * apart);
        v = args.reduce == Reduce::max ? max_or_nan(v, other) : v + other;
      }
      if (args.reduce == Reduce::mean) v /= float(max(score.query_rows - score.first_row, 1));
      const int key = step + 8 * (i / 2) + 2 * tile.c + i % 2;
      if (tile.g < score.pack && key < score.keys) args.scores[(batch * heads + head) * score.keys + key] = v;
    }
  }
}

// ------------------------------------------------------------------------------------------------------ instances

template <typename T, typename Start>
void with_mass_kernel(int dim, Start&& start) {
  with_width(dim, [&](auto width) { start(region_mass_kernel<T, decltype(width)::value>); });
}

template <typename T, typename Start>
void with_key_kernel(int dim, bool mass, Start&& start) {
  with_width(dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    mass ? start(key_attention_kernel<T, kDim, true>) : start(key_attention_kernel<T, kDim, false>);
  });
}

// How many heads lie side by side in the tiles of key_attention_kernel.
inline int heads_side_by_side(int rows, int group) {
  if (rows >= kTileRows) return 1;
  int pack = 8;
  while (group % pack) pack /= 2;
  return pack;
}

}  // namespace ras::cuda
