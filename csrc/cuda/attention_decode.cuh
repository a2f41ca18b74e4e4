// Attention of a few query rows over a long cache (decode), with tensor cores.
//
// Decode is bound by reading the cache once, so every choice here serves that:
//   * The query heads that share a key/value head are packed into one tile of up to 16 rows, the height of an mma.
//   * Keys and values go from memory straight into mma fragments: no shared memory, no barrier in the loop. For keys see
//     attention_tile.cuh. For P V the roles are swapped (out^T = V^T P^T): a thread holds neighbouring dimensions of four
//     keys, pairs them key by key with byte permutes, and the probabilities leave the first product in exactly the layout in
//     which the second wants them.
//   * A warp walks its own keys, 16 a step, and asks for the next keys before it computes on the values of the last.
// Each warp keeps an online softmax; warps of a block merge in shared memory, blocks (splits) in merge_splits.
//
// Region mass: the row sum of an online softmax is that of the keys since the region last changed; when it does, the sum is
// folded, as a base-2 logarithm (independent of the running maximum), into the warp's slab [rows, regions]. A step that mixes
// regions folds them one by one.
//
// Framework-free: attention_decode.cu is the launcher.
#pragma once

#include <algorithm>

#include "attention_tile.cuh"

namespace ras::cuda {

template <typename T>
struct DecodeArgs {
  ScoreArgs<T> score;
  const T* value;
  AttentionStrides value_stride;
  T* out;                     // [B, Lq, Hq, dim]: what flash attention leaves and the layer after it reads as [B, Lq, Hq dim]
  float* lse;                 // [B, Hq, Lq]
  float* mass;                // [B, Hq, mass_rows, R]; null: not wanted
  float* part_out;            // [splits, B, Hq, Lq, dim], used when splits > 1
  float* part_lse;            // [splits, B, Hq, Lq], base 2
  float* part_mass;           // [splits, B, Hq, Lq, R]: base-2 logarithms of region sums
  float* slab;                // [blocks, kBlockWarps, 8 kRowTiles, R] scratch, used for masses of more than kSharedRegions
  const float* sinks;         // [Hq] or null
  int mass_rows, splits;
};

constexpr int kMostSplits = 128;

// Where a query row begins in `out`.
template <typename T>
__device__ int64_t out_row(const DecodeArgs<T>& args, int batch, const Place& at) {
  const ScoreArgs<T>& score = args.score;
  return ((int64_t(batch) * score.query_rows + at.row) * score.kv_heads * score.group + at.head) * score.dim;
}

// Blocks per multiprocessor, for the launch bounds. At 128 dimensions three would fit into the registers too, and be slower: a
// batch of 64 queries with 8 heads is two waves of 2 * 132 blocks, but one and a third of 3 * 132.
constexpr int decode_blocks(int dim, int row_tiles) { return dim > 64 ? 2 : 4 - (row_tiles > 1); }

// Where the next keys are not on their way before the products. With masses only Hopper's code has the registers for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <int kDim, bool kMass>
constexpr bool kKeysFirst = kDim > 128;
#else
template <int kDim, bool kMass>
constexpr bool kKeysFirst = kDim > 128 && !kMass;
#endif

// The dimensions of a value that lane group g holds: 8 neighbours of every 64, and 4 neighbours of 32 that are left. They are
// counted in pairs, of which one is an mma's for all groups.
template <int kDim>
struct ValuePairs {
  static constexpr int kCount = kDim / 16, kFull = kDim / 64 * 4;
  static_assert(kCount == kFull || kCount == kFull + 2);

  // The first dimension of a pair.
  __device__ static int dim(int pair, int g) {
    const int first = pair / 4 * 64 + pair % 4 * 2;
    return first + (pair < kFull ? 8 : 4) * g;
  }

