// x · cos + rotate_half(x) · sin for every head of a token: the token's row of cosines and sines stays in L1 for all heads.
//
// Both products and their sum are rounded to the tables' type, as in Hugging Face's eager code: compiled without contraction.
#include "cpu/rotary.h"

#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

// rotate_half where pairs are neighbours: element 2i becomes -x[2i + 1], element 2i + 1 becomes x[2i].
inline vfloat turned(vfloat x) {
  vint other;
  vfloat sign;
  for (int i = 0; i < kLanes; ++i) other[i] = i ^ 1, sign[i] = i % 2 ? 1.0f : -1.0f;
  return __builtin_shuffle(x, other) * sign;
}
template <class T>
inline Pair turned(T, Pair x) {
  return {turned(x.a), turned(x.b)};
}
inline Pair turned(bf16, Pair x) { return {-x.b, x.a}; }  // even and odd elements are apart already

template <class T, class Table, class Count>
inline Pair product(Pair value, const Table* table, Count count) {
  return rounded(Table{}, value * load_table<T>(table, count));
}

template <class T, class Table>
void rotate_neighbours(const T* x, const Table* cos, const Table* sin, T* out, int64_t rotated) {
  each_whole_pair(rotated, [&](int64_t i, auto count) {
    const Pair value = load_pair(x + i, count);
    store_pair(out + i, product<T>(value, cos + i, count) + product<T>(turned(T{}, value), sin + i, count), count);
  });
}

template <class T, class Table>
void rotate_halves(const T* x, const Table* cos, const Table* sin, T* out, int64_t rotated) {
  const int64_t half = rotated / 2;
  each_whole_pair(half, [&](int64_t i, auto count) {
    const Pair low = load_pair(x + i, count), high = load_pair(x + half + i, count);
    store_pair(out + i, product<T>(low, cos + i, count) - product<T>(high, sin + i, count), count);
    store_pair(out + half + i, product<T>(high, cos + half + i, count) + product<T>(low, sin + half + i, count), count);
  });
}

template <class T, class Table>
void rotate_heads(const RotaryArgs& args, const RotaryHeads& heads, int64_t batch, int64_t token, const Table* cos,
                  const Table* sin) {
  const T* x = static_cast<const T*>(heads.data) + batch * heads.batch_stride + token * heads.token_stride;
  T* out = static_cast<T*>(heads.out) + (batch * args.length + token) * heads.heads * args.dim;
  auto* rotate = args.interleaved ? rotate_neighbours<T, Table> : rotate_halves<T, Table>;
  for (int64_t head = 0; head < heads.heads; ++head, x += heads.head_stride, out += args.dim) {
    rotate(x, cos, sin, out, args.rotated);
    std::memcpy(out + args.rotated, x + args.rotated, (args.dim - args.rotated) * sizeof(T));
  }
}

template <class T, class Table>
void rotate_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.length, token = i % args.length;
    const auto row = [&](const RotaryTable& table) {
      return static_cast<const Table*>(table.data) + batch * table.batch_stride + token * table.token_stride;
    };
    const Table *cos = row(args.cos), *sin = row(args.sin);
    rotate_heads<T>(args, args.query, batch, token, cos, sin);
    rotate_heads<T>(args, args.key, batch, token, cos, sin);
  }
}

}  // namespace

void rotary_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.table_dtype == args.dtype ? rotate_tokens<T, T>(args, begin, end) : rotate_tokens<T, float>(args, begin, end);
  });
}

}  // namespace ras::cpu::RAS_FAST_ISA
