// Stand-in for the CUDA header of this name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half v) {
  const int sign = v.bits >> 15, exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else {
    magnitude = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  }
  return sign ? -magnitude : magnitude;
}

// Rounds to nearest even: nearbyint() at the spacing that half precision has around |v|.
inline __half __float2half_rn(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float magnitude = std::fabs(v);
  if (v != v) return {0x7fff};
  if (magnitude >= 65520.f) return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int scale = magnitude < 0x1p-14f ? -24 : exponent - 11;
  const int steps = int(std::nearbyint(std::ldexp(magnitude, -scale)));  // up to 2048: carries into the exponent by itself
  return {uint16_t(sign | (scale == -24 ? steps : ((scale + 24) << 10) + steps))};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
