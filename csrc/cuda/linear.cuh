// y = x Wᵀ + b for one W or several, or activation(x Gᵀ) · (x Uᵀ), for few rows x: products bound by reading W, or G and U.
//
// A block owns 16 or 32 outputs, and its warps share their rows of W: each takes every eighth span of columns, goes from memory
// straight into mma fragments by 16-byte loads, and has asked for the next run before it multiplies this one. Sums run over
// columns, so any order of these will do if x uses the same: a lane's 8 neighbouring columns are its share of two mma steps. W is
// the operand whose registers are then as they were loaded, x the other: half of its 16 rows may be missing, which costs nothing,
// as tensor cores wait for memory. A row's result depends neither on the other rows nor on which instance runs.
//
// Framework-free: linear.cu is the launcher.
#pragma once

#include <limits>

#include "common/activation.h"
#include "mma.cuh"

namespace ras::cuda {

constexpr int kLinearParts = 4;

template <typename T>
struct LinearPart {
  const T* weight;  // [outputs, inputs]
  const T* bias;    // [outputs] or null
  T* out;           // [rows, outputs]
  int64_t weight_stride;
  int outputs, first_block;
};

template <typename T>
struct LinearArgs {
  const T* x;       // [rows, inputs]: row r starts at r / group * group_stride + r % group * row_stride
  const T* up;      // like the only weight, in a gated linear layer: out is activation(x weightᵀ) · (x upᵀ)
  int64_t group_stride, row_stride, up_stride;
  int rows, group, inputs, parts;
  LinearPart<T> part[kLinearParts];
  Activation activation;

  __device__ const T* row(int r) const {
    const int before = r < group ? 0 : int(unsigned(r) / unsigned(group));
    return x + before * group_stride + (r - before * group) * row_stride;
  }
  __device__ const LinearPart<T>& part_of(int block) const {
    int which = 0;
#pragma unroll
    for (int i = 1; i < kLinearParts; ++i) which += block >= part[i].first_block;  // beyond the last part no block is
    return part[which];
  }
};

constexpr int kLinearWarps = 8;
constexpr int kLinearTile = 16;    // outputs of two mma
constexpr int kLinearRows = 8;     // half of their rows
constexpr int kLinearSpan = 64;    // columns that a warp adds up one after the other: 128 bytes of each row
constexpr int kLinearAhead = 1024; // columns that are prefetched before the previous kernel ends: 17 MB by all resident blocks

// 8 columns from `column` on of a row of `length`; what is missing is 0.
template <typename T, bool kAligned>
__device__ inline uint4 load_columns(const T* row, int column, int length, bool ok) {
  if constexpr (kAligned) {
    return load_eight(row + column, ok && column < length);
  } else {
    Pack<T, 8> values;
#pragma unroll
    for (int i = 0; i < 8; ++i) values.value[i] = ok && column + i < length ? row[column + i] : from_float<T>(0.f);
    return *reinterpret_cast<const uint4*>(&values);
  }
}

// A span of columns, or half of one, of a warp's outputs and rows: a lane (g, c) has columns 32 i + 8 c to 32 i + 8 c + 7 of outputs
// g and g + 8 of each tile, and of rows g and g + 8.
template <typename T, int kOutputTiles, int kRowTiles>
struct LinearRun {
  static constexpr int kLoads = 2 / kOutputTiles;
  uint4 weight[2 * kOutputTiles][kLoads], x[kRowTiles][kLoads];

