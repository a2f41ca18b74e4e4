// Attention of a few query rows over a long cache (decode), with tensor cores.
//
// Decode is bound by reading the cache once, so every choice here serves that:
//   * The query heads that share a key/value head are packed into one tile of up to 16 rows, the height of an mma.
//   * Keys and values go from memory straight into mma fragments: no shared memory, no barrier in the loop. For keys see
//     attention_tile.cuh. For P V the roles are swapped (out^T = V^T P^T): a thread holds 8 neighbouring dimensions of four
//     keys, pairs them key by key with byte permutes, and the probabilities leave the first product in exactly the layout in
//     which the second wants them.
//   * A warp walks its own keys, 16 a step, and asks for the next keys before it computes on the values of the last.
// Each warp keeps an online softmax; warps of a block merge in shared memory, blocks (splits) in merge_splits.
//
// Region mass: a step whose 16 keys lie in one region adds its row sum to a running sum; when the region changes, the sum is
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

// Where query row `row` of head `head` = b * Hq + h lies in `out`.
template <typename T>
__device__ T* out_row(const DecodeArgs<T>& args, int64_t head, int64_t row) {
  const int heads = args.score.kv_heads * args.score.group;
  return args.out + ((head / heads * args.score.query_rows + row) * heads + head % heads) * args.score.dim;
}

// Blocks per multiprocessor, for the launch bounds: as many as the registers of each kernel allow. Without an explicit number
// ptxas spills a value or two to fit one block more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kMassTakesABlock = false;
#else
constexpr bool kMassTakesABlock = true;  // sm_80's code for the masses at 128 dimensions needs 179 registers, not 168
#endif
constexpr int decode_blocks(int dim, int row_tiles, bool mass) {
  return dim > 128 ? 2 : 5 - dim / 64 - (row_tiles > 1 || (mass && dim > 64 && kMassTakesABlock));
}

// Grid (row tiles * splits, Hkv, B), kBlockWarps warps; a row tile has 8 kRowTiles packed rows.
//
// In this order: the warps walk their keys (scores, online softmax, region sums, P V), a step of 16 keys each time; the block
// merges its warps in shared memory; it writes the results, or with several splits their parts for merge_splits.
template <typename T, int kDim, int kRowTiles, bool kMass>
__global__ void __launch_bounds__(kBlockWarps * kWarp, decode_blocks(kDim, kRowTiles, kMass))
decode_kernel(const __grid_constant__ DecodeArgs<T> args) {
  constexpr int kGroups = kDim / 64;      // of 64 output dimensions
  constexpr int kRows = 8 * kRowTiles;
  constexpr bool kPrefetch = kDim <= 128; // beyond, the next keys would not fit into registers
  constexpr int kPitch = kDim + 4;        // of an output row: a warp's stores meet each bank twice, not eight times
  __shared__ float tops[kBlockWarps][kRows], sums[kBlockWarps][kRows], weights[kBlockWarps][kRows];
  __shared__ float block_lse[kRows];
  __shared__ __align__(16) float warp_out[kBlockWarps][kRows][kPitch];
  wait_for_previous_kernel();

  const int warp = threadIdx.x / kWarp, kv_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x % args.splits, tile_row = blockIdx.x / args.splits * kRows;
  const ScoreArgs<T>& score = args.score;
  Tile<T, kDim, kRowTiles, true> tile(score, batch, kv_head);
  tile.take_rows(tile_row);
  const T* values = args.value + batch * args.value_stride.batch + kv_head * args.value_stride.head;
  const int heads = score.kv_heads * score.group;

  float top[kRowTiles], sum[kRowTiles];
  float out[kGroups][4][kRowTiles][4] = {};  // out^T: dimension 64 group + 8 g + 2 u + m / 8, packed rows 2 c and 2 c + 1
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
    regions.slab = slab + int64_t(warp) * kRows * score.regions;
    regions.regions = score.regions;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) regions.offset[half] = int64_t(tile.g + 8 * half) * score.regions;
    regions.begin(exists);
    regions.clear();
  }

  uint4 keys[2][kDim / 32];
  const SplitSteps steps(tile.low, tile.high, split, args.splits);
  if (kPrefetch && steps.first + warp < steps.last) tile.load_keys(keys, (steps.first + warp) * kStepKeys);
  for (int index = steps.first + warp; index < steps.last; index += kBlockWarps) {
    const int step = index * kStepKeys;
    uint4 value[4][kGroups];
    const auto load_values = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = step + 8 * (i / 2) + 2 * tile.c + i % 2;
        const bool ok = key >= tile.start && key < tile.end;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const int d = 64 * group + 8 * tile.g;
          value[i][group] = load_eight(values + int64_t(key) * args.value_stride.row + d, ok && tile.in_dim(d));
        }
      }
    };
    if (kPrefetch) {
      load_values();
    } else {
      tile.load_keys(keys, step);
    }
    const int id = kMass || score.region_bias ? tile.load_id(step) : -1;
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
      factor[half] = exp2f(top[half] - finite_or_zero(next));
      top[half] = next;
    }
    if (__any_sync(kFullWarp, grown)) {
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
        sum[half] *= factor[half];
        const float even = __shfl_sync(kFullWarp, factor[half], 8 * tile.c);
        const float odd = __shfl_sync(kFullWarp, factor[half], 8 * tile.c + 4);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            float (&o)[4] = out[group][u][half];
            o[0] *= even, o[1] *= odd, o[2] *= even, o[3] *= odd;
          }
        }
      }
      if constexpr (kMass) regions.rescale(factor);
    }
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[half][i] = exp2f(p[half][i] - finite_or_zero(top[half]));
        sum[half] += p[half][i];
      }
    }
    if constexpr (kMass) regions.add(p, id, top);

    // out^T += V^T P^T.
    uint32_t probability[kRowTiles][2];
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) {
      probability[half][0] = pack_pair<T>(p[half][0], p[half][1]);
      probability[half][1] = pack_pair<T>(p[half][2], p[half][3]);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto word = [&](int key, int u) {
        const uint4& v = value[key][group];
        return u == 0 ? v.x : u == 1 ? v.y : u == 2 ? v.z : v.w;
      };
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const uint32_t a[4] = {low_halves(word(0, u), word(1, u)), high_halves(word(0, u), word(1, u)),
                               low_halves(word(2, u), word(3, u)), high_halves(word(2, u), word(3, u))};
#pragma unroll
        for (int half = 0; half < kRowTiles; ++half) mma_16x8x16<T>(out[group][u][half], a, probability[half]);
      }
    }
  }

  // Merges the warps: each leaves its rows' maxima, sums and outputs, whose weights are known when all have.
  if constexpr (kMass) regions.close(top);
