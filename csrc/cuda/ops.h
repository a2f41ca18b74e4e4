// Every op's CUDA entry point; the schemas are in ras_fast/ops/, the registrations in ops.cu.
#pragma once

#include "tensor.h"

namespace ras::cuda {

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double eps,
                                                const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha,
                                                bool lerp, double weight_offset, bool hf, const MaybeTensor& probes);

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                                                  const MaybeTensor& bias, double eps, const MaybeTensor& vectors,
                                                  const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                                                  const MaybeTensor& probes);

}  // namespace ras::cuda
