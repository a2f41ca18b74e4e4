// CUDA launchers of linear and linear_glu: shapes, pointers and the launch; the kernel is in linear.cuh. Which calls come here is
// decided in ras_fast/ops/linear.py.
#include "linear.cuh"

#include "common/linear.h"
#include "tensor.h"

namespace ras::cuda {
namespace {

void guard_sizes(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(dtype_of(x) != DType::f32, "ras_fast linear: the CUDA kernel takes float16 and bfloat16");
  STD_TORCH_CHECK(weight.size(0) < (int64_t(1) << 31) - 64 && weight.size(1) < (int64_t(1) << 31) - 4096 &&
                      x.numel() / x.size(x.dim() - 1) <= 65535 * kLinearRows,
                  "ras_fast linear: rows, inputs or outputs are too many for one launch");
}

struct Weights {
  const Tensor& weight;
  MaybeTensor up, bias;
  Activation activation;
};

template <typename T>
void run(const Tensor& x, const Weights& weights, const Tensor& out) {
  const Tensor& weight = weights.weight;
  const RowMap rows = row_map(x);
  STD_TORCH_CHECK(rows.dims <= 2, "ras_fast linear: x has more than 2 leading dimensions that cannot be merged; call "
                                  ".contiguous() on it");
  LinearArgs<T> args{};
  args.x = data_of<const T>(x);
  args.weight = data_of<const T>(weight);
  args.up = data_of<const T>(weights.up);
  args.bias = data_of<const T>(weights.bias);
  args.out = data_of<T>(out);
  args.rows = int(out.numel() / weight.size(0));
  args.group = rows.dims == 0 ? 1 : int(rows.sizes[0]);
  args.row_stride = rows.strides[0];
  args.group_stride = rows.strides[1];
  args.weight_stride = weight.stride(0);
  args.up_stride = weights.up ? weights.up->stride(0) : 0;
  args.inputs = int(weight.size(1));
  args.outputs = int(weight.size(0));
  args.activation = weights.activation;
  with_linear_kernel(args, device_of(x).multiprocessors,
                     [&](auto kernel, dim3 grid) { launch(kernel, args, grid, kLinearWarps * kWarp, 0, x); });
}

Tensor outputs_of(const Tensor& x, const Weights& weights) {
  guard_sizes(x, weights.weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = weights.weight.size(0);
  const Tensor out = new_like(x, sizes);
  if (out.numel() == 0) return out;
  dtype_of(x) == DType::f16 ? run<__half>(x, weights, out) : run<__nv_bfloat16>(x, weights, out);
  return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  guard_linear(x, weight, bias, [&](const Tensor& tensor) { return rows_beside(x, tensor); });
  return outputs_of(x, {weight, {}, bias, Activation::none});
}

Tensor linear_glu(const Tensor& x, const Tensor& gate, const Tensor& up, std::string activation) {
  const Activation known = guard_glu(x, gate, up, activation, [&](const Tensor& tensor) { return rows_beside(x, tensor); });
  return outputs_of(x, {gate, up, {}, known});
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
}

}  // namespace ras::cuda
