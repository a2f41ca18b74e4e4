// out = base + factor·(M row) for a few rows: matrix-vector products bound by reading M.
//
// Rows are widened to float once. M comes from memory once, a block of its rows at a time, and meets all others while it is in the
// cache, so that it is widened once for a block of them. A product is summed in the same order whatever is computed beside it: a
// row's result does not depend on the other rows.
#include "cpu/linear.h"

#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

static_assert(kLinearPad % kPair == 0);

// Rows of M and others that a block multiplies: as many as leave their sums in registers.
constexpr int kOutputs = 2, kRows = kLanes == 16 ? 4 : 2;

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

// Outputs i .. i + kOut of rows first .. first + kCount.
template <class T, int kOut, int kCount>
void block_of(const LinearArgs& args, int64_t i, int64_t first) {
  const T* weight = static_cast<const T*>(args.weight) + i * args.weight_stride;
  const float* rows = args.rows + first * args.padded;
  Pair sums[kOut][kCount] = {};
  each_pair(args.length, [&](int64_t at, auto count) {
    Pair values[kOut];
    for (int o = 0; o < kOut; ++o) {
      const T* from = weight + o * args.weight_stride + at;
      values[o] = load_pair(from, count);
      // The next block's rows of M: the processor itself looks ahead too little to add and to wait for memory at a time.
      if (first == 0) __builtin_prefetch(from + kOut * args.weight_stride, 0, 2);
    }
    for (int r = 0; r < kCount; ++r) {
      const Pair row = load_pair(rows + r * args.padded + at);
      for (int o = 0; o < kOut; ++o) sums[o][r] += values[o] * row;
    }
  });
  for (int r = 0; r < kCount; ++r)
    for (int o = 0; o < kOut; ++o) put<T>(args, first + r, i + o, sum(sums[o][r]));
}

template <class T, int kOut, int kCount = kRows>
void all_rows(const LinearArgs& args, int64_t i, int64_t first = 0) {
  for (; first + kCount <= args.count; first += kCount) block_of<T, kOut, kCount>(args, i, first);
  if constexpr (kCount > 1) all_rows<T, kOut, kCount / 2>(args, i, first);
}

template <class T>
void outputs_typed(const LinearArgs& args, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kOutputs <= end; i += kOutputs) all_rows<T, kOutputs>(args, i);
  for (; i < end; ++i) all_rows<T, 1>(args, i);
}

}  // namespace

void linear_widen(const WidenArgs& args) {
  for_dtype(args.dtype, [&](auto zero) { widen_typed<decltype(zero)>(args); });
}

void linear_outputs(const LinearArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) { outputs_typed<decltype(zero)>(args, begin, end); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
