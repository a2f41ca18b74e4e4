// Decode: one query row per sequence against its whole cache, read once, with the mass of each region from the same softmax.
//
// The query heads that share a kv head go together, four at a time, so that a key or value row is widened once for all of them.
// A piece of the keys is short enough for its scores to stay in L1 or L2: they are written, turned into probabilities, summed by
// region and multiplied with the values, without any running rescale. Pieces are merged by their peaks, as in split-KV decoding
// (Flash-Decoding, Dao et al. 2023); the masses are rescaled by the same factors as the output.
#include "cpu/decode.h"

#include <cstdlib>
#include <type_traits>

#include "cpu/attention_view.h"
#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

constexpr int kHeads = 4;          // query heads that share one pass over a key or value row
constexpr int64_t kKeyBlock = 32;  // key or value rows that stay in L1 while heads and columns are walked

// Asks for the same columns of the row a block later: the processor itself looks ahead too little to add and to wait for memory at a
// time.
template <class T>
void ask_for_next(const T* row, int64_t stride) {
  __builtin_prefetch(row + kKeyBlock * stride, 0, 2);
}

// Views into one head's partial result.
struct Partial {
  float *peak, *total, *mass, *out;

  Partial(const DecodeArgs& args, int64_t row, int64_t split) {
    peak = args.partials + (row * args.splits + split) * args.partial_size;
    total = peak + 1;
    mass = peak + 2;
    out = mass + args.num_regions;
  }
};

// dots[h][k] = q_h · key_k for N heads and kLanes / N keys, so that the sums fill one vector; q is float in T's pair order.
template <class T, int N>
void dot_tile(const float* q, int64_t stride, const T* key, int64_t key_stride, int64_t dim, float* dots, int64_t dots_stride) {
  constexpr int kKeys = kLanes / N;
  vfloat acc[kLanes] = {};
  each_pair(dim, [&](int64_t i, auto count) {
    Pair row[N];
#pragma GCC unroll 4
    for (int h = 0; h < N; ++h) row[h] = load_pair(q + h * stride + i);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      const Pair keys = load_pair(key + k * key_stride + i, count);
      ask_for_next(key + k * key_stride + i, key_stride);
#pragma GCC unroll 4
      for (int h = 0; h < N; ++h) {
        acc[h * kKeys + k] += row[h].a * keys.a;
        acc[h * kKeys + k] += row[h].b * keys.b;
      }
    }
  });
  const vfloat sums = sum_each(acc);
#pragma GCC unroll 4
  for (int h = 0; h < N; ++h) {
    std::memcpy(dots + h * dots_stride, reinterpret_cast<const float*>(&sums) + h * kKeys, kKeys * sizeof(float));
  }
}

// The same for one key: what is left of a piece.
template <class T, int N>
void dot_key(const float* q, int64_t stride, const T* key, int64_t dim, float* dots, int64_t dots_stride) {
  vfloat acc[N] = {};
  each_pair(dim, [&](int64_t i, auto count) {
    const Pair k = load_pair(key + i, count);
    for (int h = 0; h < N; ++h) {
      const Pair row = load_pair(q + h * stride + i);
      acc[h] += row.a * k.a;
      acc[h] += row.b * k.b;
    }
  });
  for (int h = 0; h < N; ++h) dots[h * dots_stride] = sum(acc[h]);
}

template <class T, int N>
void dot_keys(const float* q, int64_t stride, const T* key, int64_t key_stride, int64_t keys, int64_t dim, float* dots,
              int64_t dots_stride) {
  constexpr int kKeys = kLanes / N;
  int64_t k = 0;
  for (; k + kKeys <= keys; k += kKeys) dot_tile<T, N>(q, stride, key + k * key_stride, key_stride, dim, dots + k, dots_stride);
  for (; k < keys; ++k) dot_key<T, N>(q, stride, key + k * key_stride, dim, dots + k, dots_stride);
}