  __device__ void add_to(float (&sums)[2 * kOutputTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint4 low = x[0][i], high = kRowTiles == 2 ? x[kRowTiles - 1][i] : uint4{0, 0, 0, 0};
#pragma unroll
      for (int t = 0; t < 2 * kOutputTiles; ++t) {
        const uint4 w = weight[t][i];
        mma_16x8x16<T>(sums[t], {low.x, high.x, low.y, high.y}, {w.x, w.y});
        mma_16x8x16<T>(sums[t], {low.z, high.z, low.w, high.w}, {w.z, w.w});
      }
    }
  }
};

template <typename T>
__device__ float rounded_to(float value) {
  return to_float(from_float<T>(value));
}

// Grid (outputs / (16 kOutputTiles), or / 16 in a gated layer, whose second tile is of `up`; rows / (8 kRowTiles)), rounded up
// for each part.
template <typename T, int kOutputTiles, int kRowTiles, bool kAligned, bool kGated>
__global__ void __launch_bounds__(kLinearWarps * kWarp, !kAligned ? 1 : kOutputTiles + kRowTiles == 2 ? 3 : 2)
linear_kernel(const __grid_constant__ LinearArgs<T> args) {
  using Run = LinearRun<T, kOutputTiles, kRowTiles>;
  constexpr int kProducts = kLinearTile * kOutputTiles, kRows = kLinearRows * kRowTiles;
  constexpr int kOutputs = kGated ? kLinearTile : kProducts;
  constexpr int kApart = kLinearWarps * kLinearSpan, kNext = Run::kLoads == 2 ? kApart : 32, kBoth = 2 * kApart / kOutputTiles;
  alignas(8) __shared__ float parts[kLinearWarps][kRows][kProducts + 8];  // + 8: rows of neighbouring g in other banks
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const LinearPart<T>& part = args.part_of(blockIdx.x);
  const int first_output = (blockIdx.x - part.first_block) * kOutputs, first_row = blockIdx.y * kRows;
  // Of the block's rows of W, those of `up` last.
  const auto weight_row = [&](int product) {
    const bool second = kGated && product >= kLinearTile;
    const int output = min(first_output + product - (second ? kLinearTile : 0), part.outputs - 1);
    return second ? args.up + output * args.up_stride : part.weight + output * part.weight_stride;
  };
  constexpr int kShare = kProducts / kLinearWarps;  // the lanes of a warp ask one after the other
  if (kAligned && lane < kShare)
    prefetch_l2(weight_row(warp * kShare + lane), min(args.inputs, kLinearAhead) * unsigned(sizeof(T)));
  allow_next_kernel();  // its blocks ask for their rows of W while this one waits, and while its last ones end
  wait_for_previous_kernel();

  const T *weight[2 * kOutputTiles], *x[kRowTiles];
#pragma unroll
  for (int t = 0; t < 2 * kOutputTiles; ++t)
    weight[t] = weight_row(8 * t + g) + warp * kLinearSpan + 8 * c;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
    x[r] = args.row(min(first_row + kLinearRows * r + g, args.rows - 1)) + warp * kLinearSpan + 8 * c;
  int left = args.inputs - 8 * c - warp * kLinearSpan;  // columns behind those that the pointers are at
  // The run `ahead` columns behind the pointers.
  const auto load = [&](Run& run, int ahead) {
#pragma unroll
    for (int i = 0; i < Run::kLoads; ++i) {
      const int at = ahead + 32 * i;
#pragma unroll
      for (int t = 0; t < 2 * kOutputTiles; ++t) run.weight[t][i] = load_columns<T, kAligned>(weight[t], at, left, true);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        run.x[r][i] = load_columns<T, kAligned>(x[r], at, left, first_row + kLinearRows * r + g < args.rows);
    }
  };
  float sums[2 * kOutputTiles][4] = {};
  Run even, odd;
  const int runs = kOutputTiles * ((args.inputs - warp * kLinearSpan + kApart - 1) / kApart);
  if (runs > 0) load(even, 0);
  if (runs > 1) load(odd, kNext);
  // Each run is asked for as soon as the one before it in its registers is done. The compiler lets nothing go before a branch that
  // it follows: without them both products wait before anything is loaded.
#pragma unroll 1
  for (int run = 0; run < runs; run += 2) {
    even.add_to(sums);
    if (run + 2 < runs) load(even, kBoth);
    if (run + 1 < runs) odd.add_to(sums);
    if (run + 3 < runs) load(odd, kBoth + kNext);
    left -= kBoth;
#pragma unroll
    for (int t = 0; t < 2 * kOutputTiles; ++t) weight[t] += kBoth;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) x[r] += kBoth;
  }

#pragma unroll
  for (int t = 0; t < 2 * kOutputTiles; ++t) {
#pragma unroll
    for (int half = 0; half < kRowTiles; ++half)
      *reinterpret_cast<float2*>(&parts[warp][g + 8 * half][8 * t + 2 * c]) = make_float2(sums[t][2 * half], sums[t][2 * half + 1]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kOutputs; i += kLinearWarps * kWarp) {
    const int r = i / kOutputs, o = i % kOutputs, row = first_row + r, output = first_output + o;
    if (row >= args.rows || output >= part.outputs) continue;
    const auto product = [&](int at) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kLinearWarps; ++w) sum += parts[w][r][at];
      return sum;
    };
    float result = product(o);
    if constexpr (kGated) {  // rounded where eager code rounds
      const float gate = activated(args.activation, rounded_to<T>(result), [](float v) { return expf(v); },
                                   [](float v) { return tanhf(v); });
      result = rounded_to<T>(gate) * rounded_to<T>(product(o + kLinearTile));
    } else if (part.bias) {
      result += to_float(part.bias[output]);
    }
    part.out[int64_t(row) * part.outputs + output] = from_float<T>(result);
  }
}

