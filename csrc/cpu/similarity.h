// What the launcher (similarity.cpp) hands to the row kernel (similarity_kernel.cpp).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ras::cpu {

struct SimilarityArgs {
  DType dtype;  // of logits
  const void* logits;
  int64_t batch, steps, vocabulary, batch_stride, step_stride;
  const float* prototypes;  // [N, V]
  int64_t prototype_stride;
  float gamma;
  const int32_t* produced;  // [B] or null
  float* similarity;        // [B]
};

RAS_FAST_DECLARE(similarity_rows, const SimilarityArgs& args, int64_t begin, int64_t end)

}  // namespace ras::cpu
