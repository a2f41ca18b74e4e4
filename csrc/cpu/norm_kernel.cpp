// One row of residual add + steering + RMSNorm or LayerNorm: x and residual are read once, h and y written once. y may lie
// over x and h over residual. An x that has a norm of its own is read twice, the second time from L1.
//
// Memory is prefetched: the first pass over a row fetches the lines of this row's y and of the next row's x, the second pass
// those of the next row's residual and h (docs/kernels.md). The second pass reads h back from where the first has stored it, by
// then in L1. Where the norm must see an h of more precision than is stored, or LayerNorm has centred it, the row is kept as
// floats in between, in the pairs' order, so that statistics and normalisation see one value whatever the dtype.
#include "cpu/norm.h"

#include <cstdlib>
#include <type_traits>

#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

template <bool Hf, class T>
inline Pair rounded_if(Pair value) {
  if constexpr (Hf) return rounded(T{}, value);
  return value;
}

// Prefetches the lines of a pair of elements, to be read (0) or written (1). Past the last row the hint has no effect.
template <int kWrite, class T>
inline void prefetch(const T* pair) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < kPair; i += kLine) __builtin_prefetch(pair + i, kWrite, 3);
}

// How row t is steered. An invalid slot cannot be reported from here: its row becomes NaN, never silently unsteered.
struct Steering {
  enum Kind { none, push, invalid } kind = none;
  int64_t slot = 0;
  float alpha = 0;

  Steering(const NormArgs& args, int64_t t) {
    if (!args.vectors.data) return;
    slot = args.slot[t];
    alpha = std::isnan(args.alpha[t]) ? NAN : args.alpha[t];  // the NaN that survives rounding to bf16 (pair.h)
    if (slot < -1 || slot >= args.vectors.rows) {
      kind = invalid;
    } else if (slot >= 0 && alpha != 0) {
      kind = push;
    }
  }
};

// T: dtype of x, residual, y and h. W: dtype of every table (weight, bias, vectors, probes). What the passes share is compiled
// once for RMSNorm with and without an offset.
template <class T, class W, bool Layer, bool Hf>
struct RowKernel {
  const NormArgs& args;
  float* row;  // d floats, rounded up to whole pairs

  static constexpr bool kReadsBack = Hf && !Layer;

  const T* x(int64_t t) const { return static_cast<const T*>(args.x.data) + args.x.offset(t); }
  const T* residual(int64_t t) const {
    return args.residual.data ? static_cast<const T*>(args.residual.data) + args.residual.offset(t) : nullptr;
  }
  T* y(int64_t t) const { return static_cast<T*>(args.y) + t * args.d; }
  T* h(int64_t t) const { return args.h ? static_cast<T*>(args.h) + t * args.d : nullptr; }

  // Row t as the first pass has left it: load(i, count).
  auto kept(int64_t t) const {
    const T* stored = args.h ? h(t) : x(t);
    return [stored, row = row](int64_t i, auto count) {
      if constexpr (kReadsBack) return load_pair(stored + i, count);
      return load_pair(row + i);
    };
  }

  const W* table(const Table& from, int64_t index) const { return static_cast<const W*>(from.data) + index * from.stride; }

  // scale · value · weight, the last step of RMSNorm.
  template <bool Offset, class Count>
  Pair weighted(Pair value, float scale, const W* weight, Count count) const {
    value = scale * value;
    Pair w = load_table<T>(weight, count);
    if constexpr (Offset) return value * (w + args.weight_offset);
    return rounded_if<Hf, T>(value) * w;
  }

  float scale_of(float square_sum) const { return 1 / std::sqrt(square_sum / args.d + args.eps); }

  // What normalises row t of x by itself.
  float x_scale(int64_t t) const {
    const T* in = x(t);
    Pair total{};
    each_pair(args.d, [&](int64_t i, auto count) {
      const Pair value = load_pair(in + i, count);
      total += value * value;
    });
    return scale_of(sum(total));
  }

  // h of row t into args.h and where `kept` finds it; returns its sum of squares, or for LayerNorm its sum.
  template <bool Add>
  float first_pass(int64_t t, const Steering& steering) const {
    if constexpr (!Layer) {
      if (args.x_weight.data && args.weight_offset != 0) return first_pass<Add, true, true>(t, steering);
      if (args.x_weight.data) return first_pass<Add, true, false>(t, steering);
    }
    return first_pass<Add, false, false>(t, steering);
  }

  template <bool Add, bool NormX, bool Offset>
  float first_pass(int64_t t, const Steering& steering) const {
    const T *in = x(t), *next_in = x(t + 1), *added = residual(t), *out = y(t);
    const W* vector = Add ? table(args.vectors, steering.slot) : nullptr;
    const W* x_weight = NormX ? table(args.x_weight, 0) : nullptr;
    const float scale = NormX ? x_scale(t) : 0;
    const bool scales_x = !Layer && args.scales_x;
    const float x_scale = args.x_scale;
    const float sum_scale = args.scale.data ? load_table<T>(table(args.scale, 0), 1).a[0] : 1;
    T* stored = h(t);
    Pair total{};
    each_pair(args.d, [&](int64_t i, auto count) {
      prefetch<1>(out + i);
      prefetch<0>(next_in + i);
      Pair value = load_pair(in + i, count);
      if constexpr (NormX) value = rounded_if<Hf, T>(weighted<Offset>(value, scale, x_weight + i, count));
      if (scales_x) value = rounded_if<Hf, T>(x_scale * value);
      if (added) value = rounded_if<Hf, T>(value + load_pair(added + i, count));
      if constexpr (NormX) value = rounded_if<Hf, T>(sum_scale * value);
      if constexpr (Add) {  // an infinite alpha times what is missing from the last pair is NaN
        value = rounded_if<Hf, T>(value + present<T>(steering.alpha * load_table<T>(vector + i, count), count));
      }
      if (stored) Hf ? store_rounded(stored + i, value, count) : store_pair(stored + i, value, count);
      if constexpr (!kReadsBack) store_pair(row + i, value);
      total += Layer ? value : value * value;
    });
    return sum(total);
  }

