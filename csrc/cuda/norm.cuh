// Residual add, steering and normalisation of a row in one pass over memory.
//
//   h = x + residual                       rounded to x's type where Hugging Face's eager code rounds it ("hf")
//   h = h + alpha * v                      steering "add", for rows whose slot names a steering vector v
//   y = rms_norm(h) * (weight + offset)    or layer_norm(h) * weight + bias
//   y = (1 - alpha) * y + alpha * v        steering "lerp"
//
// One row belongs to one warp, or to one block. Its threads keep the row in registers between the statistics and the
// output, so memory sees each input once and each output once; rows too long for that are read again (add_norm_long).
// norm_plan.h picks the shape of the launch. Framework-free: norm.cu is the launcher.
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

template <typename T>
struct NormArgs {
  Rows<T> x, residual;        // residual.data may be null
  T* y;                       // [tokens, d], tokens = grid z * grid y * rows
  T* h;                       // [tokens, d]; null: h equals x and is not written
  float* probe_dots;          // [tokens, num_probes + 1]: h . probe, and last ||h||^2; may be null
  Operand weight, bias;       // bias.data may be null
  Operand steer_vectors;      // [num_slots, d]
  Operand probes;             // [num_probes, d]
  const int32_t* steer_slot;  // [tokens]: -1 none; outside -1 .. num_slots - 1 the row becomes NaN
  const float* steer_alpha;   // [tokens]
  int64_t slot_stride, alpha_stride;
  int num_slots, num_probes;
  int rows;                   // in the innermost of the three dimensions
  int d;
  float eps, weight_offset;
  bool hf_rounding;
  bool lerp;
};

// ------------------------------------------------------------------------------------------------- a thread's slice

// The elements of a row that one thread holds: kPacks runs of kVec neighbours, the threads' runs side by side.
template <typename T, int kElements, bool kAligned>
struct Slice {
  static constexpr int kVec = kAccessBytes / sizeof(T);
  static constexpr int kPacks = kElements / kVec;

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
  __device__ bool whole(int e) const { return kAligned || (e >= 0 && e + kVec <= d); }
  __device__ bool inside(int e) const { return kAligned || (e >= 0 && e < d); }
  __device__ static bool on_boundary(const void* p) {
    return kAligned || reinterpret_cast<uintptr_t>(p) % kAccessBytes == 0;
  }