  // from: dimension 8 g of a value.
  template <typename T, int kRowTiles>
  __device__ static void load(uint32_t (&pairs)[kCount], const T* from, const Tile<T, kDim, kRowTiles, true>& tile) {
#pragma unroll
    for (int pair = 0; pair < kFull; pair += 4) {
      const uint4 v = load_eight(from + 16 * pair, tile.in_dim(16 * pair + 8 * tile.g));
      pairs[pair] = v.x, pairs[pair + 1] = v.y, pairs[pair + 2] = v.z, pairs[pair + 3] = v.w;
    }
    if constexpr (kFull < kCount) {
      const uint2 v = load_four(from + 16 * kFull - 4 * tile.g, tile.in_dim(16 * kFull + 4 * tile.g));
      pairs[kFull] = v.x, pairs[kFull + 1] = v.y;
    }
  }
};

// Grid (row tiles * splits, Hkv, B), kBlockWarps warps; a row tile has 8 kRowTiles packed rows.
//
// In this order: the warps walk their keys (scores, online softmax, region sums, P V), a step of 16 keys each time; the block
// merges its warps in shared memory; it writes the results, or with several splits their parts for merge_splits.
template <typename T, int kDim, int kRowTiles, bool kMass>
__global__ void __launch_bounds__(kBlockWarps * kWarp, decode_blocks(kDim, kRowTiles))
decode_kernel(const __grid_constant__ DecodeArgs<T> args) {
  using Pairs = ValuePairs<kDim>;
  constexpr int kRows = 8 * kRowTiles;
  constexpr bool kPrefetch = kDim <= 128; // beyond, the next keys would not fit into registers
  constexpr int kPitch = kDim + 4;        // of an output row: a warp's stores meet each bank twice, not eight times
  __shared__ float tops[kBlockWarps][kRows], sums[kBlockWarps][kRows], weights[kBlockWarps][kRows];
  __shared__ float lse[kRows];
  __shared__ __align__(16) float warp_out[kBlockWarps][kRows][kPitch];
  wait_for_previous_kernel();

  const int warp = threadIdx.x / kWarp, kv_head = blockIdx.y, batch = blockIdx.z;
  const ScoreArgs<T>& score = args.score;
  const int row_tile = score.packed_rows <= kRows ? 0 : int(blockIdx.x / unsigned(args.splits));
  const int split = blockIdx.x - row_tile * args.splits, tile_row = row_tile * kRows;
  Tile<T, kDim, kRowTiles, true> tile(score, batch, kv_head);
  tile.take_rows(tile_row);
  const T* values = args.value + batch * args.value_stride.batch + kv_head * args.value_stride.head + 8 * tile.g;

  float top[kRowTiles], sum[kRowTiles];
  float out[Pairs::kCount][kRowTiles][4] = {};  // out^T: packed rows 2 c and 2 c + 1 of a pair's first dimension, of its second
  bool exists[kRowTiles];
#pragma unroll
  for (int half = 0; half < kRowTiles; ++half) {
    top[half] = -INFINITY;
    sum[half] = 0.f;
    exists[half] = tile.exists(half);
  }
  RegionSums<kRowTiles, true> regions;
  float* slab = nullptr;
  if constexpr (kMass) {
    __shared__ float shared_slab[kBlockWarps * kRows * kSharedRegions];
    const int64_t block = (int64_t(batch) * score.kv_heads + kv_head) * gridDim.x + blockIdx.x;
    slab = score.regions <= kSharedRegions ? shared_slab : args.slab + block * kBlockWarps * kRows * score.regions;
    regions.regions = score.regions;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      regions.totals[half] = slab + int64_t(warp * kRows + tile.g + 8 * half) * score.regions;
    }
    regions.begin(exists);
    regions.clear();
  }

