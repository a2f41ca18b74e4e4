// Approximations of GELU, y = x / (1 + e^z), for neighbours in memory, computed in float.
#include "cpu/activation.h"

#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

// tanh: ½ x (1 + tanh u), so z = −2u, with u = √(2/π) (x + 0.044715 x³). By the exponential function: a division less than by the
// hyperbolic tangent, and nothing that cancels. quick: x σ(1.702 x).
template <Gelu kKind>
inline vfloat gelu(vfloat x) {
  const vfloat z = kKind == Gelu::quick ? x * -1.702f : x * (x * x * -0.0713548163f - 1.59576912f);
  return x / (1.0f + (z > 88.0f ? splat(INFINITY) : exp(z)));  // where exp ends, x may still be large
}

template <Gelu kKind, class T>
void gelu_typed(const T* x, T* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, gelu<kKind>(load(x + i)));
  if (const int left = int(count - i)) store(y + i, gelu<kKind>(load(x + i, left)), left);
}

}  // namespace

void gelu_elements(const GeluArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* typed = args.kind == Gelu::quick ? gelu_typed<Gelu::quick, T> : gelu_typed<Gelu::tanh, T>;
    typed(static_cast<const T*>(args.x) + begin, static_cast<T*>(args.y) + begin, end - begin);
  });
}

}  // namespace ras::cpu::RAS_FAST_ISA
