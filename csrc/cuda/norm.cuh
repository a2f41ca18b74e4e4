// Residual add, steering and normalisation of a row in one pass over memory.
//
//   x = rms_norm(x) * (x_weight + offset)  if x_weight is given (Norm::sandwich)
//   x = x * x_scale                        rounded, too; RMS norms alone
//   h = x + residual                       rounded to x's type where Hugging Face's eager code rounds it ("hf")
//   h = h * scale                          if scale is given, which goes with x_weight
//   h = h + alpha * v                      steering "add", for rows whose slot names a steering vector v
//   y = rms_norm(h) * (weight + offset)    or layer_norm(h) * weight + bias
//   y = (1 - alpha) * y + alpha * v        steering "lerp"
//
// One row belongs to one warp, or to one block. Its threads keep the row in registers between the statistics and the
// output, so memory sees each input once and each output once; rows too long for that are read again (add_norm_long).
// norm_plan.h picks the shape of the launch. Framework-free: norm.cu is the launcher.
//
// In place, y lies over x and h over residual: a thread writes only elements that it alone reads, and after its last read.
#pragma once

#include "common.cuh"
#include "norm_plan.h"

namespace ras::cuda {

// A read-only operand whose type is known at run time: weight, bias, steering vectors, probes.
struct Operand {
  const void* data;
  DType dtype;
  int64_t stride;  // elements between rows of a matrix
};

// Input rows in up to three dimensions: x [blockIdx.z, blockIdx.y, r, :], so that no division finds a row.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride_z, stride_y, stride;  // in elements
  __device__ const T* row(int r) const { return data + blockIdx.z * stride_z + blockIdx.y * stride_y + r * stride; }
};

// What every call reads comes first: a launch that finds its arguments in no cache waits for each 64 bytes of them.
template <typename T>
struct NormArgs {
  Rows<T> x, residual;        // residual.data may be null
  T* y;                       // [tokens, d], tokens = grid z * grid y * rows
  T* h;                       // [tokens, d]; null: h equals x and is not written
  Operand weight;
  int rows;                   // in the innermost of the three dimensions
  int d;
  float inv_d;                // 1 / d
  float eps, weight_offset;
  bool hf_rounding;
  bool lerp;
  Operand bias;               // bias.data may be null
  float* probe_dots;          // [tokens, num_probes + 1]: h . probe, and last ||h||^2; may be null
  Operand steer_vectors;      // [num_slots, d]
  const int32_t* steer_slot;  // [tokens]: -1 none; outside -1 .. num_slots - 1 the row becomes NaN; may be null
  const float* steer_alpha;   // [tokens]
  int64_t slot_stride, alpha_stride;
  Operand probes;             // [num_probes, d]
  int num_slots, num_probes;
  Operand x_weight, scale;    // [d], [1]; their data may be null
  float x_scale;
};

// ------------------------------------------------------------------------------------------------- a thread's slice

// The elements of a row that one thread holds: kPacks runs of kVec neighbours (16 bytes of T), the threads' runs side by
// side. Loads return raw bits, which the caller converts only after it has issued every load it can: a conversion waits for
// its load, and would delay all loads that are issued after it.
template <typename T, int kElements, NormForm kForm>
struct Slice {
  static constexpr int kVec = kAccessBytes / sizeof(T);
  static constexpr int kPacks = kElements / kVec;
  static constexpr bool kPlain = kForm == NormForm::plain, kAligned = kForm != NormForm::unaligned;
  // Operands of x's type are loaded early: with the row if there are registers to spare, else when the row's own loads have
  // given theirs back, so that the statistics cover the wait. All other operands are loaded when they are needed, from L2 or
  // L1: there, other warps of the multiprocessor cover the wait.
  static constexpr bool kWithRow = kAligned && kElements <= 8;
  static constexpr bool kEarly = kWithRow || (kPlain && kElements <= 16 && sizeof(T) == 2);

  int first;  // of the first run; negative where an unaligned row begins inside a 16-byte word
  int step;   // from one run of this thread to its next
  int d;

