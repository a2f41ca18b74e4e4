// CUDA launcher of add_rms_norm, add_layer_norm and their in-place twins: shapes, pointers and the launch; the kernels are in
// norm.cuh.
#include "norm.cuh"

#include <algorithm>
#include <array>

#include "tensor.h"

namespace ras::cuda {
namespace {

// The leading dimensions of x and residual, neighbours merged where both tensors allow it: at most three may remain.
struct Leading {
  std::array<int64_t, 3> size{1, 1, 1};  // innermost first
  std::array<int64_t, 3> x_stride{0, 0, 0}, residual_stride{0, 0, 0};

  Leading(const Tensor& x, const MaybeTensor& residual) {
    int used = 0;
    for (int64_t i = x.dim() - 2; i >= 0; --i) {
      const int64_t n = x.size(i), sx = x.stride(i), sr = residual ? residual->stride(i) : 0;
      if (n == 1) continue;
      const int last = used - 1;
      if (used > 0 && sx == x_stride[last] * size[last] && sr == residual_stride[last] * size[last]) {
        size[last] *= n;
        continue;
      }
      STD_TORCH_CHECK(used < 3, "ras_fast: x or residual has more than 3 leading dimensions that cannot be merged; call "
                                ".contiguous() on it");
      size[used] = n;
      x_stride[used] = sx;
      residual_stride[used++] = sr;
    }
  }
};

template <typename T>
Rows<T> rows_of(const Tensor& tensor, const std::array<int64_t, 3>& stride) {
  return {data_of<const T>(tensor), stride[2], stride[1], stride[0]};
}

Operand operand(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, DType::f32, 0};
  return {data_of<const void>(tensor), dtype_of(*tensor), tensor->dim() == 2 ? tensor->stride(0) : 0};
}

struct Flags {
  bool layer_norm, lerp, hf;
  float eps, weight_offset;
  double x_scale;
};

struct Inputs {
  const Tensor& x;
  const MaybeTensor& residual;
  const Tensor& weight;
  const MaybeTensor &bias, &vectors, &slot, &alpha, &probes, &x_weight, &scale;
};

// h is not given where it equals x, probe_dots is empty without probes.
struct Outputs {
  Tensor y;
  MaybeTensor h;
  Tensor probe_dots;
};

template <typename T>
void run_as(const Inputs& in, const Outputs& out, const Flags& flags) {
  const Leading lead(in.x, in.residual);
  NormArgs<T> a{};
  a.x = rows_of<T>(in.x, lead.x_stride);
  if (in.residual) a.residual = rows_of<T>(*in.residual, lead.residual_stride);
  a.y = data_of<T>(out.y);
  a.h = data_of<T>(out.h);
  a.probe_dots = in.probes ? data_of<float>(out.probe_dots) : nullptr;
  a.weight = operand(in.weight);
  a.bias = operand(in.bias);
  a.x_weight = operand(in.x_weight);
  a.scale = operand(in.scale);
  a.probes = operand(in.probes);
  a.num_probes = in.probes ? int(in.probes->size(0)) : 0;
  a.steer_vectors = operand(in.vectors);
  if (in.vectors) {
    a.steer_slot = data_of<const int32_t>(in.slot);
    a.steer_alpha = data_of<const float>(in.alpha);
    a.slot_stride = in.slot->stride(0);
    a.alpha_stride = in.alpha->stride(0);
    a.num_slots = int(in.vectors->size(0));
  }
  STD_TORCH_CHECK(in.x.size(-1) < (1 << 30) && lead.size[0] < (int64_t(1) << 31) - kRowsPerBlock && lead.size[1] <= 65535 &&
                      lead.size[2] <= 65535,
                  "ras_fast: x is too large for one launch; call .contiguous() on it");
  a.rows = int(lead.size[0]);
  a.d = int(in.x.size(-1));
  a.inv_d = 1.f / float(a.d);
  a.eps = flags.eps;
  a.weight_offset = flags.weight_offset;
  a.x_scale = float(flags.x_scale);
  a.hf_rounding = flags.hf;
  a.lerp = flags.lerp;

  const int64_t tokens = lead.size[0] * lead.size[1] * lead.size[2];
  const Norm norm = in.x_weight ? Norm::sandwich : flags.layer_norm ? Norm::layer : Norm::rms;
  const NormPlan plan = plan_norm(tokens, a.d, sizeof(T), norm_form(a), norm, device_of(in.x).multiprocessors);
  const dim3 grid((a.rows + plan.rows_per_block - 1) / plan.rows_per_block, lead.size[1], lead.size[2]);
  const dim3 block(plan.threads, plan.rows_per_block);
  with_norm_kernel(a, norm, plan, [&](auto kernel) { launch(kernel, a, grid, block, 0, in.x); });
}

void guard(const Inputs& in) {
  const Tensor& x = in.x;
  STD_TORCH_CHECK(x.dim() > 0 && rows_beside(x, x) && x.size(x.dim() - 1) > 0,
                  "ras_fast norm: x must be a CUDA tensor [..., d] with a contiguous last dimension");
  const int64_t d = x.size(x.dim() - 1), tokens = x.numel() / d;
  const auto fits = [&](const MaybeTensor& table, int64_t dim) {
    return !table || (rows_beside(x, *table) && table->dim() == dim && table->size(dim - 1) == d);
  };
  const auto per_token = [&](const MaybeTensor& tensor, int32_t dtype) {
    return tensor && rows_beside(x, *tensor) && tensor->dim() == 1 && tensor->size(0) == tokens && raw_dtype(*tensor) == dtype;
  };
  STD_TORCH_CHECK(!in.residual || (rows_beside(x, *in.residual) && raw_dtype(*in.residual) == raw_dtype(x) &&
                                   same_sizes(x, *in.residual)),
                  "ras_fast norm: residual must have x's shape, dtype and device");
  STD_TORCH_CHECK(fits(in.weight, 1) && fits(in.bias, 1) && fits(in.x_weight, 1) && fits(in.vectors, 2) && fits(in.probes, 2),
                  "ras_fast norm: weight, bias and x_weight must be [d], steer_vectors and probes [rows, d]");
  STD_TORCH_CHECK(!in.scale || (in.x_weight && rows_beside(x, *in.scale) && in.scale->dim() == 1 && in.scale->size(0) == 1),
                  "ras_fast norm: scale must be [1], and given together with x_weight");
  STD_TORCH_CHECK((!in.vectors && !in.slot && !in.alpha) ||
                      (in.vectors && in.vectors->size(0) > 0 && per_token(in.slot, aoti_torch_dtype_int32()) &&
                       per_token(in.alpha, aoti_torch_dtype_float32())),
                  "ras_fast norm: steering takes steer_vectors [S, d], steer_slot [T] int32 and steer_alpha [T] float32");
}

void run(const Inputs& in, const Outputs& out, const Flags& flags) {
  if (in.x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(in.x.get_device_index());
  for_dtype(dtype_of(in.x), [&](auto zero) { run_as<decltype(zero)>(in, out, flags); });
}

Tensor new_probe_dots(const Inputs& in) {
  if (!in.probes) return new_float(in.x, {0});
  return new_float(in.x, {in.x.numel() / in.x.size(in.x.dim() - 1), in.probes->size(0) + 1});
}

std::tuple<Tensor, Tensor, Tensor> functional(const Inputs& in, const Flags& flags) {
  guard(in);
  const std::vector<int64_t> sizes = sizes_of(in.x);
  const bool stores_h = in.residual || (in.vectors && !flags.lerp) || in.x_weight || flags.x_scale != 1;
  const Tensor y = new_like(in.x, sizes), h = new_like(in.x, stores_h ? sizes : std::vector<int64_t>{0});
  const Tensor dots = new_probe_dots(in);
  run(in, {y, stores_h ? MaybeTensor(h) : std::nullopt, dots}, flags);
  return {y, h, dots};
}

Tensor in_place(const Inputs& in, const Flags& flags) {
  guard(in);
  STD_TORCH_CHECK(apart(in.x, *in.residual), "ras_fast norm: in place, x and residual must be contiguous and not overlap");
  const Tensor dots = new_probe_dots(in);
  run(in, {in.x, in.residual, dots}, flags);
  return dots;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double eps,
                                                const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha,
                                                bool lerp, double weight_offset, bool hf, const MaybeTensor& probes,
                                                const MaybeTensor& x_weight, double x_scale, const MaybeTensor& scale) {
  return functional({x, residual, weight, std::nullopt, vectors, slot, alpha, probes, x_weight, scale},
                    {false, lerp, hf, float(eps), float(weight_offset), x_scale});
}

Tensor add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const MaybeTensor& vectors,
                     const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, double weight_offset, bool hf,
                     const MaybeTensor& probes, const MaybeTensor& x_weight, double x_scale, const MaybeTensor& scale) {
  return in_place({x, residual, weight, std::nullopt, vectors, slot, alpha, probes, x_weight, scale},
                  {false, lerp, hf, float(eps), float(weight_offset), x_scale});
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                                                  const MaybeTensor& bias, double eps, const MaybeTensor& vectors,
                                                  const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                                                  const MaybeTensor& probes) {
  return functional({x, residual, weight, bias, vectors, slot, alpha, probes, std::nullopt, std::nullopt},
                    {true, lerp, hf, float(eps), 0.f, 1.});
}

Tensor add_layer_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, const MaybeTensor& bias, double eps,
                       const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                       const MaybeTensor& probes) {
  return in_place({x, residual, weight, bias, vectors, slot, alpha, probes, std::nullopt, std::nullopt},
                  {true, lerp, hf, float(eps), 0.f, 1.});
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_", TORCH_BOX(&add_layer_norm_));
}

}  // namespace ras::cuda