  uint4 keys[2][kDim / 32];
  const SplitSteps steps(tile.low, tile.high, split, args.splits);
  if (kPrefetch && steps.first + warp < steps.last) tile.load_keys(keys, (steps.first + warp) * kStepKeys);
  for (int index = steps.first + warp; index < steps.last; index += kBlockWarps) {
    const int step = index * kStepKeys;
    uint32_t value[4][Pairs::kCount];
    const auto load_values = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Pairs::load(value[i], values + tile.valid_key(step + tile.offset(i)) * args.value_stride.row, tile);
      }
    };
    if (kPrefetch) {
      load_values();
    } else {
      tile.load_keys(keys, step);
    }
    const int id = kMass || score.region_bias ? tile.load_id(step) : -1;
    // All is asked for before the first product: ptxas would mix the two.
    if ((kPrefetch && kMass) || kKeysFirst<kDim, kMass>) __syncwarp();
    float p[kRowTiles][4];
    tile.score(p, keys, step, id);
    if (!kPrefetch) {
      keep_order();
      load_values();
    } else if (index + kBlockWarps < steps.last) {
      tile.load_keys(keys, step + kBlockWarps * kStepKeys);
    }

    // Online softmax: where a row's maximum has grown, what was summed before shrinks by `factor`.
    float factor[kRowTiles];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      const float (&s)[4] = p[half];
      const float next = fmaxf(top[half], quad_max(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]))));
      grown |= next > top[half];
      factor[half] = exp2_approximate(top[half] - finite_or_zero(next));
      top[half] = next;
    }
    if (__any_sync(kFullWarp, grown)) {
      if constexpr (kMass) regions.rescale(factor);
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
        sum[half] *= factor[half];
        const float even = __shfl_sync(kFullWarp, factor[half], 8 * tile.c);
        const float odd = __shfl_sync(kFullWarp, factor[half], 8 * tile.c + 4);
#pragma unroll
        for (int pair = 0; pair < Pairs::kCount; ++pair) {
          float (&o)[4] = out[pair][half];
          o[0] *= even, o[1] *= odd, o[2] *= even, o[3] *= odd;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[half][i] = exp2_approximate(p[half][i] - finite_or_zero(top[half]));
        if constexpr (!kMass) sum[half] += p[half][i];
      }
    }
    if constexpr (kMass) regions.add(p, tile.region_of(id), sum, top);

    // Keys between the stretches of rows that have their own are no row's: their values may be anything, and 0 * NaN is NaN.
    if (score.bounds_row_stride && (step < tile.full_low || step + kStepKeys > tile.full_high)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen = p[0][i] != 0.f || p[kRowTiles - 1][i] != 0.f;
        if (__ballot_sync(kFullWarp, seen) & 0x11111111u << tile.c) continue;
#pragma unroll
        for (int pair = 0; pair < Pairs::kCount; ++pair) value[i][pair] = 0;
      }
    }

    // out^T += V^T P^T.
    uint32_t probability[kRowTiles][2];
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      probability[half][0] = pack_pair<T>(p[half][0], p[half][1]);
      probability[half][1] = pack_pair<T>(p[half][2], p[half][3]);
    }
#pragma unroll
    for (int pair = 0; pair < Pairs::kCount; ++pair) {
      const uint32_t a[4] = {low_halves(value[0][pair], value[1][pair]), high_halves(value[0][pair], value[1][pair]),
                             low_halves(value[2][pair], value[3][pair]), high_halves(value[2][pair], value[3][pair])};
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) mma_16x8x16<T>(out[pair][half], a, probability[half]);
    }
  }

  // Merges the warps: each leaves its rows' maxima, sums and outputs, whose weights are known when all have.
  if constexpr (kMass) regions.close(sum, top);
