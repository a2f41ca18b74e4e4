// CPU launcher of rotary_embedding: shapes and pointers; the arithmetic is in rotary_kernel.cpp.
#include "cpu/rotary.h"

#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

// Below this many elements one thread is faster than waking a second.
constexpr int64_t kElementsPerThread = 1 << 15;

void guard(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(query.dim() == 4 && rows_contiguous(query) && query.size(3) > 0,
                  "ras_fast rotary: query must be a CPU tensor [B, Hq, L, D] with a contiguous last dimension");
  const int32_t dtype = raw_dtype(query);
  const int64_t batch = query.size(0), length = query.size(2), dim = query.size(3);
  STD_TORCH_CHECK(key.dim() == 4 && is(key, dtype, {batch, key.size(1), length, dim}) && rows_contiguous(key),
                  "ras_fast rotary: key must be [B, Hkv, L, D], like query");
  const int64_t rotated = cos.dim() == 3 ? cos.size(2) : 0;
  STD_TORCH_CHECK(rotated > 0 && rotated <= dim && rotated % 2 == 0, "ras_fast rotary: cos must be [B or 1, L, r], 0 < r <= D even");
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK((is(*table, dtype, {batch, length, rotated}) || is(*table, dtype, {1, length, rotated})) &&
                        rows_contiguous(*table),
                    "ras_fast rotary: cos and sin must be [B or 1, L, r], like query");
  }
}

RotaryHeads heads_of(const Tensor& x, const Tensor& out) {
  return {data_of<const void>(x), x.stride(0), x.stride(1), x.stride(2), x.size(1), data_of<void>(out)};
}

RotaryTable table_of(const Tensor& table) {
  return {data_of<const void>(table), table.size(0) == 1 ? 0 : table.stride(0), table.stride(1)};
}

// [B, H, L, D], in memory [B, L, H, D].
Tensor new_like(const Tensor& x) {
  const int64_t heads = x.size(1), length = x.size(2), dim = x.size(3);
  return empty_strided({x.size(0), heads, length, dim}, {length * heads * dim, dim, heads * dim, 1}, raw_dtype(x));
}

}  // namespace

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin) {
  guard(query, key, cos, sin);
  const Tensor query_out = new_like(query), key_out = new_like(key);
  const RotaryArgs args{dtype_of(query), heads_of(query, query_out), heads_of(key, key_out), table_of(cos), table_of(sin),
                        query.size(2),   query.size(3),              cos.size(2)};
  const int64_t tokens = query.size(0) * query.size(2);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, (query.size(1) + key.size(1)) * args.dim));
  auto* rotate = pick_rotary_tokens();
  if (tokens <= grain) {
    rotate(args, 0, tokens);
  } else {
    torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { rotate(args, begin, end); });
  }
  return {query_out, key_out};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
}

}  // namespace ras::cpu
