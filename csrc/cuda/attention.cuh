// Attention of a few query rows over a long cache (decode), and region masses of selected rows, with tensor cores.
//
// Decode is bound by reading the cache once, so every choice here serves that:
//   * The query heads that share a key/value head are packed into one tile of up to 16 rows, the height of an mma.
//   * Keys and values go from memory straight into mma fragments by 16-byte loads: no shared memory, no barrier in the loop.
//     Scores sum over head dimensions, so any order of them will do if queries use the same: a thread's 8 neighbouring
//     dimensions of a key are its share of two mma steps. For P V the roles are swapped (out^T = V^T P^T): a thread holds 8
//     neighbouring dimensions of four keys, pairs them key by key with byte permutes, and the probabilities leave the first
//     product in exactly the layout in which the second wants them.
//   * A warp walks its own keys, 16 a step, and asks for the next keys before it computes on the values of the last.
// Each warp keeps an online softmax; warps of a block merge in shared memory, blocks (splits) in merge_splits.
//
// Region mass: a step whose 16 keys lie in one region adds its row sum to a running sum; when the region changes, the sum is
// folded, as a base-2 logarithm (independent of the running maximum), into the warp's slab [rows, regions]. A step that mixes
// regions folds them one by one.
//
// Framework-free: attention.cu is the launcher. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include <cmath>
#include <type_traits>

#include "online_softmax.cuh"

namespace ras::cuda {

constexpr int kStepKeys = 16;   // keys a warp takes at a time
constexpr int kTileRows = 16;   // rows of an mma
constexpr int kDecodeWarps = 4;

struct AttentionStrides {
  int64_t batch, head, row;  // in elements; the last dimension is contiguous
};

// What both kernels need to score keys. Packed row r of key/value head j: query head j * group + r % group, query row
// first_row + r / group.
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
  int first_row, packed_rows; // packed_rows = (Lq - first_row) * group
  int regions, window;        // window 0: none
  bool causal;
  float scale, softcap;       // softcap 0: none
};

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
  float* slab;                // [blocks, kDecodeWarps, 8 kRowTiles, R] scratch, used when mass is wanted
  const float* sinks;         // [Hq] or null
  int mass_rows, splits;
};

// Where query row `row` of head `head` = b * Hq + h lies in `out`.
template <typename T>
__device__ T* out_row(const DecodeArgs<T>& args, int64_t head, int64_t row) {
  const int heads = args.score.kv_heads * args.score.group;
  return args.out + ((head / heads * args.score.query_rows + row) * heads + head % heads) * args.score.dim;
}

template <typename T>
struct MassArgs {
  ScoreArgs<T> score;
  const float* lse;           // [B, Hq, Lq] by strides
  AttentionStrides lse_stride;
  float* part;                // [parts, B, Hq, mass_rows, R], parts = splits * kDecodeWarps
  int splits;
};

// ---------------------------------------------------------------------------------------------------- fragments

__device__ inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | (b << 16); }
__device__ inline uint32_t high_halves(uint32_t a, uint32_t b) { return (a >> 16) | (b & 0xffff0000u); }

template <typename T>
__device__ inline float half_of(uint32_t pair, int which) {
  return to_float(reinterpret_cast<const Pack<T, 2>*>(&pair)->value[which]);
}

// c[16, 8] += a[16, 16] b[16, 8] by one warp. Off the GPU: the same product through shuffles, from the documented layout.
template <typename T>
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  const int lane = threadIdx.x % kWarp, group = lane / 4, member = lane % 4;
  for (int k = 0; k < 4; ++k) {
    uint32_t row[4], left[2], right[2];
    for (int i = 0; i < 4; ++i) row[i] = __shfl_sync(kFullWarp, a[i], group * 4 + k);
    for (int i = 0; i < 2; ++i) left[i] = __shfl_sync(kFullWarp, b[i], member * 8 + k);
    for (int i = 0; i < 2; ++i) right[i] = __shfl_sync(kFullWarp, b[i], member * 8 + 4 + k);
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) {
        c[0] += half_of<T>(row[2 * i], e) * half_of<T>(left[i], e);
        c[1] += half_of<T>(row[2 * i], e) * half_of<T>(right[i], e);
        c[2] += half_of<T>(row[2 * i + 1], e) * half_of<T>(left[i], e);
        c[3] += half_of<T>(row[2 * i + 1], e) * half_of<T>(right[i], e);
      }
    }
  }
