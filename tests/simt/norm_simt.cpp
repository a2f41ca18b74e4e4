// The norm kernels of csrc/cuda/norm.cuh behind a C function: fills NormArgs and launches as norm.cu does, without torch.
#include "cuda/norm.cuh"

using namespace ras::cuda;
using ras::DType;

// Mirrored by a ctypes structure in test_norm_simt.py: 8-byte fields only, so that there is nothing to pad.
struct Matrix {
  const void* data;
  int64_t dtype, stride;
};
struct Call {
  const void *x, *residual;
  void *y, *h;
  float* probe_dots;
  int64_t x_stride[3], residual_stride[3], size[3];  // z, y, rows
  Matrix weight, bias, x_weight, scale, steer_vectors, probes;
  const int32_t* steer_slot;
  const float* steer_alpha;
  int64_t slot_stride, alpha_stride, num_slots, num_probes, d, dtype, multiprocessors;
  int64_t layer_norm, hf_rounding, lerp;
  double eps, weight_offset, x_scale;
  int64_t plan[5];  // out: what plan_norm chose
};

static Operand operand(const Matrix& m) { return {m.data, DType(m.dtype), m.stride}; }

template <typename T>
static bool run(Call& c) {
  NormArgs<T> a{};
  a.x = {static_cast<const T*>(c.x), c.x_stride[0], c.x_stride[1], c.x_stride[2]};
  a.residual = {static_cast<const T*>(c.residual), c.residual_stride[0], c.residual_stride[1], c.residual_stride[2]};
  a.y = static_cast<T*>(c.y);
  a.h = static_cast<T*>(c.h);
  a.probe_dots = c.probe_dots;
  a.weight = operand(c.weight);
  a.bias = operand(c.bias);
  a.x_weight = operand(c.x_weight);
  a.scale = operand(c.scale);
  a.steer_vectors = operand(c.steer_vectors);
  a.probes = operand(c.probes);
  a.steer_slot = c.steer_slot;
  a.steer_alpha = c.steer_alpha;
  a.slot_stride = c.slot_stride;
  a.alpha_stride = c.alpha_stride;
  a.num_slots = int(c.num_slots);
  a.num_probes = int(c.num_probes);
  a.rows = int(c.size[2]);
  a.d = int(c.d);
  a.inv_d = 1.f / float(a.d);
  a.eps = float(c.eps);
  a.weight_offset = float(c.weight_offset);
  a.x_scale = float(c.x_scale);
  a.hf_rounding = c.hf_rounding;
  a.lerp = c.lerp;
  const Norm norm = c.x_weight.data ? Norm::sandwich : c.layer_norm ? Norm::layer : Norm::rms;
  const int64_t tokens = c.size[0] * c.size[1] * c.size[2];
  const NormPlan plan = plan_norm(tokens, c.d, sizeof(T), norm_form(a), norm, int(c.multiprocessors));
  const int64_t chosen[5] = {plan.elements, plan.threads, plan.rows_per_block, int64_t(plan.form), plan.resident};
  std::copy(chosen, chosen + 5, c.plan);

  const dim3 grid((a.rows + plan.rows_per_block - 1) / plan.rows_per_block, unsigned(c.size[1]), unsigned(c.size[0]));
  const dim3 block(plan.threads, plan.rows_per_block);
  bool ok = false;
  with_norm_kernel(a, norm, plan, [&](auto kernel) { ok = simt::launch(grid, block, 0, [&] { kernel(a); }); });
  return ok;
}

extern "C" int norm_run(Call* c) {
  return for_dtype(DType(c->dtype), [&](auto zero) { return run<decltype(zero)>(*c); });
}

extern "C" void norm_plan(int64_t rows, int64_t d, int64_t element_bytes, int64_t form, int64_t multiprocessors,
                          int64_t out[5]) {
  const NormPlan plan = plan_norm(rows, d, int(element_bytes), NormForm(form), Norm::rms, int(multiprocessors));
  const int64_t chosen[5] = {plan.elements, plan.threads, plan.rows_per_block, int64_t(plan.form), plan.resident};
  std::copy(chosen, chosen + 5, out);
}
