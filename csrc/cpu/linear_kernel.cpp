// Products of a matrix M with a few rows, bound by reading M.
//
// Rows are packed once. M comes from memory once, a block of its rows at a time, and meets all others while it is in the cache. A
// product is summed in the same order whatever is computed beside it: a row's result does not depend on the other rows.
#include "cpu/linear.h"

#include "cpu/pair.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

static_assert(kLinearPad % kPair == 0);

// Rows of M and others that are multiplied at a time: as many as leave their sums in registers. A cache gives some 20 bytes a cycle,
// so what is loaded has to be used often.
constexpr int kOutputs = 4, kRows = kRegisters / 8;

// How kPair elements of a row of M, of type T, meet those of another row: both widened to float.
template <class T>
struct Widened {
  using Element = T;
  using Row = float;
  using Values = Pair;

  static void pack(float* to, const void* from, bool from_float, int64_t i, auto count) {
    if (from_float)
      store_pair(to + i, in_order_of(T{}, load_pair(static_cast<const float*>(from) + i, count)));
    else
      store_pair(to + i, load_pair(static_cast<const T*>(from) + i, count));
  }
  static Values load_row(const float* from) { return load_pair(from); }
  static Values load_weights(const T* from, auto count) { return load_pair(from, count); }
  static void keep_values(Values& values) {
    keep(values.a);
    keep(values.b);
  }
  static void add_product(vfloat& sum, Values x, Values y) {
    sum += x.a * y.a;
    sum += x.b * y.b;
  }
};

#if defined(__AVX512BF16__)
// Both as they are.
struct Paired {
  using Element = bf16;
  using Row = bf16;
  using Values = vuint;

  static void pack(bf16* to, const void* from, bool, int64_t i, auto count) {
    const Values values = load_weights(static_cast<const bf16*>(from) + i, count);
    std::memcpy(to + i, &values, sizeof(values));
  }
  static Values load_row(const bf16* from) { return load_raw<Values>(from); }
  static Values load_weights(const bf16* from, auto count) { return load_raw<Values>(from, count); }
  static void keep_values(Values& values) { keep(values); }
  static void add_product(vfloat& sum, Values x, Values y) { sum = add_products(sum, x, y); }
};
#endif

// Calls body(arithmetic).
template <class Body>
void for_arithmetic(DType dtype, [[maybe_unused]] bool source_float, Body&& body) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) {
      if (!source_float) return body(Paired{});
    }
#endif
    body(Widened<T>{});
  });
}

template <class M>
void pack_typed(const PackArgs& args) {
  for (int64_t r = 0; r < args.count; ++r) {
    auto* target = static_cast<typename M::Row*>(args.target) + r * args.padded;
    for (int64_t i = args.length / kPair * kPair; i < args.padded; ++i) target[i] = {};
    each_pair(args.length, [&](int64_t i, auto count) { M::pack(target, args.source[r], args.source_float, i, count); });
  }
}

// A row of M, and how many elements further the next block has one in its place.
template <class T>
struct MatrixRow {
  const T* data;
  int64_t ahead;
};

// dots[r][o] = matrix[o]·row (first + r).
template <class M, int kOut, int kCount>
void dots_of(const LinearArgs& args, const MatrixRow<typename M::Element> (&matrix)[kOut], int64_t first,
             float (&dots)[kCount][kOut]) {
  const auto* rows = static_cast<const typename M::Row*>(args.rows) + first * args.padded;
  // The processor itself looks ahead too little to add and to wait for memory at a time: the passes over a block ask for the next
  // one, each for its share.
  const int64_t step = kPair / ((args.count + kRows - 1) / kRows);
  int64_t next = args.length * first / args.count;
  vfloat sums[kCount][kOut] = {};  // in registers as long as no loop over them is left to the compiler
  each_pair(args.length, [&](int64_t at, auto count) {
    typename M::Values row[kCount];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) row[r] = M::load_row(rows + r * args.padded + at);
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) {
      auto values = M::load_weights(matrix[o].data + at, count);
      M::keep_values(values);
      __builtin_prefetch(matrix[o].data + matrix[o].ahead + next, 0, 2);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) M::add_product(sums[r][o], values, row[r]);
    }
    next += step;
  });
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) dots[r][o] = sum(sums[r][o]);
  }
}

