// Attention of many query rows with the mass of each region from the same softmax: flash attention (Dao et al. 2022) on float
// registers.
//
// A call owns a tile of query rows of all heads that share a kv head, and walks the keys in blocks. A block is widened once, the
// keys transposed, for all these rows; they go by six at a time: scores into a buffer in L1, online softmax on it, products with
// the values added to the rows' outputs. Products are taken in float whatever the inputs are, but for bf16 on processors that
// multiply pairs of it faster (dispatch.h): there two dimensions of a key, and two keys of a value, share a lane.
//
// Scores are in units of log2(e), so that e^s = 2^score. A row's maximum and sum are kept lane by lane as far as possible: adding up
// lanes takes longer than the exponentials of a block.
//
// Mass: a block's probabilities are summed by runs of keys of one region, in units of the running maximum, as the softmax's
// denominator is.
#include "cpu/prefill.h"

#include <cstdlib>
#include <type_traits>

#include "cpu/attention_view.h"
#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kVectors = kRegisters / 8;  // times kRows accumulators fit into the registers
constexpr int kBlock = 64;                // keys
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// What a lane of a product's operand holds, a unit: kWidth elements of T, in the memory of one float.
template <class T>
struct Widened {
  using Element = T;
  static constexpr int kWidth = 1;

  static vfloat load_units(const T* from, auto count) { return load(from, count); }
  static vfloat value_units(const T* value, const T*, auto count) { return load(value, count); }
  static void store_weights(float*, vfloat) {}  // they are where the scores were
  static vfloat broadcast(const float* unit) { return splat(*unit); }
  static vfloat add_product(vfloat sum, vfloat x, vfloat y) { return sum + x * y; }
};

#if defined(__AVX512BF16__)
struct Paired {
  using Element = bf16;
  static constexpr int kWidth = 2;

  static vfloat load_units(const bf16* from, auto count) { return load_raw<vfloat>(from, count); }
  // Of two neighbouring keys; the second may be null: 0.
  static vfloat value_units(const bf16* value, const bf16* next, auto count) {
    return bits<vfloat>(spread(value, count) | (next ? spread(next, count) << 16 : vuint{}));
  }
  static void store_weights(float* to, vfloat weights) {
    const vhalf narrow = narrow_fast(weights);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
  static vfloat broadcast(const float* unit) { return bits<vfloat>(splat(load_raw<uint32_t>(unit))); }
  static vfloat add_product(vfloat sum, vfloat x, vfloat y) { return add_products(sum, bits<vuint>(x), bits<vuint>(y)); }

 private:
  static vuint spread(const bf16* from, auto count) { return __builtin_convertvector(load_raw<vhalf>(from, count), vuint); }
};
#endif

// c[r][0 … V vectors] = (or +=) Σ_k a[r][k] · b[k][…] for N rows, a and b in units.
template <class M, int N, int V>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
              bool add) {
  vfloat sum[N][V];
#pragma GCC unroll 6
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * c_stride + v * kLanes) : vfloat{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    vfloat right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < N; ++r) {
      const vfloat left = M::broadcast(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = M::add_product(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
#define RAS_FAST_ROWS(V) \
  {multiply<M, 1, V>, multiply<M, 2, V>, multiply<M, 3, V>, multiply<M, 4, V>, multiply<M, 5, V>, multiply<M, 6, V>}
template <class M>
constexpr Multiply kMultiply[][kRows] = {RAS_FAST_ROWS(1), RAS_FAST_ROWS(2), RAS_FAST_ROWS(3), RAS_FAST_ROWS(4)};
#undef RAS_FAST_ROWS

// The same for any number of columns, in whole vectors.
template <class M>
void multiply(int rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
              int64_t c_stride, int64_t columns, bool add) {
  for (int64_t first = 0; first < columns; first += kVectors * kLanes) {
    const int64_t vectors = (columns - first) / kLanes < kVectors ? (columns - first) / kLanes : kVectors;
    kMultiply<M>[vectors - 1][rows - 1](a, a_stride, b + first, b_stride, depth, c + first, c_stride, add);
  }
}

// v[i][j] becomes v[j][i]; neighbours at each distance trade halves.
template <int kStep = kLanes / 2>
void transpose(vfloat* v) {
  vint low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kStep ? i - kStep + kLanes : i;
    high[i] = i & kStep ? i + kLanes : i + kStep;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const vfloat a = v[i], b = v[i + kStep];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kStep] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(v);
}

// The memory of one call. Where a unit is a float, the weights take the place of the scores.
struct Scratch {
  float *query, *out, *top, *total, *mass, *scores, *weights, *keys, *values, *bias, *memory;
  Span* seen;  // by each packed row of the tile

  Scratch(const PrefillArgs& args, int64_t rows, bool weights_apart) {
    const int64_t width = padded(args.dim), heads = args.heads / args.kv_heads, regions = args.mass ? args.num_regions : 0;
    const int64_t sizes[] = {rows * width,   rows * width,                   rows,           rows * kLanes,  rows * regions,
                             kRows * kBlock, weights_apart * kRows * kBlock, width * kBlock, kBlock * width, heads * kBlock};
    float** const parts[] = {&query, &out, &top, &total, &mass, &scores, &weights, &keys, &values, &bias};
    int64_t size = 0;
    for (const int64_t part : sizes) size += padded(part);
    memory = static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64));
    float* next = memory;
    for (int i = 0; i < 10; next += padded(sizes[i]), ++i) *parts[i] = next;
    if (!weights_apart) weights = scores;
    seen = static_cast<Span*>(std::malloc(rows * sizeof(Span)));
  }
  ~Scratch() {
    std::free(seen);
    std::free(memory);
  }
};