#endif
}

// Keeps the compiler from moving later loads before this point: two fragments at once would not fit into registers.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// 8 neighbouring elements, or zeros.
template <typename T>
__device__ inline uint4 load_eight(const T* from, bool ok) {
  return ok ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}

// ------------------------------------------------------------------------------------------------------- scoring

// A tile of 16 packed rows of one key/value head: lane (g, c) of a warp owns rows g and g + 8, and in a step the keys
// 8 t + 2 c and 8 t + 2 c + 1 for t = 0, 1. Rows from 8 on exist only with kRowTiles == 2.
// kRowBounds: whether rows may have valid keys of their own.
template <typename T, int kDim, int kRowTiles, bool kRowBounds>
struct Tile {
  static constexpr int kLoads = kDim / 32;  // 16-byte loads of a key by its four lanes

  const ScoreArgs<T>& args;
  const T* keys;             // of this batch element and head
  const int32_t* ids;
  int lane, g, c, batch, kv_head, tile_row;
  int start, end;            // keys that are valid for some row of the tile
  int low, high;             // keys that some row of the tile sees
  int full_low, full_high;   // keys that every row sees
  uint4 query[kRowTiles][kLoads];

  __device__ int packed(int half) const { return tile_row + g + 8 * half; }
  __device__ bool exists(int half) const { return packed(half) < args.packed_rows; }
  __device__ int head(int half) const { return kv_head * args.group + packed(half) % args.group; }
  __device__ int row(int half) const { return args.first_row + packed(half) / args.group; }
  __device__ int limit(int row) const { return row + end - args.query_rows; }
  __device__ int64_t bound(int row) const {
    return kRowBounds ? batch * args.bounds_batch_stride + row * args.bounds_row_stride : batch;
  }
  __device__ int first_valid(int row) const { return args.kv_start ? max(args.kv_start[bound(row)], 0) : 0; }
  __device__ int end_valid(int row) const { return args.kv_end ? min(args.kv_end[bound(row)], args.keys) : args.keys; }
  __device__ bool in_dim(int d) const { return d < args.dim; }

  __device__ Tile(const ScoreArgs<T>& args, int batch, int kv_head, int tile_row)
      : args(args), lane(threadIdx.x % kWarp), g(lane / 4), c(lane % 4), batch(batch), kv_head(kv_head), tile_row(tile_row) {
    keys = args.key + batch * args.key_stride.batch + kv_head * args.key_stride.head;
    ids = args.region_ids ? args.region_ids + batch * args.ids_batch_stride : nullptr;
    const int first = args.first_row + tile_row / args.group;
    const int last = args.first_row + (min(tile_row + 8 * kRowTiles, args.packed_rows) - 1) / args.group;
    start = full_low = first_valid(first);
    end = full_high = end_valid(first);
    for (int r = first + 1; kRowBounds && args.bounds_row_stride && r <= last; ++r) {
      start = min(start, first_valid(r)), full_low = max(full_low, first_valid(r));
      end = max(end, end_valid(r)), full_high = min(full_high, end_valid(r));
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
      const T* from = args.query + batch * args.query_stride.batch + head(half) * args.query_stride.head +
                      row(half) * args.query_stride.row + 8 * c;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) query[half][i] = load_eight(from + 32 * i, exists(half) && in_dim(32 * i + 8 * c));
    }
  }

  __device__ void load_keys(uint4 (&fragment)[2][kLoads], int step) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int key = step + 8 * t + g;
      const bool ok = key >= start && key < end;
      const T* from = keys + int64_t(key) * args.key_stride.row + 8 * c;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) fragment[t][i] = load_eight(from + 32 * i, ok && in_dim(32 * i + 8 * c));
    }
  }

  // The region of key `step + lane % 16`; ids outside 0 .. regions - 1 count as none.
  __device__ int load_id(int step) const {
    const int id = ids[max(min(step + lane % kStepKeys, args.keys - 1), 0)];
    return id >= 0 && id < args.regions ? id : -1;
  }

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
    const bool masked = step < full_low || step + kStepKeys > full_high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = 8 * (i / 2) + 2 * c + i % 2, key = step + offset;
      const int region = args.region_bias ? __shfl_sync(kFullWarp, id, offset) : -1;
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
        float& x = s[half][i];
        x *= args.scale;
        if (args.softcap != 0.f) x = args.softcap * tanhf(x / args.softcap);
        x *= kLog2e;
        if (region >= 0 && exists(half)) {
          x += kLog2e * args.region_bias[batch * args.bias_batch_stride + head(half) * args.bias_head_stride + region];
        }
        if (masked) {
          const int r = kRowBounds ? min(row(half), args.query_rows - 1) : row(half), own = limit(r);
          const bool alike = !kRowBounds || !args.bounds_row_stride;
          const bool seen = key >= (alike ? start : first_valid(r)) && key < (alike ? end : end_valid(r)) &&
                            (!args.causal || key <= own) && (!args.window || key > own - args.window);
          if (!seen) x = -INFINITY;
        }
      }
    }
  }
};

