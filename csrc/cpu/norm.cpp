// CPU launcher of add_rms_norm and add_layer_norm: shapes and pointers; the arithmetic is in norm_kernel.cpp.
#include "cpu/norm.h"

#include "cpu/tensor.h"
#include "ops.h"

namespace ras::cpu {
namespace {

// Below this many elements one thread is faster than waking a second (docs/kernels.md, "Threads").
constexpr int64_t kElementsPerThread = 1 << 15;

RowMap row_map(const Tensor& tensor) {
  RowMap map;
  map.data = tensor.data_ptr();
  for (int64_t i = tensor.dim() - 2; i >= 0; --i) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    if (size == 1) continue;
    if (map.dims && map.strides[map.dims - 1] * map.sizes[map.dims - 1] == stride) {
      map.sizes[map.dims - 1] *= size;
      continue;
    }
    STD_TORCH_CHECK(map.dims < kMaxDims, "ras_fast: at most ", kMaxDims, " non-mergeable leading dimensions are supported");
    map.sizes[map.dims] = size;
    map.strides[map.dims++] = stride;
  }
  return map;
}

Table table(const MaybeTensor& tensor) {
  if (!tensor) return {};
  const bool matrix = tensor->dim() == 2;
  return {tensor->data_ptr(), dtype_of(*tensor), matrix ? tensor->size(0) : 1, matrix ? tensor->stride(0) : 0};
}

std::tuple<Tensor, Tensor, Tensor> launch(NormArgs args, const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                                          const MaybeTensor& bias, const MaybeTensor& vectors, const MaybeTensor& slot,
                                          const MaybeTensor& alpha, const MaybeTensor& probes) {
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const bool stores_h = residual || (vectors && !args.lerp);
  args.dtype = dtype_of(x);
  args.d = sizes.back();
  const int64_t tokens = x.numel() / args.d;
  Tensor y = new_like(x, sizes);
  Tensor h = new_like(x, stores_h ? sizes : std::vector<int64_t>{0});
  Tensor dots = probes ? new_float(x, {tokens, probes->size(0) + 1}) : new_float(x, {0});
  args.x = row_map(x);
  if (residual) args.residual = row_map(*residual);
  args.y = y.data_ptr();
  args.h = stores_h ? h.data_ptr() : nullptr;
  args.weight = table(weight);
  args.bias = table(bias);
  args.vectors = table(vectors);
  args.slot = data<const int32_t>(slot);
  args.alpha = data<const float>(alpha);
  args.probes = table(probes);
  args.probe_dots = probes ? data<float>(dots) : nullptr;

  auto* rows = pick_norm_rows();
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / args.d);
  if (tokens <= grain) {
    rows(args, 0, tokens);
  } else {
    torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  }
  return {y, h, dots};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double eps,
                                                const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha,
                                                bool lerp, double weight_offset, bool hf, const MaybeTensor& probes) {
  NormArgs args{.eps = float(eps), .weight_offset = float(weight_offset), .rms = true, .hf_rounding = hf, .lerp = lerp};
  return launch(args, x, residual, weight, std::nullopt, vectors, slot, alpha, probes);
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                                                  const MaybeTensor& bias, double eps, const MaybeTensor& vectors,
                                                  const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                                                  const MaybeTensor& probes) {
  NormArgs args{.eps = float(eps), .weight_offset = 0, .rms = false, .hf_rounding = hf, .lerp = lerp};
  return launch(args, x, residual, weight, bias, vectors, slot, alpha, probes);
}

}  // namespace ras::cpu