#pragma unroll
  for (int half = 0; half < kRowTiles; ++half) {
    const float total = quad_sum(sum[half]);
    if (tile.c == 0) tops[warp][tile.g + 8 * half] = top[half], sums[warp][tile.g + 8 * half] = total;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
      for (int pair = 0; pair < Pairs::kCount; pair += 2) {
        const float (&o)[4] = out[pair][half], (&next)[4] = out[pair + 1][half];
        *reinterpret_cast<float4*>(&warp_out[warp][8 * half + 2 * tile.c + odd][Pairs::dim(pair, tile.g)]) =
            make_float4(o[odd], o[2 + odd], next[odd], next[2 + odd]);
      }
    }
  }
  __syncthreads();
  const int rows = min(kRows, score.packed_rows - tile_row);
  const int heads = score.kv_heads * score.group;
  const auto stat_row = [&](const Place& at) { return (int64_t(batch) * heads + at.head) * score.query_rows + at.row; };
  const int64_t part = int64_t(split) * score.batch * heads * score.query_rows;
  if (threadIdx.x < rows) {
    const int r = threadIdx.x;
    const Place at = tile.place(tile_row + r);
    const float sink = args.sinks && split == 0 ? args.sinks[at.head] * kLog2e : -INFINITY;
    float most = sink;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) most = fmaxf(most, tops[w][r]);
    const float shift = finite_or_zero(most);
    float weight[kBlockWarps], total = exp2_approximate(sink - shift);
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      weight[w] = exp2_approximate(tops[w][r] - shift);
      total += sums[w][r] * weight[w];
    }
    const float factor = 1.f / (total == 0.f ? 1.f : total);
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) weights[w][r] = weight[w] * factor;
    lse[r] = most + log2_approximate(total);
    if (args.splits == 1) {
      args.lse[stat_row(at)] = lse[r] * kLn2;
    } else {
      args.part_lse[part + stat_row(at)] = lse[r];
    }
  } else if (kMass && warp != 0) {  // the others merge the masses meanwhile
#pragma unroll 1
    for (int i = threadIdx.x - kWarp; i < rows * score.regions; i += (kBlockWarps - 1) * kWarp) {
      float sums[kBlockWarps];
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) sums[w] = slab[int64_t(w) * kRows * score.regions + i];
      float* to = slab + i;
      if (args.splits > 1) {
        const int r = unsigned(i) / unsigned(score.regions);
        to = args.part_mass + (part + stat_row(tile.place(tile_row + r))) * score.regions + i - r * score.regions;
      }
      *to = log2_sum(sums);
    }
  }
  __syncthreads();

  // Writes output and masses of the block's rows.
  allow_next_kernel();
  constexpr int kQuads = kDim / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kQuads; i += kBlockWarps * kWarp) {
    const int r = i / kQuads, d = i % kQuads * 4;
    if (!tile.in_dim(d)) continue;
    float o[4] = {};
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(&warp_out[w][r][d]);
      const float weight = weights[w][r];
      o[0] += weight * part.x, o[1] += weight * part.y, o[2] += weight * part.z, o[3] += weight * part.w;
    }
    const Place at = tile.place(tile_row + r);
    if (args.splits == 1) {
      T* to = args.out + out_row(args, batch, at) + d;
      *reinterpret_cast<uint2*>(to) = {pack_pair<T>(o[0], o[1]), pack_pair<T>(o[2], o[3])};
    } else {
      *reinterpret_cast<float4*>(args.part_out + (part + stat_row(at)) * score.dim + d) = make_float4(o[0], o[1], o[2], o[3]);
    }
  }
  if (kMass && args.splits == 1) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * score.regions; i += kBlockWarps * kWarp) {
      const int r = unsigned(i) / unsigned(score.regions);
      const Place at = tile.place(tile_row + r);
      const int from_end = score.query_rows - at.row;  // masses are wanted of the last mass_rows rows
      if (from_end > args.mass_rows) continue;
      const int64_t mass_row = (int64_t(batch) * heads + at.head + 1) * args.mass_rows - from_end;
      args.mass[mass_row * score.regions + i - r * score.regions] = exp2_approximate(slab[i] - finite_or_zero(lse[r]));
    }
  }
}

constexpr int kMergeDims = 64;
constexpr int kMergeThreads = 256;

// A lane's part of the splits: every 32nd, from its own on. -inf where there is none.
__device__ inline void load_splits(float (&parts)[kMostSplits / kWarp], const float* from, int64_t apart, int splits) {
#pragma unroll
  for (int i = 0; i < kMostSplits / kWarp; ++i) {
    const int s = threadIdx.x % kWarp + kWarp * i;
    parts[i] = s < splits ? from[s * apart] : -INFINITY;
  }
}

// Merges the splits of 64 dimensions of one query row. Grid (B * Hq * Lq, dim / 64 rounded up), kMergeThreads threads: 16 of
// them read a split's dimensions, a warp a region's masses, and all splits are on their way at once.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_splits(const __grid_constant__ DecodeArgs<T> args) {
  constexpr int kQuads = kMergeDims / 4, kGroups = kMergeThreads / kQuads, kLoads = kMostSplits / kGroups;
  __shared__ float weights[kMostSplits];
  __shared__ float4 sums[kGroups][kQuads];
  allow_next_kernel();  // the product with the output projection's weight, which it asks for ahead
  wait_for_previous_kernel();
  const ScoreArgs<T>& score = args.score;
  const int64_t row = blockIdx.x, rows = gridDim.x;
  float parts[kMostSplits / kWarp];
  load_splits(parts, args.part_lse + row, rows, args.splits);

  const int group = threadIdx.x / kQuads, quad = threadIdx.x % kQuads, first_dim = blockIdx.y * kMergeDims;
  float4 loads[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int s = group + kGroups * i, d = first_dim + 4 * quad;
    const bool ok = s < args.splits && d < score.dim;
    loads[i] = ok ? *reinterpret_cast<const float4*>(args.part_out + (s * rows + row) * score.dim + d) : float4{0, 0, 0, 0};
  }

  const int batch_head = unsigned(blockIdx.x) / unsigned(score.query_rows), q = blockIdx.x - batch_head * score.query_rows;
  const int from_end = score.query_rows - q, apart = kMergeThreads / kWarp * gridDim.y;
  const int regions = args.mass && from_end <= args.mass_rows ? score.regions : 0;  // whose masses are wanted of this row
  // The last warps first: the first ones write the output.
  int region = (kMergeThreads - 1 - threadIdx.x) / kWarp + kMergeThreads / kWarp * blockIdx.y;
  float masses[kMostSplits / kWarp];
  const auto load_masses = [&] {
    if (region < regions) load_splits(masses, args.part_mass + row * score.regions + region, rows * score.regions, args.splits);
  };
  load_masses();

  // Every warp looks at all splits.
  float most = -INFINITY, total = 0.f;