// -------------------------------------------------------------------------------------------------------- decode

// The steps [first, last) of a split, in units of 16 keys, counted from the step in which `low` lies.
struct SplitSteps {
  int first, last;
  __device__ SplitSteps(int low, int high, int split, int splits) {
    const int begin = low / kStepKeys, steps = max((high + kStepKeys - 1) / kStepKeys - begin, 0);
    const int share = (steps + splits - 1) / splits;
    first = begin + min(split * share, steps);
    last = begin + min((split + 1) * share, steps);
  }
};

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
constexpr int mass_blocks(int dim) { return dim > 128 ? 3 : 5; }

// Grid (row tiles * splits, Hkv, B), kDecodeWarps warps; a row tile has 8 kRowTiles packed rows.
//
// In this order: the warps walk their keys (scores, online softmax, region sums, P V), a step of 16 keys each time; the block
// merges its warps in shared memory; it writes the results, or with several splits their parts for merge_splits.
template <typename T, int kDim, int kRowTiles, bool kMass>
__global__ void __launch_bounds__(kDecodeWarps * kWarp, decode_blocks(kDim, kRowTiles, kMass))
decode_kernel(const __grid_constant__ DecodeArgs<T> args) {
  constexpr int kGroups = kDim / 64;      // of 64 output dimensions
  constexpr int kRows = 8 * kRowTiles;
  constexpr bool kPrefetch = kDim <= 128; // beyond, the next keys would not fit into registers
  __shared__ float tops[kDecodeWarps][kRows], sums[kDecodeWarps][kRows];
  __shared__ float block_top[kRows], block_sum[kRows];
  __shared__ float block_out[kRows][kDim];
  wait_for_previous_kernel();

  const int warp = threadIdx.x / kWarp, kv_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x % args.splits, tile_row = blockIdx.x / args.splits * kRows;
  const ScoreArgs<T>& score = args.score;
  const Tile<T, kDim, kRowTiles, true> tile(score, batch, kv_head, tile_row);
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
    const int64_t block = (int64_t(batch) * score.kv_heads + kv_head) * gridDim.x + blockIdx.x;
    slab = args.slab + block * kDecodeWarps * kRows * score.regions;
    regions.slab = slab + int64_t(warp) * kRows * score.regions;
    regions.regions = score.regions;
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half) regions.offset[half] = int64_t(tile.g + 8 * half) * score.regions;
    regions.begin(exists);
  }

  uint4 keys[2][kDim / 32];
  const SplitSteps steps(tile.low, tile.high, split, args.splits);
  if (kPrefetch && steps.first + warp < steps.last) tile.load_keys(keys, (steps.first + warp) * kStepKeys);
  for (int index = steps.first + warp; index < steps.last; index += kDecodeWarps) {
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
    } else if (index + kDecodeWarps < steps.last) {
      tile.load_keys(keys, step + kDecodeWarps * kStepKeys);
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

  // Merges the warps: maxima and sums first, then the outputs, one warp after the other.
  if constexpr (kMass) regions.close(top);
#pragma unroll
  for (int half = 0; half < kRowTiles; ++half) {
    const float total = quad_sum(sum[half]);
    if (tile.c == 0) tops[warp][tile.g + 8 * half] = top[half], sums[warp][tile.g + 8 * half] = total;
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
    for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, tops[w][r]);
    float total = exp2f(sink - finite_or_zero(most));
    for (int w = 0; w < kDecodeWarps; ++w) total += sums[w][r] * exp2f(tops[w][r] - finite_or_zero(most));
    block_top[r] = most;
    block_sum[r] = total;
  }
  __syncthreads();
  for (int w = 0; w < kDecodeWarps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int half = 0; half < kRowTiles; ++half) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int r = 8 * half + 2 * tile.c + odd;
          const float weight = exp2f(tops[w][r] - finite_or_zero(block_top[r]));
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              float& o = block_out[r][64 * group + 8 * tile.g + i];
              o = (w == 0 ? 0.f : o) + weight * out[group][i / 2][half][2 * (i % 2) + odd];
            }
          }
        }
      }
    }
    __syncthreads();
  }

  // Writes output, LSE and masses of the block's rows.
  allow_next_kernel();
  const auto stat_row = [&](int r) { return head_of(r) * score.query_rows + row_of(r); };
  const int64_t part = int64_t(split) * score.batch * heads * score.query_rows;
  for (int i = threadIdx.x; i < rows * score.dim; i += blockDim.x) {
    const int r = i / score.dim, d = i % score.dim;
    const float o = block_out[r][d] / (block_sum[r] == 0.f ? 1.f : block_sum[r]);
    if (args.splits == 1) {
      out_row(args, head_of(r), row_of(r))[d] = from_float<T>(o);
    } else {
      args.part_out[(part + stat_row(r)) * score.dim + d] = o;
    }
  }
  if (threadIdx.x < rows) {
    const int r = threadIdx.x;
    const float lse = block_top[r] + log2f(block_sum[r]);
    if (args.splits == 1) {
      args.lse[stat_row(r)] = lse * kLn2;
    } else {
      args.part_lse[part + stat_row(r)] = lse;
    }
  }
  if constexpr (kMass) {
    for (int i = threadIdx.x; i < rows * score.regions; i += blockDim.x) {
      const int r = i / score.regions, region = i % score.regions;
      float total = -INFINITY;
      for (int w = 0; w < kDecodeWarps; ++w) total = log2_add(total, slab[(int64_t(w) * kRows + r) * score.regions + region]);
      if (args.splits > 1) {
        args.part_mass[(part + stat_row(r)) * score.regions + region] = total;
        continue;
      }
      const int mass_row = row_of(r) - (score.query_rows - args.mass_rows);
      if (mass_row < 0) continue;
      const float lse = block_top[r] + log2f(block_sum[r]);
      args.mass[(head_of(r) * args.mass_rows + mass_row) * score.regions + region] = exp2f(total - finite_or_zero(lse));
    }
  }
}

