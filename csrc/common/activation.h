// The activations of gated linear layers.
#pragma once

#include <string>

namespace ras {

enum class Activation : int { none, silu, gelu_tanh };

// `none` for a name that is not known.
inline Activation activation_of(const std::string& name) {
  return name == "silu" ? Activation::silu : name == "gelu_tanh" ? Activation::gelu_tanh : Activation::none;
}

// Of x, a number or a vector of numbers, by an exponential function and a hyperbolic tangent for it. constexpr: nvcc compiles it for
// the GPU, too.
constexpr auto activated(Activation activation, auto x, auto exp, auto tanh) -> decltype(x) {
  if (activation == Activation::silu) return x / (1.0f + exp(-x));
  return 0.5f * x * (1.0f + tanh(0.797884561f * (x + 0.044715f * x * x * x)));
}

}  // namespace ras
