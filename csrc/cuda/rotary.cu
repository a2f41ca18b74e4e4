// CUDA launcher of rotary_embedding: shapes, pointers and the launch; the kernel is in rotary.cuh.
#include "rotary.cuh"

#include "tensor.h"

namespace ras::cuda {
namespace {

void guard(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(query.dim() == 4 && rows_beside(query, query) && query.size(3) > 0,
                  "ras_fast rotary: query must be a CUDA tensor [B, Hq, L, D] with a contiguous last dimension");
  const auto like_query = [&](const Tensor& tensor, const std::vector<int64_t>& sizes) {
    return rows_beside(query, tensor) && raw_dtype(tensor) == raw_dtype(query) && std::ranges::equal(tensor.sizes(), sizes);
  };
  const int64_t batch = query.size(0), length = query.size(2), dim = query.size(3);
  STD_TORCH_CHECK(key.dim() == 4 && like_query(key, {batch, key.size(1), length, dim}),
                  "ras_fast rotary: key must be [B, Hkv, L, D], like query");
  const int64_t rotated = cos.dim() == 3 ? cos.size(2) : 0;
  STD_TORCH_CHECK(rotated > 0 && rotated <= dim && rotated % 2 == 0, "ras_fast rotary: cos must be [B or 1, L, r], 0 < r <= D even");
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK(like_query(*table, {batch, length, rotated}) || like_query(*table, {1, length, rotated}),
                    "ras_fast rotary: cos and sin must be [B or 1, L, r], like query");
  }
  STD_TORCH_CHECK(batch * length < (int64_t(1) << 31) && (query.size(1) + key.size(1)) * dim < (int64_t(1) << 24),
                  "ras_fast rotary: tokens or heads are too many for one launch");
}

template <typename T>
RotaryHeads<T> heads_of(const Tensor& x, const Tensor& out) {
  return {data_of<const T>(x), data_of<T>(out), x.stride(0), x.stride(2), x.stride(1), int(x.size(1))};
}

template <typename T>
RotaryTable<T> table_of(const Tensor& table) {
  return {data_of<const T>(table), table.size(0) == 1 ? 0 : table.stride(0), table.stride(1)};
}

// [B, H, L, D], in memory [B, L, H, D].
Tensor new_heads(const Tensor& x) {
  const int64_t heads = x.size(1), length = x.size(2), dim = x.size(3);
  return new_strided(x, {x.size(0), heads, length, dim}, {length * heads * dim, dim, heads * dim, 1});
}

template <typename T>
void run(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, const Tensor& query_out,
         const Tensor& key_out) {
  const RotaryArgs<T> args{heads_of<T>(query, query_out), heads_of<T>(key, key_out), table_of<T>(cos), table_of<T>(sin),
                           int(query.size(2)), int(query.size(3)), int(cos.size(2))};
  with_rotary_kernel(args, query.size(0) * query.size(2),
                     [&](auto kernel, dim3 grid) { launch(kernel, args, grid, kRotaryThreads, 0, query); });
}

}  // namespace

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin) {
  guard(query, key, cos, sin);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor query_out = new_heads(query), key_out = new_heads(key);
  if (query.numel() + key.numel() == 0) return {query_out, key_out};
  switch (dtype_of(query)) {
    case DType::f32: run<float>(query, key, cos, sin, query_out, key_out); break;
    case DType::f16: run<__half>(query, key, cos, sin, query_out, key_out); break;
    case DType::bf16: run<__nv_bfloat16>(query, key, cos, sin, query_out, key_out); break;
  }
  return {query_out, key_out};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) { m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding)); }

}  // namespace ras::cuda