  // `like`: the row whose alignment the runs follow. `tile`: which stretch of a long row.
  __device__ Slice(const T* like, int d, int tile = 0) : step(blockDim.x * kVec), d(d) {
    const int skew = kAligned ? 0 : reinterpret_cast<uintptr_t>(like) % kAccessBytes / sizeof(T);
    first = (tile * kPacks * int(blockDim.x) + int(threadIdx.x)) * kVec - skew;
  }

  __device__ int start(int pack) const { return first + pack * step; }
  __device__ bool touches(int e) const { return kAligned ? e < d : e < d && e + kVec > 0; }
  __device__ bool inside(int e) const { return kAligned || (e >= 0 && e < d); }
  // Whether a run is one access. For aligned kernels a constant: what touches the row lies in it.
  __device__ bool whole(const T* row, int e) const {
    return kAligned || (e >= 0 && e + kVec <= d && reinterpret_cast<uintptr_t>(row + e) % kAccessBytes == 0);
  }

  // Run `p` of a row that will not be read again soon; zero outside the row, or if not `wanted`.
  __device__ uint4 load(const T* row, int p, bool wanted = true) const {
    const int e = start(p);
    uint4 bits{0, 0, 0, 0};
    if (wanted && touches(e)) {
      if (whole(row, e)) {
        bits = *reinterpret_cast<const uint4*>(row + e);
      } else {
        auto* value = reinterpret_cast<T*>(&bits);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (inside(e + i)) value[i] = row[e + i];
        }
      }
    }
    return bits;
  }

  __device__ void store(T* row, int p, const float* value) const {
    const int e = start(p);
    if (!touches(e)) return;
    const uint4 bits = pack<T>(value);
    if (whole(row, e)) {
      *reinterpret_cast<uint4*>(row + e) = bits;
    } else {
      const auto* rounded = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (inside(e + i)) row[e + i] = rounded[i];
      }
    }
  }

  __device__ static bool early(const Operand& from) { return kEarly && (kPlain || from.dtype == kTypeOf<T>); }

  // Run `p` of row `r` of an operand that can be loaded early; else, outside the row, or if not `wanted`: zero.
  __device__ uint4 load_early(const Operand& from, int r, int p, bool wanted = true) const {
    const int e = start(p);
    if (!wanted || !early(from) || !touches(e)) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(from.data) + (r * from.stride + e));
  }

  // The same run as floats: `bits`, if it was loaded early.
  __device__ void load(const Operand& from, int r, int p, const uint4& bits, float* out) const {
    if (early(from)) return unpack<T>(bits, out);
    const int e = start(p);
    const int64_t at = r * from.stride + e;
    switch (kPlain ? kTypeOf<T> : from.dtype) {
      case DType::f32: return load_run(static_cast<const float*>(from.data) + at, e, out);
      case DType::f16: return load_run(static_cast<const __half*>(from.data) + at, e, out);
      case DType::bf16: return load_run(static_cast<const __nv_bfloat16*>(from.data) + at, e, out);
    }
  }

  template <typename U>
  __device__ void load_run(const U* from, int e, float* out) const {
    Pack<U, kVec> run{};
    if (kAligned && touches(e)) run = *reinterpret_cast<const Pack<U, kVec>*>(from);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (!kAligned && inside(e + i)) run.value[i] = from[i];
      out[i] = to_float(run.value[i]);
    }
  }

  // Brings a row of an operand into L2.
  __device__ void prefetch(const Operand& from, int r = 0) const {
    const int bytes = from.dtype == DType::f32 ? 4 : 2;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int e = start(p);
      if (e >= 0 && e < d) prefetch_l2(static_cast<const char*>(from.data) + (r * from.stride + e) * bytes);
    }
  }
};

// Sums over the threads of a row, all of which get the result. A sum uses the half of the scratch that the sum before it
// did not, so one barrier each is enough: nobody overwrites what a slower thread still has to read.
struct RowSum {
  float (&scratch)[2][kWarp];
  int turn = 0;

