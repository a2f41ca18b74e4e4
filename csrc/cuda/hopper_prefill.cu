// CUDA launcher of hopper_prefill: checks, tensor maps, one launch; the kernel is in hopper_prefill.cuh. Compiled for sm_90a
// alone (ras_fast/build.py), and registers its op itself, so that a build without that architecture lacks nothing but the op.
#include "hopper_prefill.cuh"

#include <cudaTypedefs.h>

#include <algorithm>

#include "attention_args.h"
#include "tensor.h"

namespace ras::cuda {
namespace {

// The driver's function, asked for at run time: the library has to load where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          "look-up of cuTensorMapEncodeTiled");
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && found, "ras_fast: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return encoder;
}

template <typename T>
CUtensorMap panels_of(const Tensor& tensor, int box_rows, const char* name) {
  const MappedTensor mapped{data_of<const void>(tensor), tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3),
                            {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
  CUtensorMap map;
  const CUresult result = encode_panels<T>(tensor_map_encoder(), &map, mapped, box_rows);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "ras_fast: no tensor map can be made of ", name, " (CUresult ", int(result),
                  "): its address and its strides have to be multiples of 16 bytes");
  return map;
}

template <typename T>
void run(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& ids, double scale, bool causal,
         const Tensor& out, const Tensor& lse, const Tensor& mass) {
  const int dim = int(query.size(3)), query_rows = int(query.size(2)), multiprocessors = device_of(query).multiprocessors;
  const int64_t heads = query.size(0) * query.size(1);
  const int consumers = prefill_consumers(dim, query_rows, heads, multiprocessors), tile_rows = kConsumerRows * consumers;
  PrefillArgs<T> a{};
  a.query = panels_of<T>(query, tile_rows, "query");
  a.key = panels_of<T>(key, prefill_keys(dim), "key");
  a.value = panels_of<T>(value, prefill_keys(dim), "value");
  a.out = data_of<T>(out);
  a.lse = data_of<float>(lse);
  a.batch = int(query.size(0));
  a.heads = int(query.size(1));
  a.group = int(query.size(1) / key.size(1));
  a.query_rows = query_rows;
  a.keys = int(key.size(2));
  a.causal = causal;
  a.scale_log2 = float(scale) * kLog2e;
  if (mass.numel() > 0) {
    a.mass = data_of<float>(mass);
    a.region_ids = data_of<const int32_t>(ids);
    a.ids_batch_stride = ids->stride(0);
    a.regions = int(mass.size(3));
    a.mass_rows = int(mass.size(2));
  }
  with_prefill_kernel<T>(dim, consumers, a, [&](auto kernel, int threads, size_t shared_bytes) {
    // Always the most, not what this call needs: another thread's call with fewer regions may come before the launch.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kPrefillMostShared)), "shared memory");
    const auto grid = unsigned(std::min<int64_t>(row_tiles(query_rows, tile_rows) * heads, multiprocessors));
    launch(kernel, a, grid, threads, shared_bytes, query);
  });
}

std::tuple<Tensor, Tensor, Tensor> hopper_prefill(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                  bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                  int64_t window, double softcap, const MaybeTensor& sinks,
                                                  const MaybeTensor& region_bias, int64_t mass_rows) {
  const int64_t dim = query.size(3);
  STD_TORCH_CHECK(!kv_start && !kv_end && window == 0 && softcap == 0 && !sinks && !region_bias && scale > 0,
                  "ras_fast: hopper_prefill takes a positive scale, and no kv_start, kv_end, window, softcap, sinks or "
                  "region_bias");
  STD_TORCH_CHECK(prefill_supports_head_dim(int(dim)),
                  "ras_fast: hopper_prefill takes head dimensions in whole eights up to 256, not ", dim);
  STD_TORCH_CHECK(row_tiles(int(query.size(2)), 2 * kConsumerRows) * query.size(0) * query.size(1) < (int64_t(1) << 30),
                  "ras_fast: batch, heads or rows are too many for one launch");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const auto [out, lse, mass] = new_outputs(query, mass_rows, num_regions);
  if (lse.numel() == 0) return {out, lse, mass};
  // The driver's encoder wants a current context, which a thread that has not called the run-time yet does not have.
  check(cudaSetDevice(query.get_device_index()), "device");
  STD_TORCH_CHECK(key.size(2) > 0, "ras_fast: hopper_prefill needs at least one key");
  with_half_type(query, [&](auto zero) {
    run<decltype(zero)>(query, key, value, region_ids, scale, is_causal, out, lse, mass);
  });
  return {out, lse, mass};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) { m.impl("hopper_prefill", TORCH_BOX(&hopper_prefill)); }

}  // namespace ras::cuda
