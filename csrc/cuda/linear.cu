// CUDA launchers of linear, linears and linear_glu: shapes, pointers and the launch; the kernel is in linear.cuh. Which calls come here is
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
  std::vector<Tensor> weights;
  std::vector<MaybeTensor> biases;
  MaybeTensor up;
  Activation activation;
};

// Those from `first` on, as many as a launch takes.
template <typename T>
void run(const Tensor& x, const Weights& all, const std::vector<Tensor>& outs, size_t first) {
  const RowMap rows = row_map(x);
  STD_TORCH_CHECK(rows.dims <= 2, "ras_fast linear: x has more than 2 leading dimensions that cannot be merged; call "
                                  ".contiguous() on it");
  LinearArgs<T> args{};
  args.x = data_of<const T>(x);
  args.up = data_of<const T>(all.up);
  args.inputs = int(x.size(x.dim() - 1));
  args.rows = int(x.numel() / args.inputs);
  args.group = rows.dims == 0 ? 1 : int(rows.sizes[0]);
  args.row_stride = rows.strides[0];
  args.group_stride = rows.strides[1];
  args.up_stride = all.up ? all.up->stride(0) : 0;
  args.activation = all.activation;
  for (size_t i = first; i < std::min(outs.size(), first + kLinearParts); ++i) {
    const Tensor& weight = all.weights[i];
    if (outs[i].numel() == 0) continue;
    args.part[args.parts++] = {data_of<const T>(weight), data_of<const T>(all.biases[i]), data_of<T>(outs[i]), weight.stride(0),
                               int(weight.size(0)), 0};
  }
  if (args.parts == 0) return;
  with_linear_kernel(args, device_of(x).multiprocessors,
                     [&](auto kernel, dim3 grid) { launch(kernel, args, grid, kLinearWarps * kWarp, 0, x); });
}

std::vector<Tensor> outputs_of(const Tensor& x, const Weights& all) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  std::vector<Tensor> outs;
  for (const Tensor& weight : all.weights) {
    guard_sizes(x, weight);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = weight.size(0);
    outs.push_back(new_like(x, sizes));
  }
  for (size_t first = 0; first < outs.size(); first += kLinearParts) {
    dtype_of(x) == DType::f16 ? run<__half>(x, all, outs, first) : run<__nv_bfloat16>(x, all, outs, first);
  }
  return outs;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  guard_linear(x, weight, bias, [&](const Tensor& tensor) { return rows_beside(x, tensor); });
  return outputs_of(x, {{weight}, {bias}, {}, Activation::none})[0];
}

std::vector<Tensor> linears(const Tensor& x, std::vector<Tensor> weights, std::vector<MaybeTensor> biases) {
  guard_linears(x, weights, biases, [&](const Tensor& tensor) { return rows_beside(x, tensor); });
  return outputs_of(x, {weights, biases, {}, Activation::none});
}

Tensor linear_glu(const Tensor& x, const Tensor& gate, const Tensor& up, std::string activation) {
  const Activation known = guard_glu(x, gate, up, activation, [&](const Tensor& tensor) { return rows_beside(x, tensor); });
  return outputs_of(x, {{gate}, {{}}, up, known})[0];
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
}

}  // namespace ras::cuda
