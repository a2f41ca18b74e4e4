// CPU launcher of add_rms_norm, add_layer_norm and their in-place twins: shapes and pointers; the arithmetic is in norm_kernel.cpp.
#include "cpu/norm.h"

#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

// The caller's tables, all in one dtype: x's, or float when one of them has another.
struct Tables {
  MaybeTensor weight, bias, vectors, probes, x_weight, scale;

  bool match(DType dtype) const {
    bool all = true;
    for (const MaybeTensor* table : {&weight, &bias, &vectors, &probes, &x_weight, &scale})
      if (*table) all &= dtype_of(**table) == dtype;  // of every one, because it refuses dtypes that no kernel reads
    return all;
  }
  void to_float() {
    // A conversion keeps the order of the strides: rows that overlap would come back interleaved.
    for (MaybeTensor* table : {&weight, &bias, &vectors, &probes, &x_weight, &scale})
      if (*table) *table = torch::stable::contiguous(torch::stable::to(**table, torch::headeronly::ScalarType::Float));
  }
};

Table table(const MaybeTensor& tensor) {
  if (!tensor) return {};
  const bool matrix = tensor->dim() == 2;
  return {data_of<const void>(tensor), matrix ? tensor->size(0) : 1, matrix ? tensor->stride(0) : 0};
}

bool fits(const MaybeTensor& table, int64_t dim, int64_t d) {
  return !table || (rows_contiguous(*table) && table->dim() == dim && table->size(dim - 1) == d);
}

void guard(const Tensor& x, const MaybeTensor& residual, const Tables& tables, const MaybeTensor& slot, const MaybeTensor& alpha) {
  STD_TORCH_CHECK(x.dim() > 0 && rows_contiguous(x), "ras_fast norm: x must be a CPU tensor with a contiguous last dimension");
  const int64_t d = x.size(x.dim() - 1);
  STD_TORCH_CHECK(d > 0, "ras_fast norm: x must have a last dimension of at least 1");
  STD_TORCH_CHECK(!residual || (rows_contiguous(*residual) && same_sizes(x, *residual) && raw_dtype(x) == raw_dtype(*residual)),
                  "ras_fast norm: residual must have x's shape, dtype and device");
  STD_TORCH_CHECK(fits(tables.weight, 1, d) && fits(tables.bias, 1, d) && fits(tables.x_weight, 1, d) &&
                      fits(tables.vectors, 2, d) && fits(tables.probes, 2, d),
                  "ras_fast norm: weight, bias and x_weight must be [d], steer_vectors and probes [rows, d]");
  STD_TORCH_CHECK(!tables.scale || (tables.x_weight && fits(tables.scale, 1, 1)),
                  "ras_fast norm: scale must be [1], and given together with x_weight");
  if (!tables.vectors && !slot && !alpha) return;
  const int64_t tokens = x.numel() / d;
  STD_TORCH_CHECK(tables.vectors && tables.vectors->size(0) > 0 && slot && is(*slot, aoti_torch_dtype_int32(), {tokens}) &&
                      rows_contiguous(*slot) && alpha && is(*alpha, aoti_torch_dtype_float32(), {tokens}) && rows_contiguous(*alpha),
                  "ras_fast norm: steering takes steer_vectors [S, d], steer_slot [T] int32 and steer_alpha [T] float32");
}