#pragma unroll
  for (int half = 0; half < kRowTiles; ++half) {
    const float total = quad_sum(sum[half]);
    if (tile.c == 0) tops[warp][tile.g + 8 * half] = top[half], sums[warp][tile.g + 8 * half] = total;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int u = 0; u < 4; u += 2) {
          const float (&o)[4] = out[group][u][half], (&next)[4] = out[group][u + 1][half];
          *reinterpret_cast<float4*>(&warp_out[warp][8 * half + 2 * tile.c + odd][64 * group + 8 * tile.g + 2 * u]) =
              make_float4(o[odd], o[2 + odd], next[odd], next[2 + odd]);
        }
      }
    }
  }
  __syncthreads();
  const int rows = min(kRows, score.packed_rows - tile_row);
  const auto head_of = [&](int r) { return int64_t(batch) * heads + kv_head * score.group + (tile_row + r) % score.group; };
  const auto row_of = [&](int r) { return (tile_row + r) / score.group; };
  if (threadIdx.x < kRows) {
    const int r = threadIdx.x;
    float most = -INFINITY;
    if (args.sinks && split == 0 && r < rows) most = args.sinks[head_of(r) % heads] * kLog2e;
    const float sink = most;
    for (int w = 0; w < kBlockWarps; ++w) most = fmaxf(most, tops[w][r]);
    const float shift = finite_or_zero(most);
    float total = exp2f(sink - shift);
    for (int w = 0; w < kBlockWarps; ++w) total += sums[w][r] * exp2f(tops[w][r] - shift);
    for (int w = 0; w < kBlockWarps; ++w) weights[w][r] = exp2f(tops[w][r] - shift) / (total == 0.f ? 1.f : total);
    block_lse[r] = most + log2f(total);
  }
  __syncthreads();

  // Writes output, LSE and masses of the block's rows.
  allow_next_kernel();
  const auto stat_row = [&](int r) { return head_of(r) * score.query_rows + row_of(r); };
  const int64_t part = int64_t(split) * score.batch * heads * score.query_rows;
  const int quads = score.dim / 4;
  for (int i = threadIdx.x; i < rows * quads; i += blockDim.x) {
    const int r = i / quads, d = i % quads * 4;
    float o[4] = {};
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(&warp_out[w][r][d]);
      const float weight = weights[w][r];
      o[0] += weight * part.x, o[1] += weight * part.y, o[2] += weight * part.z, o[3] += weight * part.w;
    }
    if (args.splits == 1) {
      auto* to = reinterpret_cast<uint2*>(out_row(args, head_of(r), row_of(r)) + d);
      *to = {pack_pair<T>(o[0], o[1]), pack_pair<T>(o[2], o[3])};
    } else {
      *reinterpret_cast<float4*>(args.part_out + (part + stat_row(r)) * score.dim + d) = make_float4(o[0], o[1], o[2], o[3]);
    }
  }
  if (threadIdx.x < rows) {
    const int r = threadIdx.x;
    if (args.splits == 1) {
      args.lse[stat_row(r)] = block_lse[r] * kLn2;
    } else {
      args.part_lse[part + stat_row(r)] = block_lse[r];
    }
  }
  if constexpr (kMass) {
    for (int i = threadIdx.x; i < rows * score.regions; i += blockDim.x) {
      const int r = i / score.regions, region = i % score.regions;
      float total = -INFINITY;
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) total = log2_add(total, slab[(int64_t(w) * kRows + r) * score.regions + region]);
      if (args.splits > 1) {
        args.part_mass[(part + stat_row(r)) * score.regions + region] = total;
        continue;
      }
      const int mass_row = row_of(r) - (score.query_rows - args.mass_rows);
      if (mass_row < 0) continue;
      const float lse = block_lse[r];
      args.mass[(head_of(r) * args.mass_rows + mass_row) * score.regions + region] = exp2f(total - finite_or_zero(lse));
    }
  }
}

