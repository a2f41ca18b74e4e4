// Decode: few query rows per sequence against its whole cache, read once, with the mass of each region from the same softmax.
//
// What shares a kv head, the heads of its group in each row, goes together, four at a time, so that a key or value row is widened
// once for all. Rows may see different stretches of the keys: a key meets those alone that see it. Queries are counted row by row:
// query i of a group is head i % heads of row i / heads.
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

constexpr int kHeads = 4;          // queries that share one pass over a key or value row
constexpr int64_t kKeyBlock = 32;  // key or value rows that stay in L1 while heads and columns are walked

// Asks for the same columns of the row a block later: the processor itself looks ahead too little to add and to wait for memory at a
// time.
template <class T>
void ask_for_next(const T* row, int64_t stride) {
  __builtin_prefetch(row + kKeyBlock * stride, 0, 2);
}

// Views into one query's partial result.
struct Partial {
  float *peak, *total, *mass, *out;

  Partial(const DecodeArgs& args, int64_t query, int64_t split) {
    peak = args.partials + (query * args.splits + split) * args.partial_size;
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

// Calls body(first query, integral constant of how many) for the queries [first, end), kHeads at a time.
template <class Body>
void each_query_block(int64_t first, int64_t end, Body&& body) {
  for (; first + kHeads <= end; first += kHeads) body(first, std::integral_constant<int, kHeads>{});
  for (; first + 2 <= end; first += 2) body(first, std::integral_constant<int, 2>{});
  if (first < end) body(first, std::integral_constant<int, 1>{});
}

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Which keys of a piece the rows see.
struct Sight {
  struct Keys {
    int64_t low, high;  // [low, high)
    bool holds(int64_t key) const { return low <= key && key < high; }
  };
  int64_t count;
  Keys* rows;
  Keys all;  // from the first to the last that some row sees

  Sight(const DecodeArgs& args, int64_t batch, int64_t begin, int64_t end) : count(args.length_q), all{end, begin} {
    rows = static_cast<Keys*>(std::malloc(count * sizeof(Keys)));
    for (int64_t row = 0; row < count; ++row) {
      const Span span(args, batch, row);
      rows[row] = {greater(begin, span.low), lesser(end, span.high + 1)};
      if (!keys(row)) continue;
      all = {lesser(all.low, rows[row].low), greater(all.high, rows[row].high)};
    }
  }
  Sight(const Sight&) = delete;
  ~Sight() { std::free(rows); }

  int64_t keys(int64_t row) const { return greater(0, rows[row].high - rows[row].low); }
  int64_t keys() const { return greater(0, all.high - all.low); }

  // body(first key, how many, first query, integral constant of how many), for keys that stay in L1 and queries that see them.
  template <class Body>
  void each_block(int64_t heads, Body&& body) const {
    for (int64_t key = all.low, end; key < all.high; key = end) {
      end = lesser(key + kKeyBlock, all.high);
      for (int64_t row = 0; row < count; ++row) {
        if (rows[row].low > key) end = lesser(end, rows[row].low);
        if (rows[row].high > key) end = lesser(end, rows[row].high);
      }
      for (int64_t row = 0, next; row < count; row = next) {
        const bool sees = rows[row].holds(key);
        for (next = row + 1; next < count && rows[next].holds(key) == sees;) ++next;
        if (!sees) continue;
        each_query_block(row * heads, next * heads, [&](int64_t query, auto n) { body(key, end - key, query, n); });
      }
    }
  }
};

// Raw dots of one query with `keys` keys, in place into e^(score − peak); peak and total go into the partial.
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

// mass_h[region] += Σ p_h over the region's keys, run by run of equal ids, for the heads of a row.
void sum_regions(const DecodeArgs& args, const int32_t* ids, const float* p, int64_t p_stride, int64_t keys, int64_t first_query,
                 int64_t heads, int64_t split) {
  for (int64_t k = 0, end; k < keys; k = end) {
    const int32_t region = ids[k];
    for (end = k + 1; end < keys && ids[end] == region;) ++end;
    if (region < 0 || region >= args.num_regions) continue;
    for (int64_t h = 0; h < heads; ++h) {
      Partial(args, first_query + h, split).mass[region] += sum_range(p + h * p_stride + k, end - k);
    }
  }
}

template <class T>
void split_typed(const DecodeArgs& args, int64_t group, int64_t split) {
  const int64_t batch = group / args.kv_heads, kv_head = group % args.kv_heads, heads = args.heads / args.kv_heads;
  const int64_t queries = args.length_q * heads, first_query = group * queries, first_head = kv_head * heads;
  const Sight sight(args, batch, split * args.split_keys, (split + 1) * args.split_keys);
  const int64_t width = padded(args.dim), room = padded(sight.keys() + kLanes);  // a vector may begin at a row's last key

  for (int64_t i = 0; i < queries; ++i) {
    const Partial partial(args, first_query + i, split);
    *partial.peak = -INFINITY;
    for (float* value = partial.total; value < partial.out + width; ++value) *value = 0;
  }
  if (!sight.keys()) return;

  float* q = static_cast<float*>(std::malloc(queries * (width + room) * sizeof(float)));
  float* scores = q + queries * width;
  for (int64_t i = 0; i < queries; ++i) {
    const T* row = row_of<T>(args.query, args.query_stride, batch, first_head + i % heads, i / heads);
    each_pair(args.dim, [&](int64_t at, auto count) { store_pair(q + i * width + at, load_pair(row + at, count)); });
  }
  const T* key = row_of<T>(args.key, args.key_stride, batch, kv_head);
  sight.each_block(heads, [&](int64_t k, int64_t count, int64_t i, auto n) {
    dot_keys<T, n.value>(q + i * width, width, key + k * args.key_stride[2], args.key_stride[2], count, args.dim,
                         scores + i * room + k - sight.all.low, room);
  });
  for (int64_t row = 0; row < args.length_q; ++row) {
    const int64_t low = sight.rows[row].low, keys = sight.keys(row);
    if (!keys) continue;
    const int32_t* ids = ids_of(args, batch, low);
    float* own = scores + row * heads * room + low - sight.all.low;
    for (int64_t h = 0; h < heads; ++h) {
      Partial partial(args, first_query + row * heads + h, split);
      softmax(args, ids, bias_of(args, batch, first_head + h), own + h * room, keys, partial);
    }
    if (args.mass && row >= args.length_q - args.mass_rows) {
      sum_regions(args, ids, own, room, keys, first_query + row * heads, heads, split);
    }
  }
  const T* value = row_of<T>(args.value, args.value_stride, batch, kv_head);
  sight.each_block(heads, [&](int64_t k, int64_t count, int64_t i, auto n) {
    add_values<T, n.value>(scores + i * room + k - sight.all.low, room, value + k * args.value_stride[2], args.value_stride[2],
                           count, args.dim, Partial(args, first_query + i, split).out, args.splits * args.partial_size);
  });
  std::free(q);
}

// What the pieces of one query's keys come to.
template <class T>
void merge_query(const DecodeArgs& args, int64_t batch, int64_t row, int64_t head) {
  const int64_t heads = args.heads / args.kv_heads, group = batch * args.kv_heads + head / heads;
  const int64_t query = (group * args.length_q + row) * heads + head % heads;
  const float sink = args.sinks ? args.sinks[head] : -INFINITY;
  float peak = sink;
  for (int64_t s = 0; s < args.splits; ++s) {
    const float piece = *Partial(args, query, s).peak;
    peak = piece > peak ? piece : peak;
  }
  // An empty piece has peak −inf and total 0; with every piece empty the shift must not be −inf − −inf.
  const float shift = peak == -INFINITY ? 0 : peak;
  float total = sink == shift ? 1 : std::exp(sink - shift);  // of an infinite sink, too, which takes everything
  for (int64_t s = 0; s < args.splits; ++s) {
    const Partial piece(args, query, s);
    total += *piece.total == 0 ? 0 : *piece.total * std::exp(*piece.peak - shift);
  }
  args.lse[(batch * args.heads + head) * args.length_q + row] = total == 0 ? -INFINITY : shift + std::log(total);
  const auto share = [&](const Partial& piece) {
    return *piece.total == 0 ? 0 : std::exp(*piece.peak - shift) / total;
  };
  T* out = static_cast<T*>(args.out) + ((batch * args.length_q + row) * args.heads + head) * args.dim;
  each_pair(args.dim, [&](int64_t i, auto count) {
    Pair merged{};
    for (int64_t s = 0; s < args.splits; ++s) {
      const Partial piece(args, query, s);
      merged += share(piece) * load_pair(piece.out + i);
    }
    // A NaN of any bits may have come with a bias or a sink, and rounding to bf16 keeps only some.
    if (std::isnan(total)) merged = {splat(NAN), splat(NAN)};
    store_pair(out + i, merged, count);
  });
  const int64_t mass_row = row - (args.length_q - args.mass_rows);
  if (!args.mass || mass_row < 0) return;
  float* masses = args.mass + ((batch * args.heads + head) * args.mass_rows + mass_row) * args.num_regions;
  for (int64_t r = 0; r < args.num_regions; ++r) {
    masses[r] = std::isnan(total) ? NAN : 0;  // of a NaN sink, where no piece has a key
    for (int64_t s = 0; s < args.splits; ++s) {
      const Partial piece(args, query, s);
      masses[r] += share(piece) * piece.mass[r];
    }
  }
}

}  // namespace

void decode_split(const DecodeArgs& args, int64_t group, int64_t split) {
  for_dtype(args.dtype, [&](auto zero) { split_typed<decltype(zero)>(args, group, split); });
}

void decode_merge(const DecodeArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / args.heads;
      merge_query<decltype(zero)>(args, row / args.length_q, row % args.length_q, i % args.heads);
    }
  });
}

}  // namespace ras::cpu::RAS_FAST_ISA
