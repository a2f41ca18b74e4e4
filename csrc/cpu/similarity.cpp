// CPU launcher of refusal_similarity.
#include "cpu/similarity.h"

#include "cpu/tensor.h"

namespace ras::cpu {

Tensor refusal_similarity(const Tensor& logits, const Tensor& prototype_probs, double gamma, const MaybeTensor& steps) {
  STD_TORCH_CHECK(logits.dim() == 3 && rows_contiguous(logits) && logits.size(1) > 0 && logits.size(2) > 0 &&
                      prototype_probs.dim() == 2 && rows_contiguous(prototype_probs) &&
                      raw_dtype(prototype_probs) == aoti_torch_dtype_float32() && prototype_probs.size(0) >= logits.size(1) &&
                      prototype_probs.size(1) == logits.size(2) && gamma >= 0 && gamma <= 1,
                  "ras_fast similarity: logits must be [B, n, V], prototype_probs [N, V] float32 with N >= n, gamma in [0, 1]");
  STD_TORCH_CHECK(!steps || (is(*steps, aoti_torch_dtype_int32(), {logits.size(0)}) && rows_contiguous(*steps)),
                  "ras_fast similarity: steps must be contiguous [B] int32");
  Tensor similarity = empty_float({logits.size(0)});
  const SimilarityArgs args{.dtype = dtype_of(logits),
                            .logits = data_of<const void>(logits),
                            .batch = logits.size(0),
                            .steps = logits.size(1),
                            .vocabulary = logits.size(2),
                            .batch_stride = logits.stride(0),
                            .step_stride = logits.stride(1),
                            .prototypes = data_of<const float>(prototype_probs),
                            .prototype_stride = prototype_probs.stride(0),
                            .gamma = float(gamma),
                            .produced = data_of<const int32_t>(steps),
                            .similarity = data_of<float>(similarity)};
  auto* rows = pick_similarity_rows();
  torch::stable::parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  return similarity;
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("refusal_similarity", TORCH_BOX(&refusal_similarity));
}

}  // namespace ras::cpu