  // Run `pack` of a row; what lies outside the row reads as zero.
  __device__ Pack<T, kVec> load(const T* row, int pack) const {
    const int e = start(pack);
    Pack<T, kVec> out;
#pragma unroll
    for (int i = 0; i < kVec; ++i) out.value[i] = from_float<T>(0.f);
    if (!touches(e)) return out;
    if (whole(e) && on_boundary(row + e)) return load_streaming<T, kVec>(row + e);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (inside(e + i)) out.value[i] = row[e + i];
    }
    return out;
  }

  __device__ void store(T* row, int pack, const float* value) const {
    const int e = start(pack);
    if (!touches(e)) return;
    Pack<T, kVec> out;
#pragma unroll
    for (int i = 0; i < kVec; ++i) out.value[i] = from_float<T>(value[i]);
    if (whole(e) && on_boundary(row + e)) {
      *reinterpret_cast<uint4*>(row + e) = *reinterpret_cast<const uint4*>(&out);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (inside(e + i)) row[e + i] = out.value[i];
    }
  }

  template <typename S>
  __device__ void load_as(const S* row, int e, float* out) const {
    using Source = Pack<S, kVec>;
    if (kAligned || (whole(e) && reinterpret_cast<uintptr_t>(row + e) % alignof(Source) == 0)) {
      const auto pack = *reinterpret_cast<const Source*>(row + e);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = to_float(pack.value[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = inside(e + i) ? to_float(row[e + i]) : 0.f;
    }
  }

  // Run `pack` of row `r` of an operand, as float.
  __device__ void load(const Operand& from, int r, int pack, float* out) const {
    const int e = start(pack);
    if (!touches(e)) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = 0.f;
      return;
    }
    const int64_t offset = r * from.stride;
    if (from.dtype == DType::kFloat32) {
      load_as(static_cast<const float*>(from.data) + offset, e, out);
    } else if (from.dtype == DType::kBFloat16) {
      load_as(static_cast<const __nv_bfloat16*>(from.data) + offset, e, out);
    } else {
      load_as(static_cast<const __half*>(from.data) + offset, e, out);
    }
  }

  __device__ void prefetch(const Operand& from) const {
    if (from.data == nullptr) return;
    const int bytes = from.dtype == DType::kFloat32 ? 4 : 2;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int e = start(pack);
      if (e >= 0 && e < d) prefetch_l2(static_cast<const char*>(from.data) + int64_t(e) * bytes);
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

// h of one slice. Multiplications followed by additions are written as fmaf throughout, so that the compiler has no
// choice and the steered and unsteered kernels give the same bits for an unsteered row.
template <bool kSteered, typename T, int kElements, bool kAligned>
__device__ void load_h(const NormArgs<T>& a, const Slice<T, kElements, kAligned>& slice, const T* x, const T* residual,
                       const Steering& steering, float (&h)[kElements]) {
  constexpr int kVec = Slice<T, kElements, kAligned>::kVec;
  constexpr int kPacks = Slice<T, kElements, kAligned>::kPacks;
  Pack<T, kVec> raw[kPacks], other[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) raw[p] = slice.load(x, p);
  if (residual != nullptr) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) other[p] = slice.load(residual, p);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      h[i] = to_float(raw[i / kVec].value[i % kVec]) + to_float(other[i / kVec].value[i % kVec]);
      if (a.hf_rounding) h[i] = round_to<T>(h[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) h[i] = to_float(raw[i / kVec].value[i % kVec]);
  }
  if constexpr (kSteered) {
    if (steering.invalid()) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) h[i] = slice.inside(slice.start(i / kVec) + i % kVec) ? nanf("") : 0.f;
    } else if (!a.lerp && steering.active()) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float v[kVec];
        slice.load(a.steer_vectors, steering.slot, p, v);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          float& value = h[p * kVec + i];
          value = fmaf(steering.alpha, v[i], value);
          if (a.hf_rounding) value = round_to<T>(value);
        }
      }
    }
  }
}

// Sum of (h - center)^2 over what the slice holds of the row.
template <typename T, int kElements, bool kAligned>
__device__ float squares(const Slice<T, kElements, kAligned>& slice, const float (&h)[kElements], float center) {
  constexpr int kVec = Slice<T, kElements, kAligned>::kVec;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int e = slice.start(i / kVec);
    const float c = slice.touches(e) && slice.inside(e + i % kVec) ? h[i] - center : 0.f;
    sum = fmaf(c, c, sum);
  }
  return sum;
}

template <int kElements>
__device__ float total(const float (&h)[kElements]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum += h[i];
  return sum;
}

template <typename T, int kElements, bool kAligned>
__device__ float dot(const Slice<T, kElements, kAligned>& slice, const float (&h)[kElements], const Operand& probes,
                     int probe) {
  constexpr int kVec = Slice<T, kElements, kAligned>::kVec;
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < kElements / kVec; ++p) {
    float w[kVec];
    slice.load(probes, probe, p, w);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum = fmaf(h[p * kVec + i], w[i], sum);
  }
  return sum;
}

// Scale and shift of one run: what normalised values are multiplied by, and what is added.
template <bool kLayerNorm, typename T, int kElements, bool kAligned>
__device__ void load_affine(const NormArgs<T>& a, const Slice<T, kElements, kAligned>& slice, int pack, float* scale,
                            float* shift) {
  constexpr int kVec = Slice<T, kElements, kAligned>::kVec;
  slice.load(a.weight, 0, pack, scale);
  if constexpr (kLayerNorm) {
    if (a.bias.data != nullptr) {
      slice.load(a.bias, 0, pack, shift);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) shift[i] = 0.f;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) scale[i] += a.weight_offset;
  }
}

