// CPU launcher of rotary_embedding: shapes and pointers; the arithmetic is in rotary_kernel.cpp.
#include "cpu/rotary.h"

#include "common/rotary.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

RotaryHeads heads_of(const Tensor& x, const Tensor& out) {
  return {data_of<const void>(x), x.stride(0), x.stride(1), x.stride(2), x.size(1), data_of<void>(out)};
}

RotaryTable table_of(const Tensor& table) {
  return {data_of<const void>(table), table.size(0) == 1 ? 0 : table.stride(0), table.stride(1)};
}

}  // namespace

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                            bool interleaved) {
  guard_rotary(query, key, cos, sin, [](const Tensor& tensor) { return rows_contiguous(tensor); });
  const Tensor query_out = empty_heads(query), key_out = empty_heads(key);
  const RotaryArgs args{.dtype = dtype_of(query),
                        .table_dtype = dtype_of(cos),
                        .interleaved = interleaved,
                        .query = heads_of(query, query_out),
                        .key = heads_of(key, key_out),
                        .cos = table_of(cos),
                        .sin = table_of(sin),
                        .length = query.size(2),
                        .dim = query.size(3),
                        .rotated = cos.size(2)};
  const int64_t tokens = query.size(0) * query.size(2);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, (query.size(1) + key.size(1)) * args.dim));
  auto* rotate = pick_rotary_tokens();
  share_out(tokens, grain, [&](int64_t begin, int64_t end) { rotate(args, begin, end); });
  return {query_out, key_out};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
}

}  // namespace ras::cpu