  __device__ float operator()(float v) {
    v = warp_sum(v);
    if (blockDim.x == kWarp) return v;
    float* partial = scratch[turn];
    turn ^= 1;
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) partial[threadIdx.x / kWarp] = v;
    __syncthreads();
    return warp_sum(lane < int(blockDim.x) / kWarp ? partial[lane] : 0.f);
  }
};

// ------------------------------------------------------------------------------------------------------ the maths

__device__ inline float first_of(const Operand& from) {
  switch (from.dtype) {
    case DType::f16: return to_float(*static_cast<const __half*>(from.data));
    case DType::bf16: return to_float(*static_cast<const __nv_bfloat16*>(from.data));
    default: return *static_cast<const float*>(from.data);
  }
}

// What a row is steered by.
struct Steering {
  int slot;
  float alpha;
  __device__ bool active() const { return slot >= 0; }
  __device__ bool invalid() const { return slot == kInvalid; }
  static constexpr int kNone = -1, kInvalid = -2;
};

// A slot that names no vector cannot raise an error from here: its row becomes NaN. An alpha of NaN counts as steering.
template <typename T>
__device__ Steering read_steering(const NormArgs<T>& a, int64_t t) {
  const int slot = a.steer_slot[t * a.slot_stride];
  const float alpha = a.steer_alpha[t * a.alpha_stride];
  if (slot < -1 || slot >= a.num_slots) return {Steering::kInvalid, alpha};
  return {alpha == 0.f ? Steering::kNone : slot, alpha};
}

// RMS norm's last step. It rounds the normalised value before the weight where Llama's eager code does: not with an offset
// (Gemma multiplies in fp32).
template <typename T, int kCount>
__device__ void weigh(const NormArgs<T>& a, const float* weight, float* value) {
  if (a.hf_rounding && a.weight_offset == 0.f) round_all<T, kCount>(value);
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] *= weight[i] + a.weight_offset;
}

// By an instruction of its own: a product that is added the compiler would fuse into the sum.
template <typename T, int kCount>
__device__ void multiply(const NormArgs<T>& a, float factor, float (&value)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = __fmul_rn(value[i], factor);
  if (a.hf_rounding) round_all<T, kCount>(value);
}

