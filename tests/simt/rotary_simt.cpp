// The rotary kernel of csrc/cuda/rotary.cuh behind a C function: fills RotaryArgs and launches as rotary.cu does, without torch.
#include "cuda/rotary.cuh"

using namespace ras::cuda;
using ras::DType;

// Mirrored by a ctypes structure in test_rotary_simt.py: 8-byte fields only, so that there is nothing to pad.
struct Heads {
  const void* data;
  void* out;
  int64_t batch_stride, token_stride, head_stride, heads;
};
struct Rows {
  const void* data;
  int64_t batch_stride, token_stride;
};
struct Call {
  Heads query, key;
  Rows cos, sin;
  int64_t batch, length, dim, rotated, dtype, interleaved, float_tables;
  int64_t width;  // out: elements of an access
};

template <typename T, typename Table>
static bool run(Call& c) {
  const auto heads = [](const Heads& h) {
    return RotaryHeads<T>{static_cast<const T*>(h.data), static_cast<T*>(h.out), h.batch_stride, h.token_stride, h.head_stride,
                          int(h.heads)};
  };
  const auto table = [](const Rows& t) {
    return RotaryTable<Table>{static_cast<const Table*>(t.data), t.batch_stride, t.token_stride};
  };
  const RotaryArgs<T, Table> a{heads(c.query), heads(c.key), table(c.cos), table(c.sin), int(c.length), int(c.dim), int(c.rotated)};
  c.width = rotary_width(a);
  bool ok = false;
  with_rotary_kernel(a, c.interleaved != 0, c.batch * c.length, [&](auto kernel, dim3 grid) {
    ok = simt::launch(grid, dim3(kRotaryThreads), 0, [&] { kernel(a); });
  });
  return ok;
}

extern "C" int rotary_run(Call* c) {
  return for_dtype(DType(c->dtype), [&](auto zero) {
    using T = decltype(zero);
    return c->float_tables ? run<T, float>(*c) : run<T, T>(*c);
  });
}