  // Σ (h − mean)², leaving h − mean in `row`: LayerNorm's variance without the cancellation of E[h²] − E[h]².
  float centre(float mean) const {
    Pair total{};
    each_pair(args.d, [&](int64_t i, auto count) {
      const Pair centred = present<T>(load_pair(row + i) + -mean, count);
      store_pair(row + i, centred);
      total += centred * centred;
    });
    return sum(total);
  }

  template <bool Lerp, bool Offset>
  void second_pass(int64_t t, const Steering& steering, float scale) const {
    const W* weight = table(args.weight, 0);
    const W* bias = args.bias.data ? table(args.bias, 0) : nullptr;
    const W* vector = Lerp ? table(args.vectors, steering.slot) : nullptr;
    const T *next_h = h(t + 1), *next_residual = residual(t + 1);
    const auto load = kept(t);
    T* out = y(t);
    each_pair(args.d, [&](int64_t i, auto count) {
      if (next_h) prefetch<1>(next_h + i);
      if (next_residual) prefetch<0>(next_residual + i);
      Pair value = load(i, count);
      if constexpr (Layer) value = scale * value * load_table<T>(weight + i, count);
      if constexpr (!Layer) value = weighted<Offset>(value, scale, weight + i, count);
      if (bias) value += load_table<T>(bias + i, count);
      if constexpr (Lerp) {
        value = (1 - steering.alpha) * rounded_if<Hf, T>(value) + steering.alpha * load_table<T>(vector + i, count);
      }
      store_pair(out + i, value, count);
    });
  }

  void dot_probes(int64_t t) const {
    float* dots = args.probe_dots + t * (args.probes.rows + 1);
    const auto load = kept(t);
    for (int64_t p = 0; p <= args.probes.rows; ++p) {
      Pair total{};
      each_pair(args.d, [&](int64_t i, auto count) {
        const Pair value = load(i, count);
        total += value * (p < args.probes.rows ? load_table<T>(table(args.probes, p) + i, count) : value);
      });
      dots[p] = sum(total);
    }
  }

  void poison(int64_t t) const {
    const Pair nan{splat(NAN), splat(NAN)};
    each_pair(args.d, [&](int64_t i, auto count) {
      store_pair(y(t) + i, nan, count);
      if (args.h) store_pair(h(t) + i, nan, count);
    });
    if (args.probe_dots) {
      for (int64_t p = 0; p <= args.probes.rows; ++p) args.probe_dots[t * (args.probes.rows + 1) + p] = NAN;
    }
  }

  void operator()(int64_t t) const {
    const Steering steering(args, t);
    if (steering.kind == Steering::invalid) return poison(t);
    const bool push = steering.kind == Steering::push, add = push && !args.lerp;
    float total = add ? first_pass<true>(t, steering) : first_pass<false>(t, steering);
    if (args.probe_dots) dot_probes(t);
    if constexpr (Layer) total = centre(total / args.d);
    const float scale = scale_of(total);
    push && args.lerp ? normalise<true>(t, steering, scale) : normalise<false>(t, steering, scale);
  }

  template <bool Lerp>
  void normalise(int64_t t, const Steering& steering, float scale) const {
    if constexpr (!Layer) {
      if (args.weight_offset != 0) return second_pass<Lerp, true>(t, steering, scale);
    }
    second_pass<Lerp, false>(t, steering, scale);
  }
};

template <class T, class W, bool Layer, bool Hf>
void all_rows(const NormArgs& args, int64_t begin, int64_t end) {
  float* row = static_cast<float*>(std::malloc(padded(args.d) * sizeof(float)));
  const RowKernel<T, W, Layer, Hf> kernel{args, row};
  for (int64_t t = begin; t < end; ++t) kernel(t);
  std::free(row);
}

template <class T, class W, bool Layer>
void for_rounding(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr bool kRounds = !std::is_same_v<T, float>;
  if (!kRounds || args.hf_rounding) return all_rows<T, W, Layer, true>(args, begin, end);
  if constexpr (kRounds) all_rows<T, W, Layer, false>(args, begin, end);
}

template <class T, class W>
void for_norm(const NormArgs& args, int64_t begin, int64_t end) {
  args.rms ? for_rounding<T, W, false>(args, begin, end) : for_rounding<T, W, true>(args, begin, end);
}

template <class T>
void for_tables(const NormArgs& args, int64_t begin, int64_t end) {
  args.float_tables ? for_norm<T, float>(args, begin, end) : for_norm<T, T>(args, begin, end);
}

}  // namespace

void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) { for_tables<decltype(zero)>(args, begin, end); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