// h of one slice. `x_inv_rms` makes of the slice's x, which it finds in h, what normalises x's row (Norm::sandwich).
// Multiplications followed by additions are written as fmaf, or the additions as __fadd_rn: otherwise the compiler may fuse
// them in one kernel and not in another, and the steered and unsteered kernels would give other bits for an unsteered row.
template <Norm kNorm, bool kSteered, typename T, int kElements, NormForm kForm, typename InverseRms>
__device__ void load_h(const NormArgs<T>& a, const Slice<T, kElements, kForm>& slice, const T* x, const T* residual,
                       const Steering& steering, InverseRms x_inv_rms, float (&h)[kElements]) {
  using S = Slice<T, kElements, kForm>;
  const bool add = kSteered && !a.lerp && steering.active();
  uint4 first[S::kPacks], second[S::kPacks], vector[S::kPacks], weight[S::kPacks];
#pragma unroll
  for (int p = 0; p < S::kPacks; ++p) first[p] = slice.load(x, p);
  // Registers that the residual would take while x is normalised, where few are left.
  constexpr bool kLate = kNorm == Norm::sandwich && (kForm == NormForm::unaligned || kElements * sizeof(T) > 64);
  if constexpr (!kLate) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) second[p] = slice.load(residual, p, residual != nullptr);
  }
  if constexpr (kNorm == Norm::sandwich) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) weight[p] = slice.load_early(a.x_weight, 0, p);
  }
  // The first use of the slot, and so the first wait for it, comes after the row's own loads are issued.
  if constexpr (kSteered) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) vector[p] = slice.load_early(a.steer_vectors, steering.slot, p, add);
  }

  constexpr bool kFactor = kNorm != Norm::layer && kForm != NormForm::plain;
  if constexpr (kNorm == Norm::sandwich || kFactor) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) unpack<T>(first[p], h + p * S::kVec);
  }
  if constexpr (kNorm == Norm::sandwich) {
    const float scale = x_inv_rms(h);
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) {
      float w[S::kVec], *own = h + p * S::kVec;
      slice.load(a.x_weight, 0, p, weight[p], w);
#pragma unroll
      for (int i = 0; i < S::kVec; ++i) own[i] *= scale;
      weigh<T, S::kVec>(a, w, own);
      if (a.hf_rounding) round_all<T, S::kVec>(own);
    }
  }
  if constexpr (kFactor) {
    if (a.x_scale != 1.f) multiply(a, a.x_scale, h);
  }
  if constexpr (kNorm == Norm::sandwich || kFactor) {
    if constexpr (kLate) __syncwarp();  // or the loads would be moved up, over the registers' number
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) {
      float added[S::kVec];
      unpack<T>(kLate ? slice.load(residual, p, residual != nullptr) : second[p], added);
#pragma unroll
      for (int i = 0; i < S::kVec; ++i) h[p * S::kVec + i] = __fadd_rn(h[p * S::kVec + i], added[i]);
    }
  } else {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) {
      const auto *left = reinterpret_cast<const Pair<T>*>(&first[p]), *right = reinterpret_cast<const Pair<T>*>(&second[p]);
#pragma unroll
      for (int i = 0; i < S::kVec / 2; ++i) {
        const float2 u = unpack_pair<T>(left[i]), v = unpack_pair<T>(right[i]);
        h[p * S::kVec + 2 * i] = u.x + v.x;
        h[p * S::kVec + 2 * i + 1] = u.y + v.y;
      }
    }
  }
  if (a.hf_rounding) round_all<T, kElements>(h);
  if constexpr (kNorm == Norm::sandwich) {
    if (a.scale.data != nullptr) multiply(a, first_of(a.scale), h);
  }
  if constexpr (kSteered) {
    if (add) {
#pragma unroll
      for (int p = 0; p < S::kPacks; ++p) {
        float v[S::kVec];
        slice.load(a.steer_vectors, steering.slot, p, vector[p], v);
#pragma unroll
        for (int i = 0; i < S::kVec; ++i) h[p * S::kVec + i] = fmaf(steering.alpha, v[i], h[p * S::kVec + i]);
        if (a.hf_rounding) round_all<T, S::kVec>(h + p * S::kVec);
      }
    }
    if (steering.invalid()) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) h[i] = nanf("");
    }
  }
}

// A sum that `term` adds to, over the elements i of the slice that lie in the row. A run outside of it is skipped as a whole.
template <typename T, int kElements, NormForm kForm, typename Term>
__device__ float sum_of(const Slice<T, kElements, kForm>& slice, Term term) {
  using S = Slice<T, kElements, kForm>;
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < S::kPacks; ++p) {
    const int e = slice.start(p);
    if (!slice.touches(e)) continue;
#pragma unroll
    for (int i = 0; i < S::kVec; ++i) {
      if (slice.inside(e + i)) sum = term(sum, p * S::kVec + i);
    }
  }
  return sum;
}

// Sum of (h - center)^2 over what the slice holds of the row.
template <typename T, int kElements, NormForm kForm>
__device__ float squares(const Slice<T, kElements, kForm>& slice, const float (&h)[kElements], float center) {
  return sum_of(slice, [&](float sum, int i) { return fmaf(h[i] - center, h[i] - center, sum); });
}

template <typename T, int kElements, NormForm kForm>
__device__ float total(const Slice<T, kElements, kForm>& slice, const float (&h)[kElements]) {
  return sum_of(slice, [&](float sum, int i) { return sum + h[i]; });
}

template <typename T, int kElements, NormForm kForm>
__device__ float dot(const Slice<T, kElements, kForm>& slice, const float (&h)[kElements], const Operand& probes,
                     int probe) {
  using S = Slice<T, kElements, kForm>;
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < S::kPacks; ++p) {
    const int e = slice.start(p);
    float w[S::kVec];
    slice.load(probes, probe, p, slice.load_early(probes, probe, p), w);
#pragma unroll
    for (int i = 0; i < S::kVec; ++i) {
      if (slice.touches(e) && slice.inside(e + i)) sum = fmaf(h[p * S::kVec + i], w[i], sum);
    }
  }
  return sum;
}