// Merges the splits of one query row. Grid: B * Hq * Lq blocks.
template <typename T>
__global__ void merge_splits(const __grid_constant__ DecodeArgs<T> args) {
  wait_for_previous_kernel();
  const ScoreArgs<T>& score = args.score;
  const int64_t row = blockIdx.x, rows = int64_t(gridDim.x);
  float lse = -INFINITY;
  for (int s = 0; s < args.splits; ++s) lse = log2_add(lse, args.part_lse[s * rows + row]);
  const float shift = finite_or_zero(lse);
  for (int d = threadIdx.x; d < score.dim; d += blockDim.x) {
    float o = 0.f;
    for (int s = 0; s < args.splits; ++s) {
      o += exp2f(args.part_lse[s * rows + row] - shift) * args.part_out[(s * rows + row) * score.dim + d];
    }
    out_row(args, row / score.query_rows, row % score.query_rows)[d] = from_float<T>(o);
  }
  if (threadIdx.x == 0) args.lse[row] = lse * kLn2;
  const int64_t mass_row = row % score.query_rows - (score.query_rows - args.mass_rows);
  if (!args.mass || mass_row < 0) return;
  for (int region = threadIdx.x; region < score.regions; region += blockDim.x) {
    float mass = 0.f;
    for (int s = 0; s < args.splits; ++s) mass += exp2f(args.part_mass[(s * rows + row) * score.regions + region] - shift);
    args.mass[(row / score.query_rows * args.mass_rows + mass_row) * score.regions + region] = mass;
  }
}