// out_h += Σ p_h[k] · value_k over `keys` rows for N heads; out is float in T's pair order. Few heads take several keys at a
// time, each into a sum of its own: one sum would wait for its own last addition.
template <class T, int N>
void add_values(const float* p, int64_t p_stride, const T* value, int64_t value_stride, int64_t keys, int64_t dim, float* out,
                int64_t out_stride) {
  constexpr int kChains = kHeads / N;
  each_pair(dim, [&](int64_t i, auto count) {
    Pair acc[N][kChains] = {};
    int64_t k = 0;
    for (; k + kChains <= keys; k += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const Pair v = load_pair(value + (k + c) * value_stride + i, count);
        ask_for_next(value + (k + c) * value_stride + i, value_stride);
#pragma GCC unroll 4
        for (int h = 0; h < N; ++h) acc[h][c] += p[h * p_stride + k + c] * v;
      }
    }
    for (; k < keys; ++k) {
      const Pair v = load_pair(value + k * value_stride + i, count);
      for (int h = 0; h < N; ++h) acc[h][0] += p[h * p_stride + k] * v;
    }
    for (int h = 0; h < N; ++h) {
      Pair total = load_pair(out + h * out_stride + i);
      for (int c = 0; c < kChains; ++c) total += acc[h][c];
      store_pair(out + h * out_stride + i, total);
    }
  });
}

// Calls body(first head, integral constant of how many) for the group's heads, kHeads at a time.
template <class Body>
void each_head_block(int64_t heads, Body&& body) {
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads) body(h, std::integral_constant<int, kHeads>{});
  for (; h + 2 <= heads; h += 2) body(h, std::integral_constant<int, 2>{});
  if (h < heads) body(h, std::integral_constant<int, 1>{});
}

// Raw dots of one head over `keys` keys from `first` on, in place into e^(score − peak); returns (peak, total) into the partial.
void softmax(const DecodeArgs& args, const int32_t* ids, const float* bias, float* s, int64_t keys, Partial& partial) {
  float peak = -INFINITY;
  for (int64_t k = 0; k < keys; k += kLanes) {
    vfloat value = load(s + k) * args.scale;
    if (args.softcap) value = capped(value, args.softcap);
    if (bias) {
      for (int i = 0; i < kLanes && k + i < keys; ++i) {
        const int32_t region = ids[k + i];
        value[i] += region >= 0 && region < args.num_regions ? bias[region] : 0;
      }
    }
    for (int i = 0; i < kLanes; ++i)
      if (k + i >= keys) value[i] = -INFINITY;
    store(s + k, value);
    const float highest = max(value);
    peak = highest > peak ? highest : peak;
  }
  vfloat total{};
  const float shift = peak == -INFINITY ? 0 : peak;  // every key shut out by its bias
  for (int64_t k = 0; k < keys; k += kLanes) {
    const vfloat p = exp(load(s + k) - shift);
    store(s + k, p);
    total += p;
  }
  *partial.peak = peak;
  *partial.total = sum(total);
}

float sum_range(const float* p, int64_t count) {
  vfloat total{};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) total += load(p + k);
  return sum(total + load(p + k, int(count - k)));
}

// mass_h[region] += Σ p_h over the region's keys, run by run of equal ids.
void sum_regions(const DecodeArgs& args, const int32_t* ids, const float* p, int64_t p_stride, int64_t keys, int64_t first_row,
                 int64_t heads, int64_t split) {
  for (int64_t k = 0, end; k < keys; k = end) {
    const int32_t region = ids[k];
    for (end = k + 1; end < keys && ids[end] == region;) ++end;
    if (region < 0 || region >= args.num_regions) continue;
    for (int64_t h = 0; h < heads; ++h) {
      Partial(args, first_row + h, split).mass[region] += sum_range(p + h * p_stride + k, end - k);
    }
  }
}