// What the normalised values of one run are multiplied by, and what is then added (layer norm), if loaded early.
struct Affine {
  uint4 scale, shift;
};

template <Norm kNorm, typename T, int kElements, NormForm kForm>
__device__ Affine load_affine(const NormArgs<T>& a, const Slice<T, kElements, kForm>& slice, int p) {
  return {slice.load_early(a.weight, 0, p), slice.load_early(a.bias, 0, p, kNorm == Norm::layer && a.bias.data != nullptr)};
}

// y of one run, stored.
template <Norm kNorm, bool kSteered, typename T, int kElements, NormForm kForm>
__device__ void store_y(const NormArgs<T>& a, const Slice<T, kElements, kForm>& slice, int p, const float* h, float mean,
                        float inv_std, const Affine& affine, const Steering& steering, T* y) {
  using S = Slice<T, kElements, kForm>;
  float scale[S::kVec], out[S::kVec];
  slice.load(a.weight, 0, p, affine.scale, scale);
#pragma unroll
  for (int i = 0; i < S::kVec; ++i) out[i] = (h[i] - mean) * inv_std;
  if constexpr (kNorm == Norm::layer) {
    float shift[S::kVec]{};
    if (a.bias.data != nullptr) slice.load(a.bias, 0, p, affine.shift, shift);
#pragma unroll
    for (int i = 0; i < S::kVec; ++i) out[i] = fmaf(out[i], scale[i], shift[i]);
  } else {
    weigh<T, S::kVec>(a, scale, out);
  }
  if constexpr (kSteered) {
    if (a.lerp && steering.active()) {
      float v[S::kVec];
      slice.load(a.steer_vectors, steering.slot, p, slice.load_early(a.steer_vectors, steering.slot, p), v);
      if (a.hf_rounding) round_all<T, S::kVec>(out);
#pragma unroll
      for (int i = 0; i < S::kVec; ++i) out[i] = fmaf(steering.alpha, v[i], (1.f - steering.alpha) * out[i]);
    }
  }
  slice.store(y, p, out);
}

// ---------------------------------------------------------------------------------------------------- the kernels

template <typename T>
__device__ int64_t token(const NormArgs<T>& a, int r) {
  return (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * a.rows + r;
}

// grid (ceil(rows / blockDim.y), y, z), block (threads of a row, rows of a block).
template <typename T, Norm kNorm, bool kSteered, int kElements, NormForm kForm>
__global__ void __launch_bounds__(norm_max_threads(kElements, kForm, kNorm),
                                  norm_min_blocks(kElements, kForm, kTypeOf<T>, kNorm, kSteered))
    add_norm(const __grid_constant__ NormArgs<T> a) {
  using S = Slice<T, kElements, kForm>;
  __shared__ float scratch[2][kWarp];
  RowSum row_sum{scratch};

  const int r = blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t t = token(a, r);
  const T* x = a.x.row(r);
  const S slice(x, a.d);
  // By one block for all: requests for the same few lines wait for each other in L2.
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) {
    slice.prefetch(a.weight);
    if (kNorm == Norm::layer && a.bias.data != nullptr) slice.prefetch(a.bias);
    if (kNorm == Norm::sandwich) slice.prefetch(a.x_weight);
  }
  allow_next_kernel();  // a product, as a rule, which asks for its weight ahead
  wait_for_previous_kernel();
  if (r >= a.rows) return;

  Steering steering{Steering::kNone, 0.f};
  if constexpr (kSteered) {
    if ((S::kPlain && kNorm != Norm::sandwich) || a.steer_slot != nullptr) steering = read_steering(a, t);
  }
  Affine affine[S::kPacks];
  const auto load_all_affine = [&] {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) affine[p] = load_affine<kNorm>(a, slice, p);
  };
  if constexpr (S::kWithRow) load_all_affine();
  float h[kElements];
  const auto x_inv_rms = [&](const float (&own)[kElements]) {
    return rsqrtf(row_sum(squares(slice, own, 0.f)) * a.inv_d + a.eps);
  };
  load_h<kNorm, kSteered>(a, slice, x, a.residual.data ? a.residual.row(r) : nullptr, steering, x_inv_rms, h);
  if constexpr (!S::kWithRow) load_all_affine();
  if (a.h != nullptr) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) slice.store(a.h + t * a.d, p, h + p * S::kVec);
  }

  const float mean = kNorm == Norm::layer ? row_sum(total(slice, h)) * a.inv_d : 0.f;
  const float square_sum = row_sum(squares(slice, h, mean));
  const float inv_std = rsqrtf(square_sum * a.inv_d + a.eps);
  if (!S::kPlain && a.probe_dots != nullptr) {  // before y, which takes h's registers
    float* dots = a.probe_dots + t * (a.num_probes + 1);
    for (int probe = 0; probe < a.num_probes; ++probe) {
      const float sum = row_sum(dot(slice, h, a.probes, probe));
      if (threadIdx.x == 0) dots[probe] = sum;
    }
    // The sum of h^2 from that of (h - mean)^2.
    if (threadIdx.x == 0) dots[a.num_probes] = fmaf(a.d * mean, mean, square_sum);
  }

