// CUDA launcher of rotary_embedding: shapes, pointers and the launch; the kernel is in rotary.cuh.
#include "rotary.cuh"

#include "common/rotary.h"
#include "tensor.h"

namespace ras::cuda {
namespace {

template <typename T>
RotaryHeads<T> heads_of(const Tensor& x, const Tensor& out) {
  return {data_of<const T>(x), data_of<T>(out), x.stride(0), x.stride(2), x.stride(1), int(x.size(1))};
}

template <typename Table>
RotaryTable<Table> table_of(const Tensor& table) {
  return {data_of<const Table>(table), table.size(0) == 1 ? 0 : table.stride(0), table.stride(1)};
}

template <typename T, typename Table>
void run(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved,
         const Tensor& query_out, const Tensor& key_out) {
  const RotaryArgs<T, Table> args{heads_of<T>(query, query_out), heads_of<T>(key, key_out), table_of<Table>(cos),
                                  table_of<Table>(sin), int(query.size(2)), int(query.size(3)), int(cos.size(2))};
  with_rotary_kernel(args, interleaved, query.size(0) * query.size(2),
                     [&](auto kernel, dim3 grid) { launch(kernel, args, grid, kRotaryThreads, 0, query); });
}

}  // namespace

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                            bool interleaved) {
  guard_rotary(query, key, cos, sin, [&](const Tensor& tensor) { return rows_beside(query, tensor); });
  STD_TORCH_CHECK(query.size(0) * query.size(2) < (int64_t(1) << 31) &&
                      (query.size(1) + key.size(1)) * query.size(3) <= 65535 * kRotaryThreads,
                  "ras_fast rotary: tokens or heads are too many for one launch");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor query_out = new_heads(query), key_out = new_heads(key);
  if (query.numel() + key.numel() == 0) return {query_out, key_out};
  for_dtype(dtype_of(query), [&](auto zero) {
    using T = decltype(zero);
    auto* rotate = dtype_of(cos) == dtype_of(query) ? run<T, T> : run<T, float>;
    rotate(query, key, cos, sin, interleaved, query_out, key_out);
  });
  return {query_out, key_out};
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) { m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding)); }

}  // namespace ras::cuda
