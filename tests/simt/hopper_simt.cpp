// The prefill kernel of csrc/cuda/hopper_prefill.cuh behind a C function, launched as hopper_prefill.cu does.
#include "cuda/hopper_prefill.cuh"

using namespace ras::cuda;

// Mirrored by a ctypes structure in test_hopper_simt.py: 8-byte fields only.
struct Call {
  const void *query, *key, *value;
  void* out;
  float *lse, *mass;
  const int32_t* region_ids;
  int64_t query_stride[3], key_stride[3], value_stride[3], ids_stride;
  int64_t half, batch, heads, kv_heads, dim, query_rows, keys, regions, mass_rows, causal, blocks, consumers;
  double scale;
};

template <typename T>
static bool prefill(const Call& c) {
  PrefillArgs<T> a{};
  const auto map = [&](CUtensorMap& to, const void* data, int64_t heads, int64_t rows, const int64_t (&stride)[3], int box) {
    const MappedTensor tensor{data, c.batch, heads, rows, c.dim, {stride[0], stride[1], stride[2]}};
    return encode_panels<T>(cuTensorMapEncodeTiled, &to, tensor, box) == CUDA_SUCCESS;
  };
  if (!map(a.query, c.query, c.heads, c.query_rows, c.query_stride, kConsumerRows * int(c.consumers)) ||
      !map(a.key, c.key, c.kv_heads, c.keys, c.key_stride, prefill_keys(int(c.dim))) ||
      !map(a.value, c.value, c.kv_heads, c.keys, c.value_stride, prefill_keys(int(c.dim)))) {
    return false;
  }
  a.out = static_cast<T*>(c.out);
  a.lse = c.lse;
  a.mass = c.mass;
  a.region_ids = c.region_ids;
  a.ids_batch_stride = c.ids_stride;
  a.batch = int(c.batch);
  a.heads = int(c.heads);
  a.group = int(c.heads / c.kv_heads);
  a.query_rows = int(c.query_rows);
  a.keys = int(c.keys);
  a.regions = int(c.regions);
  a.mass_rows = int(c.mass_rows);
  a.causal = c.causal != 0;
  a.scale_log2 = float(c.scale) * kLog2e;
  bool ok = false;
  with_prefill_kernel<T>(int(c.dim), int(c.consumers), a, [&](auto kernel, int threads, size_t shared_bytes) {
    ok = shared_bytes <= 227 * 1024 &&  // what sm_90 has for a block
         simt::launch(dim3(unsigned(c.blocks)), dim3(unsigned(threads)), shared_bytes, [&] { kernel(a); });
  });
  return ok;
}

extern "C" int prefill_run(const Call* c) { return c->half ? prefill<__half>(*c) : prefill<__nv_bfloat16>(*c); }