#pragma unroll
  for (int p = 0; p < S::kPacks; ++p) {
    store_y<kNorm, kSteered>(a, slice, p, h + p * S::kVec, mean, inv_std, affine[p], steering, a.y + t * a.d);
  }
}

// A row longer than its block's registers: tile by tile, h computed again from the inputs (by then in L2) in each pass.
// grid (rows, y, z), block (norm_long_threads).
template <typename T, Norm kNorm>
__global__ void __launch_bounds__(norm_long_threads(kNorm), 1) add_norm_long(const __grid_constant__ NormArgs<T> a) {
  constexpr int kElements = 8;
  using S = Slice<T, kElements, NormForm::unaligned>;
  __shared__ float scratch[2][kWarp];
  RowSum row_sum{scratch};

  const int r = blockIdx.x;
  const int64_t t = token(a, r);
  const T* x = a.x.row(r);
  const T* residual = a.residual.data ? a.residual.row(r) : nullptr;
  wait_for_previous_kernel();
  allow_next_kernel();

  Steering steering{Steering::kNone, 0.f};
  if (a.steer_slot != nullptr) steering = read_steering(a, t);
  const int tile_elements = kElements * blockDim.x;
  const int tiles = (a.d + S::kVec - 1 + tile_elements - 1) / tile_elements;
  float h[kElements], x_inv_rms = 0.f;
  if constexpr (kNorm == Norm::sandwich) {
    float sum = 0.f;
    for (int tile = 0; tile < tiles; ++tile) {
      const S slice(x, a.d, tile);
#pragma unroll
      for (int p = 0; p < S::kPacks; ++p) unpack<T>(slice.load(x, p), h + p * S::kVec);
      sum += squares(slice, h, 0.f);
    }
    x_inv_rms = rsqrtf(row_sum(sum) * a.inv_d + a.eps);
  }
  // The sum over the row of what `part` makes of each tile, whose h it finds in `h`.
  const auto over_tiles = [&](auto part) {
    float sum = 0.f;
    for (int tile = 0; tile < tiles; ++tile) {
      const S slice(x, a.d, tile);
      load_h<kNorm, true>(a, slice, x, residual, steering, [&](const auto&) { return x_inv_rms; }, h);
      sum += part(slice);
    }
    return sum;
  };

  const float mean = kNorm == Norm::layer ? row_sum(over_tiles([&](const S& slice) { return total(slice, h); })) * a.inv_d : 0.f;
  const float square_sum = row_sum(over_tiles([&](const S& slice) { return squares(slice, h, mean); }));
  const float inv_std = rsqrtf(square_sum * a.inv_d + a.eps);
  if (a.probe_dots != nullptr) {  // before the stores, which in place take the inputs away
    float* dots = a.probe_dots + t * (a.num_probes + 1);
    for (int probe = 0; probe < a.num_probes; ++probe) {
      const float sum = row_sum(over_tiles([&](const S& slice) { return dot(slice, h, a.probes, probe); }));
      if (threadIdx.x == 0) dots[probe] = sum;
    }
    if (threadIdx.x == 0) dots[a.num_probes] = fmaf(a.d * mean, mean, square_sum);
  }

  over_tiles([&](const S& slice) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) {
      const Affine affine = load_affine<kNorm>(a, slice, p);
      if (a.h != nullptr) slice.store(a.h + t * a.d, p, h + p * S::kVec);
      store_y<kNorm, true>(a, slice, p, h + p * S::kVec, mean, inv_std, affine, steering, a.y + t * a.d);
    }
    return 0.f;
  });
}

