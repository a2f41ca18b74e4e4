// CPU kernel of write_cache_: the heads of each new token are copied to its slot.
#include <cstring>

#include "common/cache.h"
#include "cpu/tensor.h"

namespace ras::cpu {
namespace {

// New rows [B, H, T, D] and where they go, [B, H, C, D]; strides in bytes.
struct Rows {
  const char* from;
  char* to;
  int64_t from_stride[3], to_stride[3];
  size_t bytes;  // of a row

  Rows(const Tensor& cache, const Tensor& fresh)
      : from(data_of<const char>(fresh)), to(data_of<char>(cache)), bytes(fresh.size(3) * fresh.element_size()) {
    for (int i = 0; i < 3; ++i) {
      from_stride[i] = fresh.stride(i) * int64_t(fresh.element_size());
      to_stride[i] = cache.stride(i) * int64_t(cache.element_size());
    }
  }

  void copy(int64_t batch, int64_t head, int64_t token, int64_t slot) const {
    std::memcpy(to + batch * to_stride[0] + head * to_stride[1] + slot * to_stride[2],
                from + batch * from_stride[0] + head * from_stride[1] + token * from_stride[2], bytes);
  }
};

}  // namespace

void write_cache(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& key, const Tensor& value) {
  guard_cache(keys, values, slots, key, value, slots.is_cpu(), [](const Tensor& tensor) { return rows_contiguous(tensor); });
  const int64_t heads = keys.size(1), tokens = slots.size(1), capacity = keys.size(2);
  const auto slot_of = [data = data_of<const int64_t>(slots), row = slots.stride(0), step = slots.stride(1)](int64_t b, int64_t t) {
    return data[b * row + t * step];
  };
  for (int64_t b = 0; b < keys.size(0); ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t slot = slot_of(b, t);
      STD_TORCH_CHECK(slot >= 0 && slot < capacity, "ras_fast cache: slots holds ", slot, "; the cache has ", capacity, " slots");
    }
  }
  const Rows all[] = {{keys, key}, {values, value}};
  const int64_t elements = heads * (key.size(3) + value.size(3));  // of a token
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements));
  share_out(keys.size(0) * tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, t = i % tokens, slot = slot_of(b, t);
      for (const Rows& rows : all) {
        for (int64_t h = 0; h < heads; ++h) rows.copy(b, h, t, slot);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) { m.impl("write_cache_", TORCH_BOX(&write_cache)); }

}  // namespace ras::cpu
