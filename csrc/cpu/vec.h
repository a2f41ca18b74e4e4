// Vectors of float as wide as the instruction set that this file is compiled for (-DRAS_FAST_ISA=avx512|avx2|portable).
//
// GCC's vector extension, so that one source serves every ISA. Everything lives in a namespace named after the ISA: were two
// ISAs to share an inline function, the linker could keep the AVX-512 copy for a machine that does not have it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/dtype.h"

namespace ras::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace RAS_FAST_ISA {

// Calls body(T{}) with the element type that `dtype` names.
template <class Body>
inline void for_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
  }
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

inline vfloat splat(float value) { return value - vfloat{}; }  // a broadcast; value + 0 would be an addition, which −0 needs
inline vint splat(int32_t value) { return vint{} + value; }
inline vuint splat(uint32_t value) { return vuint{} + value; }

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Leaves a loaded value in its register, where the compiler would load it anew for each instruction that uses it.
template <class V>
inline void keep([[maybe_unused]] V& value) {
#if RAS_FAST_X86
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// Values of T to float and back, round to nearest even, NaN kept.

inline vfloat widen(bf16, vhalf raw) { return bits<vfloat>(__builtin_convertvector(raw, vuint) << 16); }

inline vuint rounded_bf16_bits(vfloat value) {
  const vuint raw = bits<vuint>(value);
  const vuint rounded = raw + 0x7fffu + ((raw >> 16) & 1u);
  return (value == value) ? rounded : (raw | 0x400000u);
}

inline vhalf narrow(bf16, vfloat value) { return __builtin_convertvector(rounded_bf16_bits(value) >> 16, vhalf); }

#if defined(__AVX512F__)
inline vfloat widen(f16, vhalf raw) { return (vfloat)_mm512_cvtph_ps((__m256i)raw); }
inline vhalf narrow(f16, vfloat value) { return (vhalf)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
inline vfloat widen(f16, vhalf raw) { return (vfloat)_mm256_cvtph_ps((__m128i)raw); }
inline vhalf narrow(f16, vfloat value) { return (vhalf)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
inline vfloat widen(f16, vhalf raw) { return (vfloat)vcvt_f32_f16((float16x4_t)raw); }
inline vhalf narrow(f16, vfloat value) { return (vhalf)vcvt_f16_f32((float32x4_t)value); }
#else
inline float widen_scalar(uint16_t raw) {
  const uint32_t sign = uint32_t(raw & 0x8000) << 16, exponent = (raw >> 10) & 31, mantissa = raw & 0x3ff;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return bits<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  return bits<float>(sign | bits<uint32_t>(float(mantissa) * 0x1p-24f));  // subnormal
}
inline uint16_t narrow_scalar(float value) {
  const uint32_t raw = bits<uint32_t>(value), sign = (raw >> 16) & 0x8000, magnitude = raw & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);                // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);               // rounds to infinity
  if (magnitude < 0x38800000u)                                                // subnormal: the adder rounds for us
    return uint16_t(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u));
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}
inline vfloat widen(f16, vhalf raw) {
  vfloat out;
  for (int i = 0; i < kLanes; ++i) out[i] = widen_scalar(raw[i]);
  return out;
}
inline vhalf narrow(f16, vfloat value) {
  vhalf out;
  for (int i = 0; i < kLanes; ++i) out[i] = narrow_scalar(value[i]);
  return out;
}
#endif

#if defined(__AVX512BF16__)
// sum plus the products of neighbours, of which a lane of x and y holds two. Numbers below 2^−126 count as 0.
inline vfloat add_products(vfloat sum, vuint x, vuint y) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
// In one instruction, which takes what is below 2^−126 for 0.
inline vhalf narrow_fast(vfloat value) { return (vhalf)_mm512_cvtneps_pbh((__m512)value); }
#endif

template <class V>
inline V load_raw(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// A vector's worth of elements, all of them (Full) or only the first `count`; what is missing loads as 0.
struct Full {};

template <class V, class T>
inline V load_raw(const T* from, Full) {
  return load_raw<V>(from);
}
template <class V, class T>
inline V load_raw(const T* from, int count) {
  T padded[sizeof(V) / sizeof(T)] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load_raw<V>(padded);
}

inline vfloat load(const float* from) { return load_raw<vfloat>(from); }
template <class T>
inline vfloat load(const T* from) {
  return widen(T{}, load_raw<vhalf>(from));
}

// Full, or the first elements as in load_raw.
inline vfloat load(const float* from, auto count) { return load_raw<vfloat>(from, count); }
template <class T>
inline vfloat load(const T* from, auto count) {
  return widen(T{}, load_raw<vhalf>(from, count));
}

// body(i, count) for every kStep elements of a row of `size`, and for what is left.
template <int kStep, class F>
inline void each_part(int64_t size, F&& body) {
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) body(i, Full{});
  if (i < size) body(i, int(size - i));
}

inline void store(float* to, vfloat value) { std::memcpy(to, &value, sizeof(value)); }
template <class T>
inline void store(T* to, vfloat value) {
  const vhalf raw = narrow(T{}, value);
  std::memcpy(to, &raw, sizeof(raw));
}

// The first `count` elements only.
template <class T>
inline void store(T* to, vfloat value, int count) {
  T part[kLanes];
  store(part, value);
  std::memcpy(to, part, count * sizeof(T));
}

// `count` elements of a row into whole vectors of float: those past the last element are filled up with 0.
template <class T>
inline void widen_row(float* to, const T* from, int64_t count) {
  each_part<kLanes>(count, [&](int64_t i, auto part) { store(to + i, load(from + i, part)); });
}

// What T keeps of a value.
inline vfloat rounded(float, vfloat value) { return value; }
inline vfloat rounded(bf16, vfloat value) { return bits<vfloat>(rounded_bf16_bits(value) & 0xffff0000u); }
inline vfloat rounded(f16, vfloat value) { return widen(f16{}, narrow(f16{}, value)); }

inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

// Lanes i and i + kDistance trade places; reductions halve the distance from kLanes / 2 to 1.
template <int kDistance>
inline vfloat swapped(vfloat value) {
  vint order;
  for (int i = 0; i < kLanes; ++i) order[i] = i ^ kDistance;
  return __builtin_shuffle(value, order);
}
template <int kDistance = kLanes / 2>
inline float sum(vfloat value) {
  value += swapped<kDistance>(value);
  if constexpr (kDistance == 1) return value[0];
  else return sum<kDistance / 2>(value);
}
template <int kDistance = kLanes / 2>
inline float max(vfloat value) {
  value = max(value, swapped<kDistance>(value));
  if constexpr (kDistance == 1) return value[0];
  else return max<kDistance / 2>(value);
}

// The sums of kLanes vectors at once: lane i is the sum of v[i]'s lanes. Neighbours are added while they are interleaved, one
// level of the tree at a time: three instructions for two vectors where summing each by itself takes ten.
template <int kStep>
inline vfloat interleaved_add(vfloat a, vfloat b) {
  vint own, other;
  for (int i = 0; i < kLanes; ++i) {
    const int from_b = i & kStep ? kLanes : 0;
    own[i] = i + from_b;
    other[i] = (i ^ kStep) + from_b;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}
template <int kCount = kLanes>
inline vfloat sum_each(const vfloat* v) {
  if constexpr (kCount == 1) return v[0];
  else return interleaved_add<kCount / 2>(sum_each<kCount / 2>(v), sum_each<kCount / 2>(v + kCount / 2));
}

// What turns the bits of 1.5·2²³ + n into n's exponent bits. Unsigned, because far below 2^−126 it wraps around.
constexpr uint32_t kExponentOfSum = 127u - 0x4b400000u;

// e^x within 2 ulp: x = n·ln2 + r, |r| ≤ ln2/2, degree-6 polynomial of r, times 2^n. NaN stays NaN; below −87.3, where the
// result would be subnormal, it is 0.
inline vfloat exp(vfloat x) {
  const vfloat clamped = (x > 88.0f) ? splat(88.0f) : x;
  const vfloat shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5·2²³: the sum's low bits are the rounded n
  const vfloat n = shifted - 12582912.0f;
  const vfloat r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  constexpr float kTaylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  vfloat p = splat(1.0f / 720);
  for (const float coefficient : kTaylor) p = p * r + coefficient;
  const vfloat power = bits<vfloat>((bits<vuint>(shifted) + kExponentOfSum) << 23);
  return (x < -87.3f) ? splat(0.0f) : p * power;
}

// 2^x for x ≤ 0, likewise: n is x rounded, and what is left needs no second constant.
inline vfloat exp2_of_negative(vfloat x) {
  const vfloat shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  constexpr float kTaylor[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
  vfloat p = splat(1.54035304e-4f);
  for (const float coefficient : kTaylor) p = p * r + coefficient;
  const vfloat power = bits<vfloat>((bits<vuint>(shifted) + kExponentOfSum) << 23);
  return (x < -126.0f) ? splat(0.0f) : p * power;
}

// Whether a comparison holds in some lane.
inline bool any(vint holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)holds) != 0;
#else
  int32_t some = 0;
  for (int i = 0; i < kLanes; ++i) some |= holds[i];
  return some != 0;
#endif
}

// By e^2x, and by its series near 0, where 1 − 2 / (e^2x + 1) cancels.
inline vfloat tanh(vfloat x) {
  const vfloat square = x * x;
  constexpr float kSeries[] = {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f};
  vfloat p = splat(62.0f / 2835);
  for (const float coefficient : kSeries) p = p * square + coefficient;
  return (square < 0.0625f) ? x * p : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
}

inline vfloat capped(vfloat s, float softcap) { return softcap * tanh(s * (1 / softcap)); }

}  // namespace RAS_FAST_ISA
}  // namespace ras::cpu
