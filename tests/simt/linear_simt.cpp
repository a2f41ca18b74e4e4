// The linear kernel of csrc/cuda/linear.cuh behind a C function: fills LinearArgs and launches as linear.cu does, without torch.
#include "cuda/linear.cuh"

using namespace ras::cuda;

// Mirrored by a ctypes structure in test_linear_simt.py: 8-byte fields only.
struct Part {
  const void *weight, *bias;
  void* out;
  int64_t weight_stride, outputs;
};

struct Call {
  const void *x, *up;
  int64_t group_stride, row_stride, up_stride;
  int64_t rows, group, inputs, parts, activation, half, multiprocessors;
  int64_t blocks, aligned;  // out: of the grid; whether accesses have 16 bytes
  Part part[kLinearParts];
};

template <typename T>
static bool run(Call& c) {
  LinearArgs<T> a{};
  a.x = static_cast<const T*>(c.x);
  a.up = static_cast<const T*>(c.up);
  a.group_stride = c.group_stride;
  a.row_stride = c.row_stride;
  a.up_stride = c.up_stride;
  a.rows = int(c.rows);
  a.group = int(c.group);
  a.inputs = int(c.inputs);
  a.parts = int(c.parts);
  a.activation = ras::Activation(c.activation);
  for (int i = 0; i < a.parts; ++i) {
    const Part& p = c.part[i];
    a.part[i] = {static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), static_cast<T*>(p.out), p.weight_stride,
                 int(p.outputs), 0};
  }
  c.aligned = linear_aligned(a);
  bool ok = false;
  with_linear_kernel(a, int(c.multiprocessors), [&](auto kernel, dim3 grid) {
    c.blocks = grid.x;
    ok = simt::launch(grid, dim3(kLinearWarps * kWarp), 0, [&] { kernel(a); });
  });
  return ok;
}

extern "C" int linear_run(Call* c) { return c->half ? run<__half>(*c) : run<__nv_bfloat16>(*c); }