template <class M>
class Tile {
  using T = typename M::Element;

 public:
  Tile(const PrefillArgs& args, int64_t group, int64_t row_begin, int64_t row_end)
      : args(args), batch(group / args.kv_heads), kv_head(group % args.kv_heads), heads(args.heads / args.kv_heads),
        row_begin(row_begin), count(row_end - row_begin), width(padded(args.dim)),
        score_unit(args.softcap ? args.scale : args.scale * kLog2e), work(args, heads * count, M::kWidth > 1) {
    ids = ids_of(args, batch);
    for (int64_t p = 0; p < heads * count; ++p) work.seen[p] = {args, batch, index(p)};
  }

  void run() {
    begin();
    for (Span part = stretch(0); !part.empty(); part = stretch(part.high + 1)) {
      for (int64_t block = part.low; block <= part.high; block += kBlock) {
        const int64_t last = part.high < block + kBlock ? part.high : block + kBlock - 1;
        load_block(block, int(last + 1 - block));
        for (int64_t row = 0; row < heads * count; row += kRows) {
          attend({block, last}, row, int(heads * count - row < kRows ? heads * count - row : kRows));
        }
      }
    }
    finish();
  }

 private:
  const PrefillArgs& args;
  int64_t batch, kv_head, heads, row_begin, count, width;
  float score_unit;  // what the products of queries and keys are multiplied by
  Scratch work;
  const int32_t* ids;
  int runs = 0;  // of keys of one region in this block
  struct Run {
    int32_t region;
    int begin, end;
  } run_of[kBlock];

  // Packed row p of the tile: head p / count of the group, row p % count of the tile.
  int64_t head(int64_t p) const { return kv_head * heads + p / count; }
  int64_t index(int64_t p) const { return row_begin + p % count; }
  int64_t stat(int64_t p) const { return batch * args.heads + head(p); }
  bool weighed(int64_t p) const { return args.mass && index(p) >= args.length_q - args.mass_rows; }

  // The next keys from `from` on that some row sees, up to one that none sees: what lies there need not even be numbers.
  Span stretch(int64_t from) const {
    int64_t first = args.length_k;
    for (int64_t row = 0; row < count; ++row) {
      const Span seen = work.seen[row];
      const int64_t low = seen.low > from ? seen.low : from;
      if (low <= seen.high && low < first) first = low;
    }
    Span part(first, first - 1);
    for (bool grown = first < args.length_k; grown;) {
      grown = false;
      for (int64_t row = 0; row < count; ++row) {
        const Span seen = work.seen[row];
        if (seen.low > part.high + 1 || seen.high <= part.high) continue;
        part.high = seen.high;
        grown = true;
      }
    }
    return part;
  }

  static int64_t units(int64_t elements) { return (elements + M::kWidth - 1) / M::kWidth; }

