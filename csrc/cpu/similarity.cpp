// CPU launcher of refusal_similarity.
#include "cpu/similarity.h"

#include "cpu/tensor.h"
#include "ops.h"

namespace ras::cpu {

Tensor refusal_similarity(const Tensor& logits, const Tensor& prototype_probs, double gamma, const MaybeTensor& steps) {
  Tensor similarity = new_float(logits, {logits.size(0)});
  const SimilarityArgs args{.dtype = dtype_of(logits),
                            .logits = logits.data_ptr(),
                            .batch = logits.size(0),
                            .steps = logits.size(1),
                            .vocabulary = logits.size(2),
                            .batch_stride = logits.stride(0),
                            .step_stride = logits.stride(1),
                            .prototypes = data<const float>(prototype_probs),
                            .prototype_stride = prototype_probs.stride(0),
                            .gamma = float(gamma),
                            .produced = data<const int32_t>(steps),
                            .similarity = data<float>(similarity)};
  auto* rows = pick_similarity_rows();
  torch::stable::parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  return similarity;
}

}  // namespace ras::cpu
