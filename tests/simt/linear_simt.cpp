// The linear kernel of csrc/cuda/linear.cuh behind a C function: fills LinearArgs and launches as linear.cu does, without torch.
#include "cuda/linear.cuh"

using namespace ras::cuda;

// Mirrored by a ctypes structure in test_linear_simt.py: 8-byte fields only.
struct Call {
  const void *x, *weight, *up, *bias;
  void* out;
  int64_t group_stride, row_stride, weight_stride, up_stride;
  int64_t rows, group, inputs, outputs, activation, half, multiprocessors;
  int64_t blocks, aligned;  // out: of the grid; whether accesses have 16 bytes
};

template <typename T>
static bool run(Call& c) {
  const LinearArgs<T> a{static_cast<const T*>(c.x),
                        static_cast<const T*>(c.weight),
                        static_cast<const T*>(c.up),
                        static_cast<const T*>(c.bias),
                        static_cast<T*>(c.out),
                        c.group_stride,
                        c.row_stride,
                        c.weight_stride,
                        c.up_stride,
                        int(c.rows),
                        int(c.group),
                        int(c.inputs),
                        int(c.outputs),
                        ras::Activation(c.activation)};
  c.aligned = linear_aligned(a);
  bool ok = false;
  with_linear_kernel(a, int(c.multiprocessors), [&](auto kernel, dim3 grid) {
    c.blocks = grid.x;
    ok = simt::launch(grid, dim3(kLinearWarps * kWarp), 0, [&] { kernel(a); });
  });
  return ok;
}

extern "C" int linear_run(Call* c) { return c->half ? run<__half>(*c) : run<__nv_bfloat16>(*c); }
