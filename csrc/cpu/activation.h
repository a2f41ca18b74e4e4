// What the launcher (activation.cpp) hands to the kernel (activation_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

enum class Gelu { tanh, quick };

struct GeluArgs {
  Gelu kind;
  DType dtype;
  const void* x;
  void* y;
};

RAS_FAST_DECLARE(gelu_elements, const GeluArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
