// Two vectors of float that hold 2·kLanes neighbouring elements of a row: the unit in which row kernels walk memory.
//
// For bf16 the pair is the even and the odd elements, not the first and the second half: bf16 is the upper half of a float, so
// that two neighbours sit in one 32-bit lane and a shift and a mask take them apart and put them back, where a half-wise layout
// needs cross-lane shuffles, which go through one port only. Element-wise arithmetic does not care about the order.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {

constexpr int kPair = 2 * kLanes;

struct Pair {
  vfloat a, b;

  Pair& operator+=(Pair other) { return *this = *this + other; }
  friend Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
  friend Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
  friend Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
  friend Pair operator+(Pair x, float y) { return {x.a + y, x.b + y}; }
  friend Pair operator*(float x, Pair y) { return {x * y.a, x * y.b}; }
};

inline float sum(Pair value) { return sum(value.a + value.b); }

inline Pair load_pair(const float* from) { return {load(from), load(from + kLanes)}; }
inline Pair load_pair(const f16* from) { return {load(from), load(from + kLanes)}; }
inline Pair load_pair(const bf16* from) {
  const vuint raw = load_raw<vuint>(from);
  return {bits<vfloat>(raw << 16), bits<vfloat>(raw & 0xffff0000u)};
}

inline void store_pair(float* to, Pair value) {
  store(to, value.a);
  store(to + kLanes, value.b);
}
inline void store_pair(f16* to, Pair value) {
  store(to, value.a);
  store(to + kLanes, value.b);
}

// Round to nearest even without a look at NaN: a NaN whose lower 16 bits are 0, as any that came from bf16 or from arithmetic
// has, stays one.
inline vuint nearest_bf16(vfloat value) {
  const vuint raw = bits<vuint>(value);
  return raw + (((raw >> 16) & 1u) + 0x7fffu);
}
inline void store_pair(bf16* to, Pair value) {
  const vuint packed = (nearest_bf16(value.a) >> 16) | (nearest_bf16(value.b) & 0xffff0000u);
  std::memcpy(to, &packed, sizeof(packed));
}

inline Pair rounded(float, Pair value) { return value; }
inline Pair rounded(f16, Pair value) { return {rounded(f16{}, value.a), rounded(f16{}, value.b)}; }
inline Pair rounded(bf16, Pair value) {
  return {bits<vfloat>(nearest_bf16(value.a) & 0xffff0000u), bits<vfloat>(nearest_bf16(value.b) & 0xffff0000u)};
}

// Stores what `rounded` has already rounded.
inline void store_rounded(float* to, Pair value) { store_pair(to, value); }
inline void store_rounded(f16* to, Pair value) { store_pair(to, value); }
inline void store_rounded(bf16* to, Pair value) {
  const vuint packed = (bits<vuint>(value.a) >> 16) | bits<vuint>(value.b);
  std::memcpy(to, &packed, sizeof(packed));
}

// A pair's worth of elements, all of them (Full) or only the first `count`; what is missing loads as 0 and is not stored.
template <class T>
inline Pair load_pair(const T* from, Full) {
  return load_pair(from);
}
template <class T>
inline Pair load_pair(const T* from, int count) {
  T padded[kPair] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load_pair(padded);
}
template <class T>
inline void store_pair(T* to, Pair value, Full) {
  store_pair(to, value);
}
template <class T>
inline void store_pair(T* to, Pair value, int count) {
  T padded[kPair];
  store_pair(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}
template <class T>
inline void store_rounded(T* to, Pair value, Full) {
  store_rounded(to, value);
}
template <class T>
inline void store_rounded(T* to, Pair value, int count) {
  store_pair(to, value, count);
}

// A float pair in the order of T's pairs.
template <class T>
inline Pair in_order_of(T, Pair value) {
  return value;
}
inline Pair in_order_of(bf16, Pair value) {
  vint even, odd;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return {__builtin_shuffle(value.a, value.b, even), __builtin_shuffle(value.a, value.b, odd)};
}

// What rows of T meet element by element: another row of T, or one of float.
template <class T, class Table, class Count>
inline Pair load_table(const Table* from, Count count) {
  Pair value = load_pair(from, count);
  if constexpr (!std::is_same_v<T, Table>) {
    value = in_order_of(T{}, value);
    // The NaN that survives rounding to bf16.
    value.a = value.a == value.a ? value.a : splat(NAN);
    value.b = value.b == value.b ? value.b : splat(NAN);
  }
  return value;
}

// The pair with its missing elements, in T's order of elements, set to 0.
template <class T>
inline Pair present(Pair value, Full) {
  return value;
}
template <class T>
inline Pair present(Pair value, int count) {
  T ones[kPair];
  store_pair(ones, {splat(1.0f), splat(1.0f)});
  const Pair inside = load_pair(ones, count);
  // Chosen, not multiplied: what is missing may be infinite or NaN.
  return {inside.a != 0.0f ? value.a : vfloat{}, inside.b != 0.0f ? value.b : vfloat{}};
}

// A row's length in whole pairs.
inline int64_t padded(int64_t d) { return (d + kPair - 1) / kPair * kPair; }

// body(i, count) for every pair of a row of d elements.
template <class F>
inline void each_pair(int64_t d, F&& body) {
  each_part<kPair>(d, body);
}

// The same where an element may be computed twice, from a row that is not written: the last pair of a long row is whole and ends
// with it.
template <class F>
inline void each_whole_pair(int64_t d, F&& body) {
  if (d < kPair) return body(0, int(d));
  int64_t i = 0;
  for (; i + kPair <= d; i += kPair) body(i, Full{});
  if (i < d) body(d - kPair, Full{});
}

}  // namespace ras::cpu::RAS_FAST_ISA