// Merges the splits of one query row. Grid: B * Hq * Lq blocks.
template <typename T>
__global__ void merge_splits(const __grid_constant__ DecodeArgs<T> args) {
  constexpr int kAtOnce = 16;  // loads in flight
  __shared__ float weights[kMostSplits];
  wait_for_previous_kernel();
  const ScoreArgs<T>& score = args.score;
  const int64_t row = blockIdx.x, rows = int64_t(gridDim.x);
  const int lane = threadIdx.x % kWarp;
  // Every warp looks at all splits, a lane at every 32nd.
  float parts[kMostSplits / kWarp], most = -INFINITY, total = 0.f;
#pragma unroll
  for (int i = 0; i < kMostSplits / kWarp; ++i) {
    const int s = lane + kWarp * i;
    parts[i] = s < args.splits ? args.part_lse[s * rows + row] : -INFINITY;
  }
#pragma unroll
  for (float part : parts) most = fmaxf(most, part);
  most = warp_max(most);
#pragma unroll
  for (float part : parts) total += exp2f(part - finite_or_zero(most));
  const float lse = most + log2f(warp_sum(total)), shift = finite_or_zero(lse);
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int i = 0; i < kMostSplits / kWarp; ++i) weights[lane + kWarp * i] = exp2f(parts[i] - shift);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < score.dim; d += blockDim.x) {
    float o = 0.f;
#pragma unroll kAtOnce
    for (int s = 0; s < args.splits; ++s) o += weights[s] * args.part_out[(s * rows + row) * score.dim + d];
    out_row(args, row / score.query_rows, row % score.query_rows)[d] = from_float<T>(o);
  }
  if (threadIdx.x == 0) args.lse[row] = lse * kLn2;
  const int64_t mass_row = row % score.query_rows - (score.query_rows - args.mass_rows);
  if (!args.mass || mass_row < 0) return;
  for (int region = threadIdx.x; region < score.regions; region += blockDim.x) {
    float mass = 0.f;
#pragma unroll kAtOnce
    for (int s = 0; s < args.splits; ++s) mass += exp2f(args.part_mass[(s * rows + row) * score.regions + region] - shift);
    args.mass[(row / score.query_rows * args.mass_rows + mass_row) * score.regions + region] = mass;
  }
}

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