// y of one run, stored. RMS norm rounds the normalised value before the weight where Llama's eager code does: not with
// an offset (Gemma multiplies in fp32).
template <bool kLayerNorm, bool kSteered, typename T, int kElements, bool kAligned>
__device__ void store_y(const NormArgs<T>& a, const Slice<T, kElements, kAligned>& slice, int pack, const float* h,
                        float mean, float inv_std, const float* scale, const float* shift, const Steering& steering,
                        T* y) {
  constexpr int kVec = Slice<T, kElements, kAligned>::kVec;
  const bool round_normalised = a.hf_rounding && a.weight_offset == 0.f;
  float out[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if constexpr (kLayerNorm) {
      out[i] = fmaf((h[i] - mean) * inv_std, scale[i], shift[i]);
    } else {
      float n = h[i] * inv_std;
      if (round_normalised) n = round_to<T>(n);
      out[i] = n * scale[i];
    }
  }
  if constexpr (kSteered) {
    if (a.lerp && steering.active()) {
      float v[kVec];
      slice.load(a.steer_vectors, steering.slot, pack, v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float plain = a.hf_rounding ? round_to<T>(out[i]) : out[i];
        out[i] = fmaf(steering.alpha, v[i], (1.f - steering.alpha) * plain);
      }
    }
  }
  slice.store(y, pack, out);
}

// ---------------------------------------------------------------------------------------------------- the kernels

template <typename T>
__device__ int64_t token(const NormArgs<T>& a, int r) {
  return (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * a.rows + r;
}

// grid (ceil(rows / blockDim.y), y, z), block (threads of a row, rows of a block).
template <typename T, bool kLayerNorm, bool kSteered, int kElements, bool kAligned>
__global__ void __launch_bounds__(norm_max_threads(kElements)) add_norm(const __grid_constant__ NormArgs<T> a) {
  using S = Slice<T, kElements, kAligned>;
  constexpr bool kEarly = kElements <= 8;  // registers to spare: fetch weights before the reduction, not after
  __shared__ float scratch[2][kWarp];
  RowSum row_sum{scratch};

  const int r = blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t t = token(a, r);
  const T* x = a.x.row(r);
  const S slice(x, a.d);
  slice.prefetch(a.weight);
  if (kLayerNorm) slice.prefetch(a.bias);
  wait_for_previous_kernel();
  if (r >= a.rows) return;

  Steering steering{Steering::kNone, 0.f};
  if constexpr (kSteered) steering = read_steering(a, t);
  float scale[kEarly ? kElements : S::kVec], shift[kEarly ? kElements : S::kVec];
  if constexpr (kEarly) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) {
      load_affine<kLayerNorm>(a, slice, p, scale + p * S::kVec, shift + p * S::kVec);
    }
  }
  float h[kElements];
  load_h<kSteered>(a, slice, x, a.residual.data ? a.residual.row(r) : nullptr, steering, h);
  allow_next_kernel();
  if (a.h != nullptr) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) slice.store(a.h + t * a.d, p, h + p * S::kVec);
  }

  const float mean = kLayerNorm ? row_sum(total(h)) / a.d : 0.f;
  const float square_sum = row_sum(squares(slice, h, mean));
  const float inv_std = rsqrtf(square_sum / a.d + a.eps);
#pragma unroll
  for (int p = 0; p < S::kPacks; ++p) {
    const int at = kEarly ? p * S::kVec : 0;
    if constexpr (!kEarly) load_affine<kLayerNorm>(a, slice, p, scale, shift);
    store_y<kLayerNorm, kSteered>(a, slice, p, h + p * S::kVec, mean, inv_std, scale + at, shift + at, steering,
                                  a.y + t * a.d);
  }

  if (a.probe_dots == nullptr) return;
  float* dots = a.probe_dots + t * (a.num_probes + 1);
  for (int probe = 0; probe < a.num_probes; ++probe) {
    const float sum = row_sum(dot(slice, h, a.probes, probe));
    if (threadIdx.x == 0) dots[probe] = sum;
  }
  if (threadIdx.x == 0) dots[a.num_probes] = fmaf(a.d * mean, mean, square_sum);  // sum of h^2 from that of (h - mean)^2
}

