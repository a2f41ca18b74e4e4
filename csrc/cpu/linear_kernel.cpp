// Products of a matrix M with a few rows, bound by reading M.
//
// Rows are widened to float once. M comes from memory once, a block of its rows at a time, and meets all others while it is in the
// cache. A product is summed in the same order whatever is computed beside it: a row's result does not depend on the other rows.
#include "cpu/linear.h"

#include <cmath>

#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

static_assert(kLinearPad % kPair == 0);

// Rows of M and others that are multiplied at a time: as many as leave their sums in registers. A cache gives some 20 bytes a cycle,
// so what is loaded has to be used often.
constexpr int kOutputs = 4, kRows = kLanes == 16 ? 4 : 2;

template <class T>
void widen_typed(const WidenArgs& args) {
  for (int64_t r = 0; r < args.count; ++r) {
    float* target = args.target + r * args.padded;
    for (int64_t i = args.length / kPair * kPair; i < args.padded; ++i) target[i] = 0;
    each_pair(args.length, [&](int64_t i, auto count) {
      if (args.source_float)
        store_pair(target + i, in_order_of(T{}, load_pair(static_cast<const float*>(args.source[r]) + i, count)));
      else
        store_pair(target + i, load_pair(static_cast<const T*>(args.source[r]) + i, count));
    });
  }
}

// A row of M, and how many elements further the next block has one in its place.
template <class T>
struct MatrixRow {
  const T* data;
  int64_t ahead;
};

// dots[r][o] = matrix[o]·row (first + r).
template <class T, int kOut, int kCount>
void dots_of(const LinearArgs& args, const MatrixRow<T> (&matrix)[kOut], int64_t first, float (&dots)[kCount][kOut]) {
  const float* rows = args.rows + first * args.padded;
  // The processor itself looks ahead too little to add and to wait for memory at a time: the passes over a block ask for the next
  // one, each for its share.
  const int64_t step = kPair / ((args.count + kRows - 1) / kRows);
  int64_t next = args.length * first / args.count;
  vfloat sums[kCount][kOut] = {};
  each_pair(args.length, [&](int64_t at, auto count) {
    Pair row[kCount];
    for (int r = 0; r < kCount; ++r) row[r] = load_pair(rows + r * args.padded + at);
    for (int o = 0; o < kOut; ++o) {
      Pair values = load_pair(matrix[o].data + at, count);
      keep(values.a);
      keep(values.b);
      __builtin_prefetch(matrix[o].data + matrix[o].ahead + next, 0, 2);
      for (int r = 0; r < kCount; ++r) {
        sums[r][o] += values.a * row[r].a;
        sums[r][o] += values.b * row[r].b;
      }
    }
    next += step;
  });
  for (int r = 0; r < kCount; ++r)
    for (int o = 0; o < kOut; ++o) dots[r][o] = sum(sums[r][o]);
}

// use(r, dots) for each row r, whose products with kOut rows of M are `dots`.
template <class T, int kOut, int kCount = kRows, class Use>
void each_row(const LinearArgs& args, const MatrixRow<T> (&matrix)[kOut], Use&& use, int64_t first = 0) {
  for (; first + kCount <= args.count; first += kCount) {
    float dots[kCount][kOut];
    dots_of(args, matrix, first, dots);
    for (int r = 0; r < kCount; ++r) use(first + r, dots[r]);
  }
  if constexpr (kCount > 1) each_row<T, kOut, kCount / 2>(args, matrix, use, first);
}

template <class T>
void put(const LinearArgs& args, int64_t row, int64_t i, float dot) {
  if (args.partial) {
    args.partial[row * args.outputs + i] = dot;
    return;
  }
  if (args.factor) dot *= args.factor[row];
  if (args.base) dot += load(static_cast<const T*>(args.base[row]) + i, 1)[0];
  store(static_cast<T*>(args.out[row]) + i, splat(dot), 1);
}

// Outputs i .. i + kOut.
template <class T, int kOut>
void outputs_of(const LinearArgs& args, int64_t i) {
  MatrixRow<T> matrix[kOut];
  for (int o = 0; o < kOut; ++o)
    matrix[o] = {static_cast<const T*>(args.weight) + (i + o) * args.weight_stride, kOut * args.weight_stride};
  each_row(args, matrix, [&](int64_t row, const float(&dots)[kOut]) {
    for (int o = 0; o < kOut; ++o) put<T>(args, row, i + o, dots[o]);
  });
}

template <class T>
float rounded_to(float value) {
  return rounded(T{}, splat(value))[0];
}

// Outputs i .. i + kOut of a gated linear layer, rounded where eager code rounds.
template <class T, int kOut>
void gated_of(const LinearArgs& args, int64_t i) {
  MatrixRow<T> matrix[2 * kOut];
  for (int o = 0; o < kOut; ++o) {
    matrix[o] = {static_cast<const T*>(args.weight) + (i + o) * args.weight_stride, kOut * args.weight_stride};
    matrix[kOut + o] = {static_cast<const T*>(args.up) + (i + o) * args.up_stride, kOut * args.up_stride};
  }
  each_row(args, matrix, [&](int64_t row, const float(&dots)[2 * kOut]) {
    for (int o = 0; o < kOut; ++o) {
      const float gate = activated(args.activation, rounded_to<T>(dots[o]), [](float v) { return std::exp(v); },
                                   [](float v) { return std::tanh(v); });
      store(static_cast<T*>(args.out[row]) + i + o, splat(rounded_to<T>(gate) * rounded_to<T>(dots[kOut + o])), 1);
    }
  });
}

template <class T>
void outputs_typed(const LinearArgs& args, int64_t begin, int64_t end) {
  int64_t i = begin;
  if (args.up) {
    for (; i + kOutputs / 2 <= end; i += kOutputs / 2) gated_of<T, kOutputs / 2>(args, i);
    for (; i < end; ++i) gated_of<T, 1>(args, i);
    return;
  }
  for (; i + kOutputs <= end; i += kOutputs) outputs_of<T, kOutputs>(args, i);
  for (; i < end; ++i) outputs_of<T, 1>(args, i);
}

}  // namespace

void linear_widen(const WidenArgs& args) {
  for_dtype(args.dtype, [&](auto zero) { widen_typed<decltype(zero)>(args); });
}

void linear_outputs(const LinearArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) { outputs_typed<decltype(zero)>(args, begin, end); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