#pragma unroll
  for (float part : parts) most = fmaxf(most, part);
  most = warp_max(most);
  const float shift = finite_or_zero(most);
#pragma unroll
  for (float part : parts) total += exp2_approximate(part - shift);
  total = warp_sum(total);
  // Not 2^(part − lse): that adds up to 1 only as far as the LSE's rounding is small.
  const float share = 1.f / (total == 0.f ? 1.f : total);
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int i = 0; i < kMostSplits / kWarp; ++i) weights[threadIdx.x + kWarp * i] = share * exp2_approximate(parts[i] - shift);
  }
  __syncthreads();
  float4 sum{};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const float weight = weights[group + kGroups * i];
    sum.x += weight * loads[i].x, sum.y += weight * loads[i].y, sum.z += weight * loads[i].z, sum.w += weight * loads[i].w;
  }
  sums[group][quad] = sum;
  __syncthreads();

  if (threadIdx.x < kMergeDims && first_dim + threadIdx.x < score.dim) {
    float o = 0.f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) o += reinterpret_cast<const float*>(sums[i])[threadIdx.x];
    const int heads = score.kv_heads * score.group, batch = unsigned(batch_head) / unsigned(heads);
    const Place at{batch_head - batch * heads, q};
    args.out[out_row(args, batch, at) + first_dim + threadIdx.x] = from_float<T>(o);
  }
  if (threadIdx.x == 0 && blockIdx.y == 0) args.lse[row] = (most + log2_approximate(total)) * kLn2;

  float* mass = args.mass + (int64_t(batch_head + 1) * args.mass_rows - from_end) * score.regions;
#pragma unroll 1
  while (region < regions) {
    float sum = 0.f;
#pragma unroll
    for (float part : masses) sum += exp2_approximate(part - shift);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) mass[region] = share * sum;
    region += apart;
    load_masses();
  }
}

inline dim3 merge_grid(int64_t rows, int dim) { return dim3(unsigned(rows), unsigned((dim + kMergeDims - 1) / kMergeDims)); }

// Into how many splits to cut the keys, where `blocks` share a device that holds `slots` of them at a time: what takes the
// fewest turns of the longest warps, a block's start and end counted as three, and the merging of splits as one.
inline int plan_decode(int64_t blocks, int64_t slots, int keys) {
  const int64_t steps = (keys + kStepKeys - 1) / kStepKeys;
  const auto turns = [&](int64_t splits) {
    const int64_t share = (steps + splits - 1) / splits, waves = (blocks * splits + slots - 1) / slots;
    return waves * ((share + kBlockWarps - 1) / kBlockWarps + 3) + (splits > 1);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= std::min<int64_t>(kMostSplits, steps / kBlockWarps); ++splits) {
    if (turns(splits) < turns(best)) best = splits;
  }
  return int(best);
}

// Calls start(kernel, rows of a tile) for the instance that fits.
template <typename T, typename Start>
void with_decode_kernel(int dim, int packed_rows, bool mass, Start&& start) {
  with_width(dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value, kMostTiles = kDim <= 128 ? 2 : 1;
    const auto pick = [&](auto tiles) {
      constexpr int kRowTiles = decltype(tiles)::value;
      mass ? start(decode_kernel<T, kDim, kRowTiles, true>, 8 * kRowTiles)
           : start(decode_kernel<T, kDim, kRowTiles, false>, 8 * kRowTiles);
    };
    packed_rows <= 8 ? pick(std::integral_constant<int, 1>{}) : pick(std::integral_constant<int, kMostTiles>{});
  });
}

}  // namespace ras::cuda