// ---------------------------------------------------------------------------------------------------- region mass

// Grid (row tiles * splits, Hkv, B), kDecodeWarps warps that share a tile of 16 packed rows and take turns at the keys. Steps
// in which no key has a region are not read.
template <typename T, int kDim>
__global__ void __launch_bounds__(kDecodeWarps * kWarp, mass_blocks(kDim)) region_mass_kernel(const __grid_constant__ MassArgs<T> args) {
  wait_for_previous_kernel();
  const ScoreArgs<T>& score = args.score;
  const int warp = threadIdx.x / kWarp, kv_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x % args.splits, tile_row = blockIdx.x / args.splits * kTileRows;
  const Tile<T, kDim, 2, false> tile(score, batch, kv_head, tile_row);
  const int64_t heads = int64_t(score.kv_heads) * score.group, mass_rows = score.query_rows - score.first_row;
  const int64_t part = int64_t(split * kDecodeWarps + warp) * score.batch * heads;

  RegionSums<2, false> regions;
  regions.slab = args.part;
  regions.regions = score.regions;
  float shift[2];
  bool exists[2];
  for (int half = 0; half < 2; ++half) {
    exists[half] = tile.exists(half);
    const int64_t head = tile.head(half), row = tile.row(half);
    regions.offset[half] = ((part + batch * heads + head) * mass_rows + row - score.first_row) * score.regions;
    const int64_t at = batch * args.lse_stride.batch + head * args.lse_stride.head + row * args.lse_stride.row;
    shift[half] = exists[half] ? finite_or_zero(args.lse[at] * kLog2e) : 0.f;
  }
  regions.begin(exists);

  const SplitSteps steps(tile.low, tile.high, split, args.splits);
  for (int index = steps.first + warp; index < steps.last; index += kDecodeWarps) {
    const int step = index * kStepKeys, id = tile.load_id(step);
    if (!__any_sync(kFullWarp, id >= 0)) continue;
    uint4 keys[2][kDim / 32];
    tile.load_keys(keys, step);
    float p[2][4];
    tile.score(p, keys, step, id);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[half][i] = exp2f(p[half][i] - shift[half]);
    }
    regions.add(p, id, shift);
  }
  regions.close(shift);
}

// mass[i] = sum over parts of part[p, i]
struct SumArgs {
  const float* part;
  float* mass;
  int64_t size;
  int parts;
};

__global__ void sum_parts(const __grid_constant__ SumArgs args) {
  wait_for_previous_kernel();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.size) return;
  float sum = 0.f;
  for (int p = 0; p < args.parts; ++p) sum += args.part[p * args.size + i];
  args.mass[i] = sum;
}

// ------------------------------------------------------------------------------------------------------ instances

// Whether these kernels take such tensors: whole 16-byte loads need a head dimension of whole eights.
constexpr bool supports_head_dim(int dim) { return dim % 8 == 0 && dim <= 256; }

// Calls start(kernel, rows of a tile) for the instance that fits.
template <typename T, typename Start>
void with_decode_kernel(int dim, int packed_rows, bool mass, Start&& start) {
  const auto pick = [&](auto wide, auto tall) {
    constexpr int kDim = decltype(wide)::value, kRowTiles = decltype(tall)::value;
    mass ? start(decode_kernel<T, kDim, kRowTiles, true>, 8 * kRowTiles)
         : start(decode_kernel<T, kDim, kRowTiles, false>, 8 * kRowTiles);
  };
  const auto with_dim = [&](auto tall) {
    dim <= 64 ? pick(std::integral_constant<int, 64>{}, tall) : pick(std::integral_constant<int, 128>{}, tall);
  };
  if (dim > 128) return pick(std::integral_constant<int, 256>{}, std::integral_constant<int, 1>{});
  packed_rows <= 8 ? with_dim(std::integral_constant<int, 1>{}) : with_dim(std::integral_constant<int, 2>{});
}

template <typename T, typename Start>
void with_mass_kernel(int dim, Start&& start) {
  dim <= 64 ? start(region_mass_kernel<T, 64>) : dim <= 128 ? start(region_mass_kernel<T, 128>)
                                                            : start(region_mass_kernel<T, 256>);
}

}  // namespace ras::cuda
