// y = ½ x (1 + tanh u) = x / (1 + e^−2u) with u = √(2/π) (x + 0.044715 x³), for neighbours in memory, computed in float.
#include "cpu/activation.h"

#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

// By the exponential function: a division less than by the hyperbolic tangent, and nothing that cancels.
inline vfloat gelu_tanh(vfloat x) {
  const vfloat minus_two_u = x * (x * x * -0.0713548163f - 1.59576912f);
  return x / (1.0f + (minus_two_u > 88.0f ? splat(INFINITY) : exp(minus_two_u)));  // where exp ends, x may still be large
}

}  // namespace

void gelu_tanh_elements(const ActivationArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(args.x) + begin;
    T* y = static_cast<T*>(args.y) + begin;
    int64_t i = 0;
    for (; i + begin + kLanes <= end; i += kLanes) store(y + i, gelu_tanh(load(x + i)));
    if (const int left = int(end - begin - i)) store(y + i, gelu_tanh(load(x + i, left)), left);
  });
}

}  // namespace ras::cpu::RAS_FAST_ISA
