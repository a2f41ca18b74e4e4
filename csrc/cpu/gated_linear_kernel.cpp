// out = x + gate·(M x) for a few rows: a matrix-vector product bound by reading M.
//
// A row of M is read from memory once and meets all rows while it is in L1, four at a time, so that it is widened once for four.
#include "cpu/gated_linear.h"

#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

static_assert(kGatedPad % kPair == 0);

constexpr int kRows = 4;  // rows that share one pass over a row of M

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

// dots[n] = weight · row n for N rows. Two pairs at a time: one chain of additions a row would wait for itself.
template <class T, int N>
void dots_of(const GatedArgs& args, const T* weight, int64_t first, float* dots) {
  const float* rows = args.rows + first * args.padded;
  Pair even[N] = {}, odd[N] = {};
  int64_t i = 0;
  for (; i + 2 * kPair <= args.length; i += 2 * kPair) {
    const Pair low = load_pair(weight + i), high = load_pair(weight + i + kPair);
    for (int n = 0; n < N; ++n) {
      even[n] += low * load_pair(rows + n * args.padded + i);
      odd[n] += high * load_pair(rows + n * args.padded + i + kPair);
    }
  }
  each_pair(args.length - i, [&](int64_t j, auto count) {
    const Pair rest = load_pair(weight + i + j, count);
    for (int n = 0; n < N; ++n) even[n] += rest * load_pair(rows + n * args.padded + i + j);
  });
  for (int n = 0; n < N; ++n) dots[n] = sum(even[n] + odd[n]);
}

template <class T, int N>
void outputs_of(const GatedArgs& args, int64_t i, int64_t first) {
  float dots[N];
  dots_of<T, N>(args, static_cast<const T*>(args.weight) + i * args.weight_stride, first, dots);
  for (int n = 0; n < N; ++n) {
    const int64_t r = first + n;
    if (args.partial) {
      args.partial[r * args.outputs + i] = dots[n];
      continue;
    }
    const float x = load(static_cast<const T*>(args.x[r]) + i, 1)[0];
    store(static_cast<T*>(args.out[r]) + i, splat(x + args.gates[r] * dots[n]), 1);
  }
}

template <class T>
void outputs_typed(const GatedArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t r = 0;
    for (; r + kRows <= args.count; r += kRows) outputs_of<T, kRows>(args, i, r);
    switch (args.count - r) {
      case 3: outputs_of<T, 3>(args, i, r); break;
      case 2: outputs_of<T, 2>(args, i, r); break;
      case 1: outputs_of<T, 1>(args, i, r); break;
    }
  }
}

}  // namespace

void gated_widen(const WidenArgs& args) {
  for_dtype(args.dtype, [&](auto zero) { widen_typed<decltype(zero)>(args); });
}

void gated_outputs(const GatedArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) { outputs_typed<decltype(zero)>(args, begin, end); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