// A row longer than its block's registers: tile by tile, h computed again from the inputs (by then in L2) in each pass.
// grid (rows, y, z), block (1024).
template <typename T, bool kLayerNorm, bool kSteered>
__global__ void __launch_bounds__(1024) add_norm_long(const __grid_constant__ NormArgs<T> a) {
  constexpr int kElements = 8;
  using S = Slice<T, kElements, false>;
  __shared__ float scratch[2][kWarp];
  RowSum row_sum{scratch};

  const int r = blockIdx.x;
  const int64_t t = token(a, r);
  const T* x = a.x.row(r);
  const T* residual = a.residual.data ? a.residual.row(r) : nullptr;
  wait_for_previous_kernel();
  allow_next_kernel();

  Steering steering{Steering::kNone, 0.f};
  if constexpr (kSteered) steering = read_steering(a, t);
  const int tile_elements = kElements * blockDim.x;
  const int tiles = (a.d + S::kVec - 1 + tile_elements - 1) / tile_elements;
  float h[kElements];
  // The sum over the row of what `part` makes of each tile, whose h it finds in `h`.
  const auto over_tiles = [&](auto part) {
    float sum = 0.f;
    for (int tile = 0; tile < tiles; ++tile) {
      const S slice(x, a.d, tile);
      load_h<kSteered>(a, slice, x, residual, steering, h);
      sum += part(slice);
    }
    return sum;
  };

  const float mean = kLayerNorm ? row_sum(over_tiles([&](const S&) { return total(h); })) / a.d : 0.f;
  const float square_sum = row_sum(over_tiles([&](const S& slice) { return squares(slice, h, mean); }));
  const float inv_std = rsqrtf(square_sum / a.d + a.eps);
  over_tiles([&](const S& slice) {
#pragma unroll
    for (int p = 0; p < S::kPacks; ++p) {
      float scale[S::kVec], shift[S::kVec];
      load_affine<kLayerNorm>(a, slice, p, scale, shift);
      if (a.h != nullptr) slice.store(a.h + t * a.d, p, h + p * S::kVec);
      store_y<kLayerNorm, kSteered>(a, slice, p, h + p * S::kVec, mean, inv_std, scale, shift, steering,
                                    a.y + t * a.d);
    }
    return 0.f;
  });

  if (a.probe_dots == nullptr) return;
  float* dots = a.probe_dots + t * (a.num_probes + 1);
  for (int probe = 0; probe < a.num_probes; ++probe) {
    const float sum = row_sum(over_tiles([&](const S& slice) { return dot(slice, h, a.probes, probe); }));
    if (threadIdx.x == 0) dots[probe] = sum;
  }
  if (threadIdx.x == 0) dots[a.num_probes] = fmaf(a.d * mean, mean, square_sum);
}

// ------------------------------------------------------------------------------------------- choosing a kernel (host)

inline bool fits_accesses(const void* data, int64_t bytes_between_rows) {
  return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0 && bytes_between_rows % kAccessBytes == 0;
}

inline bool is_aligned(const Operand& operand) {
  return fits_accesses(operand.data, operand.stride * (operand.dtype == DType::kFloat32 ? 4 : 2));
}

// Whether every row of every tensor can be moved in whole 16-byte accesses.
template <typename T>
bool is_aligned(const NormArgs<T>& a) {
  const int64_t size = sizeof(T);
  const auto rows = [&](const Rows<T>& r) {
    return fits_accesses(r.data, r.stride * size) && fits_accesses(r.data, r.stride_y * size) &&
           fits_accesses(r.data, r.stride_z * size);
  };
  return rows(a.x) && rows(a.residual) && fits_accesses(a.y, a.d * size) && fits_accesses(a.h, a.d * size) &&
         is_aligned(a.weight) && is_aligned(a.bias) && is_aligned(a.steer_vectors) && is_aligned(a.probes);
}

// Calls `use` with the kernel that a plan asks for.
template <typename T, bool kLayerNorm, bool kSteered, typename Use>
void with_norm_kernel(const NormPlan& plan, Use use) {
  if (!plan.resident) return use(add_norm_long<T, kLayerNorm, kSteered>);
  if (!plan.aligned) return use(add_norm<T, kLayerNorm, kSteered, 8, false>);
  if (plan.elements == 8) return use(add_norm<T, kLayerNorm, kSteered, 8, true>);
  if (plan.elements == 16) return use(add_norm<T, kLayerNorm, kSteered, 16, true>);
  return use(add_norm<T, kLayerNorm, kSteered, 32, true>);
}

}  // namespace ras::cuda