template <class T>
void split_typed(const DecodeArgs& args, int64_t group, int64_t split) {
  const int64_t batch = group / args.kv_heads, kv_head = group % args.kv_heads, heads = args.heads / args.kv_heads;
  const int64_t first_row = batch * args.heads + kv_head * heads;
  const Span seen(args, ValidKeys(args, batch), 0);
  int64_t low = split * args.split_keys, high = low + args.split_keys;
  if (low < seen.low) low = seen.low;
  if (high > seen.high + 1) high = seen.high + 1;
  const int64_t keys = high > low ? high - low : 0, key_room = padded(keys), width = padded(args.dim);

  for (int64_t h = 0; h < heads; ++h) {
    const Partial partial(args, first_row + h, split);
    *partial.peak = -INFINITY;
    for (float* value = partial.total; value < partial.out + width; ++value) *value = 0;
  }
  if (!keys) return;

  float* q = static_cast<float*>(std::malloc((heads * width + heads * key_room) * sizeof(float)));
  float* scores = q + heads * width;
  for (int64_t h = 0; h < heads; ++h) {
    const T* row = row_of<T>(args.query, args.query_stride, batch, kv_head * heads + h);
    each_pair(args.dim, [&](int64_t i, auto count) { store_pair(q + h * width + i, load_pair(row + i, count)); });
  }
  const T* key = row_of<T>(args.key, args.key_stride, batch, kv_head);
  for (int64_t k = 0; k < keys; k += kKeyBlock) {
    const int64_t count = keys - k < kKeyBlock ? keys - k : kKeyBlock;
    each_head_block(heads, [&](int64_t h, auto n) {
      dot_keys<T, n.value>(q + h * width, width, key + (low + k) * args.key_stride[2], args.key_stride[2], count, args.dim,
                           scores + h * key_room + k, key_room);
    });
  }
  const int32_t* ids = ids_of(args, batch, low);
  for (int64_t h = 0; h < heads; ++h) {
    Partial partial(args, first_row + h, split);
    softmax(args, ids, bias_of(args, batch, kv_head * heads + h), scores + h * key_room, keys, partial);
  }
  if (args.mass) sum_regions(args, ids, scores, key_room, keys, first_row, heads, split);
  const T* value = row_of<T>(args.value, args.value_stride, batch, kv_head);
  const int64_t out_stride = args.splits * args.partial_size;
  for (int64_t k = 0; k < keys; k += kKeyBlock) {
    const int64_t count = keys - k < kKeyBlock ? keys - k : kKeyBlock;
    each_head_block(heads, [&](int64_t h, auto n) {
      add_values<T, n.value>(scores + h * key_room + k, key_room, value + (low + k) * args.value_stride[2], args.value_stride[2],
                             count, args.dim, Partial(args, first_row + h, split).out, out_stride);
    });
  }
  std::free(q);
}

template <class T>
void merge_typed(const DecodeArgs& args) {
  for (int64_t row = 0; row < args.batch * args.heads; ++row) {
    const float sink = args.sinks ? args.sinks[row % args.heads] : -INFINITY;
    float peak = sink;
    for (int64_t s = 0; s < args.splits; ++s) {
      const float piece = *Partial(args, row, s).peak;
      peak = piece > peak ? piece : peak;
    }
    // An empty piece has peak −inf and total 0; with every piece empty the shift must not be −inf − −inf.
    const float shift = peak == -INFINITY ? 0 : peak;
    float total = sink == shift ? 1 : std::exp(sink - shift);  // of an infinite sink, too, which takes everything
    for (int64_t s = 0; s < args.splits; ++s) {
      const Partial piece(args, row, s);
      total += *piece.total == 0 ? 0 : *piece.total * std::exp(*piece.peak - shift);
    }
    args.lse[row] = total == 0 ? -INFINITY : shift + std::log(total);
    const auto share = [&](const Partial& piece) {
      return *piece.total == 0 ? 0 : std::exp(*piece.peak - shift) / total;
    };
    T* out = static_cast<T*>(args.out) + row * args.dim;
    each_pair(args.dim, [&](int64_t i, auto count) {
      Pair merged{};
      for (int64_t s = 0; s < args.splits; ++s) {
        const Partial piece(args, row, s);
        merged += share(piece) * load_pair(piece.out + i);
      }
      // A NaN of any bits may have come with a bias or a sink, and rounding to bf16 keeps only some.
      if (std::isnan(total)) merged = {splat(NAN), splat(NAN)};
      store_pair(out + i, merged, count);
    });
    for (int64_t r = 0; args.mass && r < args.num_regions; ++r) {
      float mass = std::isnan(total) ? NAN : 0;  // of a NaN sink, where no piece has a key
      for (int64_t s = 0; s < args.splits; ++s) {
        const Partial piece(args, row, s);
        mass += share(piece) * piece.mass[r];
      }
      args.mass[row * args.num_regions + r] = mass;
    }
  }
}

}  // namespace

void decode_split(const DecodeArgs& args, int64_t group, int64_t split) {
  for_dtype(args.dtype, [&](auto zero) { split_typed<decltype(zero)>(args, group, split); });
}

void decode_merge(const DecodeArgs& args) {
  for_dtype(args.dtype, [&](auto zero) { merge_typed<decltype(zero)>(args); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
