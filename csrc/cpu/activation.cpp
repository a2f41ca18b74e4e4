// CPU launcher of gelu_tanh and quick_gelu.
#include "cpu/activation.h"

#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

Tensor gelu(Gelu kind, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "ras_fast activation: x must be contiguous");
  Tensor y = empty(sizes_of(x), raw_dtype(x));
  const GeluArgs args{.kind = kind, .dtype = dtype_of(x), .x = data_of<const void>(x), .y = data_of<void>(y)};
  auto* elements = pick_gelu_elements();
  share_out(x.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) { elements(args, begin, end); });
  return y;
}

}  // namespace

Tensor gelu_tanh(const Tensor& x) { return gelu(Gelu::tanh, x); }
Tensor quick_gelu(const Tensor& x) { return gelu(Gelu::quick, x); }

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("gelu_tanh", TORCH_BOX(&gelu_tanh));
  m.impl("quick_gelu", TORCH_BOX(&quick_gelu));
}

}  // namespace ras::cpu
