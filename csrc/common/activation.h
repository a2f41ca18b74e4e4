// The activations of gated linear layers.
#pragma once

#include <string>

namespace ras {

enum class Activation : int { none, silu, gelu_tanh };

// `none` for a name that is not known.
inline Activation activation_of(const std::string& name) {
  return name == "silu" ? Activation::silu : name == "gelu_tanh" ? Activation::gelu_tanh : Activation::none;
}

// Of x, by the exponential function and the hyperbolic tangent of the device. constexpr: nvcc compiles it for the GPU, too.
constexpr float activated(Activation activation, float x, auto exp, auto tanh) {
  if (activation == Activation::silu) return x / (1 + exp(-x));
  return 0.5f * x * (1 + tanh(0.797884561f * (x + 0.044715f * x * x * x)));
}

}  // namespace ras