// use(r, dots) for each row r, whose products with kOut rows of M are `dots`.
template <class M, int kOut, int kCount = kRows, class Use>
void each_row(const LinearArgs& args, const MatrixRow<typename M::Element> (&matrix)[kOut], Use&& use, int64_t first = 0) {
  for (; first + kCount <= args.count; first += kCount) {
    float dots[kCount][kOut];
    dots_of<M>(args, matrix, first, dots);
    for (int r = 0; r < kCount; ++r) use(first + r, dots[r]);
  }
  if constexpr (kCount > 1) each_row<M, kOut, kCount / 2>(args, matrix, use, first);
}

// Room for kOut results of each row, in whole vectors.
template <class T, int kOut>
struct Results {
  alignas(4 * kLanes) T data[kLinearRows * kOut + kLanes];

  T* row(int64_t row) { return data + row * kOut; }
};

// To the rows of `out`, from column i on.
template <class T, int kOut>
void put(const LinearArgs& args, int64_t i, const Results<float, kOut>& results) {
  Results<T, kOut> narrow;
  for (int64_t n = 0; n < args.count * kOut; n += kLanes) store(narrow.data + n, load(results.data + n));
  for (int64_t row = 0; row < args.count; ++row) {
    std::memcpy(static_cast<T*>(args.out[row]) + i, narrow.row(row), kOut * sizeof(T));
  }
}

// Outputs i .. i + kOut.
template <class M, int kOut>
void outputs_of(const LinearArgs& args, int64_t i) {
  using T = typename M::Element;
  MatrixRow<T> matrix[kOut];
  for (int o = 0; o < kOut; ++o)
    matrix[o] = {static_cast<const T*>(args.weight) + (i + o) * args.weight_stride, kOut * args.weight_stride};
  Results<float, kOut> results;
  each_row<M>(args, matrix, [&](int64_t row, float(&dots)[kOut]) {
    if (args.partial) {
      std::memcpy(args.partial + row * args.outputs + i, dots, sizeof(dots));
      return;
    }
    for (int o = 0; args.factor && o < kOut; ++o) dots[o] *= args.factor[row];
    for (int o = 0; args.base && o < kOut; ++o) dots[o] += load(static_cast<const T*>(args.base[row]) + i + o, 1)[0];
    std::memcpy(results.row(row), dots, sizeof(dots));
  });
  if (!args.partial) put<T>(args, i, results);
}

// Outputs i .. i + kOut of a gated linear layer, rounded where eager code rounds.
template <class M, int kOut>
void gated_of(const LinearArgs& args, int64_t i) {
  using T = typename M::Element;
  MatrixRow<T> matrix[2 * kOut];
  for (int o = 0; o < kOut; ++o) {
    matrix[o] = {static_cast<const T*>(args.weight) + (i + o) * args.weight_stride, kOut * args.weight_stride};
    matrix[kOut + o] = {static_cast<const T*>(args.up) + (i + o) * args.up_stride, kOut * args.up_stride};
  }
  Results<float, kOut> gates, ups;
  each_row<M>(args, matrix, [&](int64_t row, float(&dots)[2 * kOut]) {
    std::memcpy(gates.row(row), dots, kOut * sizeof(float));
    std::memcpy(ups.row(row), dots + kOut, kOut * sizeof(float));
  });
  for (int64_t n = 0; n < args.count * kOut; n += kLanes) {
    const vfloat gate = activated(
        args.activation, rounded(T{}, load(gates.data + n)),
        [](vfloat x) { return x > 88.0f ? splat(INFINITY) : exp(x); }, [](vfloat x) { return tanh(x); });
    store(gates.data + n, rounded(T{}, gate) * rounded(T{}, load(ups.data + n)));
  }
  put<T>(args, i, gates);
}

template <class M>
void outputs_typed(const LinearArgs& args, int64_t begin, int64_t end) {
  int64_t i = begin;
  if (args.up) {
    for (; i + kOutputs / 2 <= end; i += kOutputs / 2) gated_of<M, kOutputs / 2>(args, i);
    for (; i < end; ++i) gated_of<M, 1>(args, i);
    return;
  }
  for (; i + kOutputs <= end; i += kOutputs) outputs_of<M, kOutputs>(args, i);
  for (; i < end; ++i) outputs_of<M, 1>(args, i);
}

}  // namespace

void linear_pack(const PackArgs& args) {
  for_arithmetic(args.dtype, args.source_float, [&](auto arithmetic) { pack_typed<decltype(arithmetic)>(args); });
}

void linear_outputs(const LinearArgs& args, int64_t begin, int64_t end) {
  for_arithmetic(args.dtype, args.source_float,
                 [&](auto arithmetic) { outputs_typed<decltype(arithmetic)>(args, begin, end); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