// Writes y and, where it differs from x, h; returns probe_dots.
Tensor launch(NormArgs args, const Tensor& x, const MaybeTensor& residual, Tables tables, const MaybeTensor& slot,
              const MaybeTensor& alpha, const Tensor& y, const MaybeTensor& h) {
  args.dtype = dtype_of(x);
  args.d = x.size(x.dim() - 1);
  args.float_tables = !tables.match(args.dtype);
  if (args.float_tables) tables.to_float();
  const int64_t tokens = x.numel() / args.d;
  Tensor dots = empty_float(tables.probes ? std::vector<int64_t>{tokens, tables.probes->size(0) + 1} : std::vector<int64_t>{0});
  args.x = row_map(x);
  if (residual) args.residual = row_map(*residual);
  args.y = data_of<void>(y);
  args.h = data_of<void>(h);
  args.weight = table(tables.weight);
  args.bias = table(tables.bias);
  args.x_weight = table(tables.x_weight);
  args.scale = table(tables.scale);
  args.vectors = table(tables.vectors);
  args.slot = data_of<const int32_t>(slot);
  args.alpha = data_of<const float>(alpha);
  args.probes = table(tables.probes);
  args.probe_dots = tables.probes ? data_of<float>(dots) : nullptr;

  auto* rows = pick_norm_rows();
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / args.d);
  share_out(tokens, grain, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  return dots;
}

std::tuple<Tensor, Tensor, Tensor> functional(const NormArgs& args, const Tensor& x, const MaybeTensor& residual,
                                              const Tables& tables, const MaybeTensor& slot, const MaybeTensor& alpha) {
  guard(x, residual, tables, slot, alpha);
  const std::vector<int64_t> sizes = sizes_of(x);
  const bool stores_h = residual || (tables.vectors && !args.lerp) || tables.x_weight || args.scales_x;
  const Tensor y = empty(sizes, raw_dtype(x)), h = empty(stores_h ? sizes : std::vector<int64_t>{0}, raw_dtype(x));
  return {y, h, launch(args, x, residual, tables, slot, alpha, y, stores_h ? MaybeTensor(h) : std::nullopt)};
}

Tensor in_place(const NormArgs& args, const Tensor& x, const Tensor& residual, const Tables& tables, const MaybeTensor& slot,
                const MaybeTensor& alpha) {
  guard(x, residual, tables, slot, alpha);
  STD_TORCH_CHECK(apart(x, residual), "ras_fast norm: in place, x and residual must be contiguous and not overlap");
  return launch(args, x, residual, tables, slot, alpha, x, residual);
}

NormArgs rms_args(double eps, bool lerp, double weight_offset, bool hf, double x_scale) {
  return {.eps = float(eps), .weight_offset = float(weight_offset), .x_scale = float(x_scale), .scales_x = x_scale != 1,
          .rms = true, .hf_rounding = hf, .lerp = lerp};
}

NormArgs layer_args(double eps, bool lerp, bool hf) {
  return {.eps = float(eps), .weight_offset = 0, .x_scale = 1, .rms = false, .hf_rounding = hf, .lerp = lerp};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double eps,
                                                const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha,
                                                bool lerp, double weight_offset, bool hf, const MaybeTensor& probes,
                                                const MaybeTensor& x_weight, double x_scale, const MaybeTensor& scale) {
  const Tables tables{weight, std::nullopt, vectors, probes, x_weight, scale};
  return functional(rms_args(eps, lerp, weight_offset, hf, x_scale), x, residual, tables, slot, alpha);
}

Tensor add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const MaybeTensor& vectors,
                     const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, double weight_offset, bool hf,
                     const MaybeTensor& probes, const MaybeTensor& x_weight, double x_scale, const MaybeTensor& scale) {
  const Tables tables{weight, std::nullopt, vectors, probes, x_weight, scale};
  return in_place(rms_args(eps, lerp, weight_offset, hf, x_scale), x, residual, tables, slot, alpha);
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                                                  const MaybeTensor& bias, double eps, const MaybeTensor& vectors,
                                                  const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                                                  const MaybeTensor& probes) {
  return functional(layer_args(eps, lerp, hf), x, residual, {weight, bias, vectors, probes}, slot, alpha);
}

Tensor add_layer_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, const MaybeTensor& bias, double eps,
                       const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                       const MaybeTensor& probes) {
  return in_place(layer_args(eps, lerp, hf), x, residual, {weight, bias, vectors, probes}, slot, alpha);
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_", TORCH_BOX(&add_layer_norm_));
}

}  // namespace ras::cpu
