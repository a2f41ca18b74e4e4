// Rotary position embedding of all query and key heads in one launch: x · cos + rotate_half(x) · sin.
//
// Of a head the first r dimensions are rotated, i together with i + r/2 or, interleaved, 2i with 2i + 1, and the others copied. A
// thread takes two runs of 16 bytes to rotate, or one to copy: every element is read once and written once, and the token's row
// of cosines and sines comes from L1 for all heads but the first. Products are rounded to the tables' type and sums to x's, as in
// eager code.
//
// Framework-free: rotary.cu is the launcher.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace ras::cuda {

// Queries or keys: [B, H, L, D] in any strides, and where they go, [B, L, H, D].
template <typename T>
struct RotaryHeads {
  const T* data;
  T* out;
  int64_t batch_stride, token_stride, head_stride;
  int heads;
};

template <typename Table>
struct RotaryTable {
  const Table* data;  // [B, L, rotated]
  int64_t batch_stride, token_stride;
};

// Table: T or float.
template <typename T, typename Table>
struct RotaryArgs {
  RotaryHeads<T> query, key;
  RotaryTable<Table> cos, sin;
  int length, dim, rotated;
};

constexpr int kRotaryThreads = 256;

// What the threads of a head share out: two runs of kVec dimensions to rotate, or one beyond r.
template <typename Args>
__host__ __device__ int rotary_units(const Args& args, int vec) {
  return (args.rotated / 2 + args.dim - args.rotated) / vec;
}

// kVec neighbouring elements as floats: one, or what 16 bytes of x hold.
template <int kVec>
struct Run {
  float value[kVec];

  template <typename T>
  __device__ static Run load(const T* from) {
    Run run;
    if constexpr (kVec == 1) {
      run.value[0] = to_float(*from);
    } else {
      constexpr int kAccess = kAccessBytes / sizeof(T);
#pragma unroll
      for (int i = 0; i < kVec; i += kAccess) unpack<T>(*reinterpret_cast<const uint4*>(from + i), run.value + i);
    }
    return run;
  }

  template <typename T>
  __device__ void store(T* to) const {
    if constexpr (kVec == 1) {
      *to = from_float<T>(value[0]);
    } else {
      *reinterpret_cast<uint4*>(to) = pack<T>(value);
    }
  }

  // Rounded to Table. By an instruction of its own: a product that is added the compiler would fuse into the sum.
  template <typename Table>
  __device__ Run times(const Run& other) const {
    Run run;
#pragma unroll
    for (int i = 0; i < kVec; ++i) run.value[i] = __fmul_rn(value[i], other.value[i]);
    if constexpr (kVec == 1) {
      run.value[0] = to_float(from_float<Table>(run.value[0]));
    } else {
      round_all<Table, kVec>(run.value);
    }
    return run;
  }

  // rotate_half where pairs are neighbours.
  __device__ Run turned() const {
    static_assert(kVec % 2 == 0);
    Run run;
#pragma unroll
    for (int i = 0; i < kVec; i += 2) run.value[i] = -value[i + 1], run.value[i + 1] = value[i];
    return run;
  }

  // a + sign * b; the sign is 1 or -1, so nothing is rounded but the sum.
  __device__ friend Run sum(const Run& a, const Run& b, float sign) {
    Run run;
#pragma unroll
    for (int i = 0; i < kVec; ++i) run.value[i] = fmaf(sign, b.value[i], a.value[i]);
    return run;
  }
};

// Grid (B·L tokens, units of all heads / kRotaryThreads, rounded up).
template <typename T, typename Table, int kVec, bool kInterleaved>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(const __grid_constant__ RotaryArgs<T, Table> args) {
  const int units = rotary_units(args, kVec), half = args.rotated / 2;
  const unsigned index = blockIdx.y * kRotaryThreads + threadIdx.x;
  int head = index / unsigned(units);
  const int first = (index - head * units) * kVec;
  allow_next_kernel();
  wait_for_previous_kernel();  // also by threads without work: the kernel after this one waits for this one alone
  if (head >= args.query.heads + args.key.heads) return;
  const bool is_key = head >= args.query.heads;
  const RotaryHeads<T>& heads = is_key ? args.key : args.query;
  if (is_key) head -= args.query.heads;
  const int batch = blockIdx.x / unsigned(args.length), token = blockIdx.x - batch * args.length;
  const T* x = heads.data + batch * heads.batch_stride + token * heads.token_stride + head * heads.head_stride;
  T* out = heads.out + (int64_t(blockIdx.x) * heads.heads + head) * args.dim;
  if (first >= half) {
    using Bits = Pack<T, kVec>;
    *reinterpret_cast<Bits*>(out + first + half) = *reinterpret_cast<const Bits*>(x + first + half);
    return;
  }
  const auto load_row = [&](const RotaryTable<Table>& table, int at) {
    return Run<kVec>::load(table.data + batch * table.batch_stride + token * table.token_stride + at);
  };
  const auto product = [](const Run<kVec>& a, const Run<kVec>& b) { return a.template times<Table>(b); };
  const int at = kInterleaved ? 2 * first : first, next = at + (kInterleaved ? kVec : half);
  const auto low = Run<kVec>::load(x + at), high = Run<kVec>::load(x + next);
  const auto low_cos = load_row(args.cos, at), high_cos = load_row(args.cos, next);
  const auto low_sin = load_row(args.sin, at), high_sin = load_row(args.sin, next);
  if constexpr (kInterleaved && kVec > 1) {
    sum(product(low, low_cos), product(low.turned(), low_sin), 1.f).store(out + at);
    sum(product(high, high_cos), product(high.turned(), high_sin), 1.f).store(out + next);
  } else {
    sum(product(low, low_cos), product(high, low_sin), -1.f).store(out + at);
    sum(product(high, high_cos), product(low, high_sin), 1.f).store(out + next);
  }
}

// How many neighbouring dimensions a thread takes at a time: 16 bytes of x, where halves, rows and bases are multiples of that.
template <typename T, typename Table>
int rotary_width(const RotaryArgs<T, Table>& args) {
  constexpr int kVec = kAccessBytes / sizeof(T);
  const auto whole = [](int64_t elements) { return elements % kVec == 0; };
  const auto based = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0; };
  const auto table = [&](const RotaryTable<Table>& t) { return based(t.data) && whole(t.batch_stride) && whole(t.token_stride); };
  const auto heads = [&](const RotaryHeads<T>& h) {
    return based(h.data) && whole(h.batch_stride) && whole(h.token_stride) && whole(h.head_stride);
  };
  const bool aligned = whole(args.rotated / 2) && whole(args.dim) && heads(args.query) && heads(args.key) && table(args.cos) &&
                       table(args.sin);
  return aligned ? kVec : 1;
}

// Calls start(kernel, grid) for the instance that fits.
template <typename T, typename Table, typename Start>
void with_rotary_kernel(const RotaryArgs<T, Table>& args, bool interleaved, int64_t tokens, Start&& start) {
  constexpr int kWide = kAccessBytes / sizeof(T);
  const int vec = rotary_width(args), all = rotary_units(args, vec) * (args.query.heads + args.key.heads);
  const dim3 grid(unsigned(tokens), unsigned((all + kRotaryThreads - 1) / kRotaryThreads));
  if (interleaved) {
    vec == 1 ? start(rotary_kernel<T, Table, 1, true>, grid) : start(rotary_kernel<T, Table, kWide, true>, grid);
  } else {
    vec == 1 ? start(rotary_kernel<T, Table, 1, false>, grid) : start(rotary_kernel<T, Table, kWide, false>, grid);
  }
}

}  // namespace ras::cuda
