// One row of residual add + steering + RMSNorm or LayerNorm: x and residual are read once, h and y written once.
//
// Between the two passes the row stays in L1 as float, so that statistics and normalisation see one value whatever the dtype.
#include "cpu/norm.h"

#include <cstdlib>

#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

template <class Count>
inline vfloat load_table(const Table& table, int64_t row, int64_t i, Count count) {
  const int64_t at = row * table.stride + i;
  switch (table.dtype) {
    case DType::f32: return load(static_cast<const float*>(table.data) + at, count);
    case DType::bf16: return load(static_cast<const bf16*>(table.data) + at, count);
    default: return load(static_cast<const f16*>(table.data) + at, count);
  }
}

template <bool Hf, class T>
inline vfloat rounded_if(vfloat value) {
  if constexpr (Hf) return rounded(T{}, value);
  return value;
}

// How row t is steered. An invalid slot cannot be reported from here: its row becomes NaN, never silently unsteered.
struct Steering {
  enum Kind { none, push, invalid } kind = none;
  int64_t slot = 0;
  float alpha = 0;

  Steering(const NormArgs& args, int64_t t) {
    if (!args.vectors.data) return;
    slot = args.slot[t];
    alpha = args.alpha[t];
    if (slot < -1 || slot >= args.vectors.rows) {
      kind = invalid;
    } else if (slot >= 0 && alpha != 0) {
      kind = push;
    }
  }
};

// h of row t into `row` (and args.h). Returns its sum of squares, or for LayerNorm its sum.
template <class T, bool Rms, bool Hf, bool Add>
vfloat first_pass(const NormArgs& args, int64_t t, const Steering& steering, float* row) {
  const T* x = static_cast<const T*>(args.x.data) + args.x.offset(t);
  const T* residual = args.residual.data ? static_cast<const T*>(args.residual.data) + args.residual.offset(t) : nullptr;
  T* stored = args.h ? static_cast<T*>(args.h) + t * args.d : nullptr;
  vfloat total{};
  each_vector(args.d, [&](int64_t i, auto count) {
    vfloat h = load(x + i, count);
    if (residual) h = rounded_if<Hf, T>(h + load(residual + i, count));
    if constexpr (Add) h = rounded_if<Hf, T>(h + steering.alpha * load_table(args.vectors, steering.slot, i, count));
    if (stored) store(stored + i, h, count);
    store(row + i, h);
    total += Rms ? h * h : h;
  });
  return total;
}

template <class T, bool Rms, bool Hf, bool Lerp>
void second_pass(const NormArgs& args, int64_t t, const Steering& steering, const float* row, float mean, float scale) {
  T* y = static_cast<T*>(args.y) + t * args.d;
  each_vector(args.d, [&](int64_t i, auto count) {
    vfloat value = (load(row + i) - mean) * scale;
    vfloat weight = load_table(args.weight, 0, i, count);
    if (Rms && args.weight_offset == 0) {
      value = rounded_if<Hf, T>(value) * weight;
    } else {
      value = value * (weight + args.weight_offset);
    }
    if (args.bias.data) value += load_table(args.bias, 0, i, count);
    if constexpr (Lerp) {
      value = (1 - steering.alpha) * rounded_if<Hf, T>(value) + steering.alpha * load_table(args.vectors, steering.slot, i, count);
    }
    store(y + i, value, count);
  });
}

float squared_distance(const float* row, int64_t d, float mean) {
  vfloat total{};
  each_vector(d, [&](int64_t i, auto count) {
    const vfloat centred = zero_beyond(load(row + i) - mean, count);
    total += centred * centred;
  });
  return sum(total);
}

void dot_probes(const NormArgs& args, int64_t t, const float* row) {
  float* dots = args.probe_dots + t * (args.probes.rows + 1);
  for (int64_t p = 0; p <= args.probes.rows; ++p) {
    vfloat total{};
    each_vector(args.d, [&](int64_t i, auto count) {
      const vfloat h = zero_beyond(load(row + i), count);
      total += p < args.probes.rows ? h * load_table(args.probes, p, i, count) : h * h;
    });
    dots[p] = sum(total);
  }
}

template <class T>
void poison(const NormArgs& args, int64_t t, float* row) {
  each_vector(args.d, [&](int64_t i, auto count) {
    store(row + i, splat(NAN));
    store(static_cast<T*>(args.y) + t * args.d + i, splat(NAN), count);
    if (args.h) store(static_cast<T*>(args.h) + t * args.d + i, splat(NAN), count);
  });
}

template <class T, bool Rms, bool Hf>
void one_row(const NormArgs& args, int64_t t, float* row) {
  const Steering steering(args, t);
  if (steering.kind == Steering::invalid) {
    poison<T>(args, t, row);
  } else {
    const bool push = steering.kind == Steering::push;
    const float total = sum(push && !args.lerp ? first_pass<T, Rms, Hf, true>(args, t, steering, row)
                                               : first_pass<T, Rms, Hf, false>(args, t, steering, row));
    const float mean = Rms ? 0 : total / args.d;
    const float variance = (Rms ? total : squared_distance(row, args.d, mean)) / args.d;
    const float scale = 1 / std::sqrt(variance + args.eps);
    push&& args.lerp ? second_pass<T, Rms, Hf, true>(args, t, steering, row, mean, scale)
                     : second_pass<T, Rms, Hf, false>(args, t, steering, row, mean, scale);
  }
  if (args.probe_dots) dot_probes(args, t, row);
}

template <class T, bool Rms, bool Hf>
void all_rows(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t padded = (args.d + kLanes - 1) / kLanes * kLanes;
  float* row = static_cast<float*>(std::malloc(padded * sizeof(float)));
  for (int64_t t = begin; t < end; ++t) one_row<T, Rms, Hf>(args, t, row);
  std::free(row);
}

template <class T>
void for_dtype(const NormArgs& args, int64_t begin, int64_t end) {
  auto* rows = args.rms ? (args.hf_rounding ? all_rows<T, true, true> : all_rows<T, true, false>)
                        : (args.hf_rounding ? all_rows<T, false, true> : all_rows<T, false, false>);
  rows(args, begin, end);
}

}  // namespace

void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::f32: return for_dtype<float>(args, begin, end);
    case DType::bf16: return for_dtype<bf16>(args, begin, end);
    default: return for_dtype<f16>(args, begin, end);
  }
}

}  // namespace ras::cpu::RAS_FAST_ISA
