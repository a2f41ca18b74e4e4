// What the launchers of linear, linears and linear_glu on every device refuse.
#pragma once

#include "common/activation.h"
#include "common/tensor.h"

namespace ras {

// beside(tensor): whether it lies on the launcher's device with a contiguous last dimension.
template <class Beside>
void guard_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Beside& beside) {
  const auto like_x = [&](const Tensor& tensor) { return beside(tensor) && raw_dtype(tensor) == raw_dtype(x); };
  STD_TORCH_CHECK(beside(x) && x.size(x.dim() - 1) > 0 && like_x(weight) && weight.dim() == 2 &&
                      weight.size(1) == x.size(x.dim() - 1) &&
                      (!bias || (like_x(*bias) && bias->dim() == 1 && bias->size(0) == weight.size(0))),
                  "ras_fast linear: x must be [..., K], weight [N, K] and bias [N], on this device, of one dtype, with "
                  "contiguous last dimensions");
}

template <class Beside>
void guard_linears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<MaybeTensor>& biases,
                   const Beside& beside) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == biases.size(),
                  "ras_fast linears: weights must not be empty, and biases must be as many");
  for (size_t i = 0; i < weights.size(); ++i) guard_linear(x, weights[i], biases[i], beside);
}

template <class Beside>
Activation guard_glu(const Tensor& x, const Tensor& gate, const Tensor& up, const std::string& name, const Beside& beside) {
  guard_linear(x, gate, {}, beside);
  guard_linear(x, up, {}, beside);
  const Activation activation = activation_of(name);
  STD_TORCH_CHECK(up.size(0) == gate.size(0) && activation != Activation::none,
                  "ras_fast linear_glu: gate and up must be of one size, activation silu or gelu_tanh");
  return activation;
}

}  // namespace ras