  void begin() {
    for (int64_t p = 0; p < heads * count; ++p) {
      const T* query = row_of<T>(args.query, args.query_stride, batch, head(p), index(p));
      each_part<kLanes * M::kWidth>(args.dim, [&](int64_t d, auto dims) {
        store(work.query + p * width + d / M::kWidth, M::load_units(query + d, dims));
      });
      std::memset(work.out + p * width, 0, width * sizeof(float));
      if (args.mass) std::memset(work.mass + p * args.num_regions, 0, args.num_regions * sizeof(float));
      work.top[p] = args.sinks ? args.sinks[head(p)] * kLog2e : -INFINITY;
      vfloat total{};
      total[0] = work.top[p] == -INFINITY ? 0 : std::isnan(work.top[p]) ? NAN : 1;  // a sink's own share, 2^0
      store(work.total + p * kLanes, total);
    }
  }

  // Keys [block, block + keys): transposed keys [units of D][kBlock], values [units of kBlock][width], regions. What is past the
  // end is 0.
  void load_block(int64_t block, int keys) {
    const T* key = row_of<T>(args.key, args.key_stride, batch, kv_head, block);
    const T* value = row_of<T>(args.value, args.value_stride, batch, kv_head, block);
    for (int k = 0; k < kBlock; k += kLanes) {
      each_part<kLanes * M::kWidth>(args.dim, [&](int64_t d, auto dims) {
        vfloat square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const T* from = key + (k + i) * args.key_stride[2] + d;
          square[i] = k + i >= keys ? vfloat{} : M::load_units(from, dims);
        }
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(work.keys + (d / M::kWidth + i) * kBlock + k, square[i]);
      });
    }
    for (int k = 0; k < keys; k += M::kWidth) {
      const T* row = value + k * args.value_stride[2];
      const T* next = k + 1 < keys ? row + args.value_stride[2] : nullptr;
      each_part<kLanes>(args.dim, [&](int64_t d, auto dims) {
        store(work.values + k / M::kWidth * width + d, M::value_units(row + d, next ? next + d : nullptr, dims));
      });
    }
    runs = 0;
    if (!ids) return;
    for (int k = 0; k < keys; ++k) {
      const int32_t id = ids[block + k], region = id >= 0 && id < args.num_regions ? id : -1;
      if (!runs || run_of[runs - 1].region != region) run_of[runs++] = {region, k, k};
      run_of[runs - 1].end = k + 1;
    }
    for (int64_t h = 0; args.region_bias && h < heads; ++h) {
      const float* bias = bias_of(args, batch, kv_head * heads + h);
      for (int run = 0; run < runs; ++run) {
        for (int k = run_of[run].begin; k < run_of[run].end; ++k) {
          work.bias[h * kBlock + k] = run_of[run].region < 0 ? 0 : bias[run_of[run].region] * kLog2e;
        }
      }
    }
  }

  // `rows` packed rows from `row` on against the block.
  void attend(Span block, int64_t row, int rows) {
    Span some(INT64_MAX, -1);
    for (int r = 0; r < rows; ++r) {
      const Span seen = work.seen[row + r];
      some.low = seen.low < some.low ? seen.low : some.low;
      some.high = seen.high > some.high ? seen.high : some.high;
    }
    if (block.low > some.high || block.high < some.low) return;
    if (some.high < block.high) block.high = some.high;
    const int64_t keys = block.high + 1 - block.low, columns = padded(keys);
    multiply<M>(rows, work.query + row * width, width, work.keys, kBlock, units(args.dim), work.scores, kBlock, columns, false);
    for (int r = 0; r < rows; ++r) softmax(block, row + r, work.scores + r * kBlock, work.weights + r * kBlock, columns);
    multiply<M>(rows, work.weights, kBlock, work.values, width, units(keys), work.out + row * width, width, width, true);
  }

  // Scores into 2^(score − top) of a row, whose top, total, mass and output follow.
  void softmax(Span block, int64_t p, float* s, float* weights, int64_t columns) {
    Span seen = work.seen[p];
    if (block.high < seen.high) seen.high = block.high;
    const bool masked = block.low < seen.low || block.low + columns - 1 > seen.high;
    const bool plain = !masked && !args.softcap && !args.region_bias;
    if (!plain) finish_scores(block.low, p, seen, masked, s, columns);
    const float unit = plain ? score_unit : 1;
    vfloat highest = load(s) * unit;
    for (int64_t k = kLanes; k < columns; k += kLanes) highest = max(load(s + k) * unit, highest);
    if (any(highest > work.top[p])) raise(p, max(highest));
    const float shift = work.top[p] == -INFINITY ? 0 : work.top[p];
    vfloat sums{};
    for (int64_t k = 0; k < columns; k += kLanes) {
      const vfloat probability = exp2_of_negative(load(s + k) * unit - shift);
      store(s + k, probability);
      M::store_weights(weights + k / M::kWidth, probability);
      sums += probability;
    }
    store(work.total + p * kLanes, load(work.total + p * kLanes) + sums);
    if (weighed(p)) weigh(work.mass + p * args.num_regions, s, sums, columns);
  }

  // The scale, the softcap, the bias and the masks.
  void finish_scores(int64_t block, int64_t p, Span seen, bool masked, float* s, int64_t columns) {
    const float* bias = args.region_bias ? work.bias + p / count * kBlock : nullptr;
    vint place;
    for (int i = 0; i < kLanes; ++i) place[i] = i;
    for (int64_t k = 0; k < columns; k += kLanes) {
      vfloat score = load(s + k) * score_unit;
      if (args.softcap) score = capped(score, args.softcap) * kLog2e;
      if (bias) score += load(bias + k);
      const vint low = splat(int32_t(seen.low - block - k)), high = splat(int32_t(seen.high - block - k));
      if (masked) score = ((place >= low) & (place <= high)) ? score : splat(-INFINITY);
      store(s + k, score);
    }
  }

  // A higher maximum: what was summed in units of the old one shrinks.
  void raise(int64_t p, float top) {
    const float factor = std::exp2(work.top[p] - top);
    work.top[p] = top;
    store(work.total + p * kLanes, load(work.total + p * kLanes) * factor);
    for (int64_t d = 0; d < width; d += kLanes) store(work.out + p * width + d, load(work.out + p * width + d) * factor);
    for (int64_t r = 0; weighed(p) && r < args.num_regions; ++r) work.mass[p * args.num_regions + r] *= factor;
  }

  // Adds the probabilities of each run of keys to its region.
  void weigh(float* mass, const float* probabilities, vfloat sums, int64_t columns) {
    if (runs == 1) {
      if (run_of[0].region >= 0) mass[run_of[0].region] += sum(sums);
      return;
    }
    for (int run = 0; run < runs && run_of[run].begin < columns; ++run) {
      const auto [region, begin, end] = run_of[run];
      if (region < 0) continue;
      const int stop = end < columns ? end : int(columns);
      float total = 0;
      for (int k = begin; k < stop; ++k) total += probabilities[k];
      mass[region] += total;
    }
  }

  void finish() {
    for (int64_t p = 0; p < heads * count; ++p) {
      const float total = sum(load(work.total + p * kLanes)), share = total == 0 ? 0 : 1 / total;
      args.lse[stat(p) * args.length_q + index(p)] = total == 0 ? -INFINITY : (work.top[p] + std::log2(total)) * kLn2;
      T* out = static_cast<T*>(args.out) + ((batch * args.length_q + index(p)) * args.heads + head(p)) * args.dim;
      for (int64_t d = 0; d < args.dim; d += kLanes) {
        const vfloat value = load(work.out + p * width + d) * share;
        d + kLanes <= args.dim ? store(out + d, value) : store(out + d, value, int(args.dim - d));
      }
      if (!weighed(p)) continue;
      const int64_t row = index(p) - (args.length_q - args.mass_rows);
      float* mass = args.mass + (stat(p) * args.mass_rows + row) * args.num_regions;
      for (int64_t r = 0; r < args.num_regions; ++r) mass[r] = work.mass[p * args.num_regions + r] * share;
    }
  }
};

}  // namespace

void prefill(const PrefillArgs& args, int64_t group, int64_t row_begin, int64_t row_end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
#if defined(__AVX512BF16__)
    using Arithmetic = std::conditional_t<std::is_same_v<T, bf16>, Paired, Widened<T>>;
#else
    using Arithmetic = Widened<T>;
#endif
    Tile<Arithmetic>(args, group, row_begin, row_end).run();
  });
}

}  // namespace ras::cpu::RAS_FAST_ISA