// ------------------------------------------------------------------------------------------- choosing a kernel (host)

inline bool fits_accesses(const void* data, int64_t bytes_between_rows) {
  return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0 && bytes_between_rows % kAccessBytes == 0;
}

inline bool is_aligned(const Operand& operand) {
  return fits_accesses(operand.data, operand.stride * (operand.dtype == DType::f32 ? 4 : 2));
}

// Which kernels can take these tensors: aligned if every row of every one can be moved in whole 16-byte accesses.
template <typename T>
NormForm norm_form(const NormArgs<T>& a) {
  const int64_t size = sizeof(T);
  const auto rows = [&](const Rows<T>& r) {
    return fits_accesses(r.data, r.stride * size) && fits_accesses(r.data, r.stride_y * size) &&
           fits_accesses(r.data, r.stride_z * size);
  };
  if (!(rows(a.x) && rows(a.residual) && fits_accesses(a.y, a.d * size) && fits_accesses(a.h, a.d * size) &&
        is_aligned(a.weight) && is_aligned(a.bias) && is_aligned(a.x_weight) && is_aligned(a.steer_vectors) &&
        is_aligned(a.probes))) {
    return NormForm::unaligned;
  }
  const auto same_type = [](const Operand& operand) { return operand.data == nullptr || operand.dtype == kTypeOf<T>; };
  const bool plain = same_type(a.weight) && same_type(a.bias) && same_type(a.x_weight) && same_type(a.steer_vectors) &&
                     a.probe_dots == nullptr && a.x_scale == 1.f;
  return plain ? NormForm::plain : NormForm::aligned;
}

// Calls `use` with the kernel that a plan asks for. Those that know every other case know steering, too.
template <typename T, Norm kNorm, bool kSteered, typename Use>
void with_norm_kernel(const NormPlan& plan, Use use) {
  constexpr auto kPlain = NormForm::plain, kAligned = NormForm::aligned, kUnaligned = NormForm::unaligned;
  if (!plan.resident) return use(add_norm_long<T, kNorm>);
  if (plan.form == kUnaligned) return use(add_norm<T, kNorm, true, 8, kUnaligned>);
  if (plan.form == kAligned) {
    if (plan.elements == 8) return use(add_norm<T, kNorm, true, 8, kAligned>);
    return use(add_norm<T, kNorm, true, 16, kAligned>);
  }
  if (plan.elements == 8) return use(add_norm<T, kNorm, kSteered, 8, kPlain>);
  if (plan.elements == 16) return use(add_norm<T, kNorm, kSteered, 16, kPlain>);
  return use(add_norm<T, kNorm, kSteered, 32, kPlain>);
}

// The same, by what the call is. All kernels of sandwich norms know steering.
template <typename T, typename Use>
void with_norm_kernel(const NormArgs<T>& a, Norm norm, const NormPlan& plan, Use use) {
  const bool steered = a.steer_slot != nullptr;
  switch (norm) {
    case Norm::sandwich: return with_norm_kernel<T, Norm::sandwich, true>(plan, use);
    case Norm::layer:
      return steered ? with_norm_kernel<T, Norm::layer, true>(plan, use) : with_norm_kernel<T, Norm::layer, false>(plan, use);
    case Norm::rms:
      return steered ? with_norm_kernel<T, Norm::rms, true>(plan, use) : with_norm_kernel<T, Norm::rms, false>(plan, use);
  }
}

}  // namespace ras::cuda