// ------------------------------------------------------------------------------------------------------------ host

template <typename T>
bool linear_aligned(const LinearArgs<T>& args) {
  constexpr int kVec = kAccessBytes / sizeof(T);
  const auto based = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0; };
  const auto whole = [](int64_t elements) { return elements % kVec == 0; };
  bool aligned = based(args.x) && based(args.up) && whole(args.inputs) && whole(args.group_stride) && whole(args.row_stride) &&
                 whole(args.up_stride);
  for (int i = 0; i < args.parts; ++i) aligned = aligned && based(args.part[i].weight) && whole(args.part[i].weight_stride);
  return aligned;
}

// Calls start(kernel, grid) for the instance that fits; shares the grid out among the parts.
template <typename T, typename Start>
void with_linear_kernel(LinearArgs<T>& args, int multiprocessors, Start&& start) {
  const auto run = [&](auto kernel, int outputs, int rows) {
    int blocks = 0;
    for (int i = 0; i < kLinearParts; ++i) {
      args.part[i].first_block = i < args.parts ? blocks : std::numeric_limits<int>::max();
      blocks += i < args.parts ? (args.part[i].outputs + outputs - 1) / outputs : 0;
    }
    start(kernel, dim3(blocks, (args.rows + rows - 1) / rows));
  };
  int64_t outputs = 0;
  for (int i = 0; i < args.parts; ++i) outputs += args.part[i].outputs;
  const bool aligned = linear_aligned(args), tall = args.rows > kLinearRows;
  if (args.up) {
    if (!aligned) return run(linear_kernel<T, 2, 1, false, true>, 16, 8);
    return tall ? run(linear_kernel<T, 2, 2, true, true>, 16, 16) : run(linear_kernel<T, 2, 1, true, true>, 16, 8);
  }
  if (!aligned) return run(linear_kernel<T, 1, 1, false, false>, 16, 8);
  // Two tiles of outputs halve what is read of x, which up to 4 rows is an eighth of what is read of W, and less than smaller
  // blocks gain at the end. For 16 rows, where it is as much, three blocks for four multiprocessors will do; for 8 the blocks
  // have to be enough to fill them as well.
  const bool wide = args.rows > kLinearRows / 2 && outputs >= (tall ? 3 : 8) * kLinearTile / 2 * multiprocessors;
  if (wide) return tall ? run(linear_kernel<T, 2, 2, true, false>, 32, 16) : run(linear_kernel<T, 2, 1, true, false>, 32, 8);
  tall ? run(linear_kernel<T, 1, 2, true, false>, 16, 16) : run(linear_kernel<T, 1, 1, true, false>, 16, 8);
}

}  // namespace ras::cuda
