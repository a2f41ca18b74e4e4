// Launch plan of the norm kernels (norm.cuh): plain host code, so that it is tested without a GPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ras::cuda {

// What a kernel is compiled for. The fewer cases it knows, the fewer registers it needs and the shorter its code is, of which
// a launch that finds it in no cache waits for every line.
enum class NormForm : int {
  unaligned,  // rows may begin anywhere; operands of any type
  aligned,    // whole 16-byte accesses everywhere
  plain,      // and every operand has x's type, there are no probes, and x has no factor
};

enum class Norm : int {
  rms,
  layer,
  sandwich,  // RMS norm of x, the sum, RMS norm of the sum
};

struct NormPlan {
  int elements;        // of the row in each thread's registers: 8, 16 or 32
  int threads;         // per row: one warp or one block
  int rows_per_block;  // above 1 only when a row is one warp
  NormForm form;
  bool resident;       // the row fits into its threads' registers
};

constexpr int kRowsPerBlock = 4;

// The longest block of a kernel. Shorter ones leave each thread more registers.
constexpr int norm_max_threads(int elements, NormForm form, Norm norm) {
  if (form != NormForm::plain && elements == 16 && norm == Norm::sandwich) return 512;
  return form != NormForm::plain || elements == 8 ? 1024 : elements == 16 ? 256 : 512;
}

// Of a row that is longer than its block's registers.
constexpr int norm_long_threads(Norm norm) { return norm == Norm::sandwich ? 512 : 1024; }

// Blocks per multiprocessor that the registers must allow for, so that some blocks' loads run while others reduce: as many as
// there can be without spills, of which the code for other chips than Hopper has some a little earlier. 6 blocks of 256 threads
// leave 40 registers to a thread, 5 leave 48, 4 leave 64; 2 blocks of 512 leave 64.
constexpr int norm_min_blocks(int elements, NormForm form, DType type, Norm norm, bool steered) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  constexpr int kMore = 1;
#else
  constexpr int kMore = 0;
#endif
  if (form != NormForm::plain || elements == 8) return 1;
  if (norm == Norm::sandwich) return elements == 32 ? 1 : type == DType::f32 ? 3 : 4;
  const bool layer_norm = norm == Norm::layer, wide = type == DType::f32 && (layer_norm || steered);
  if (elements == 32) return wide || (type == DType::f16 && steered) ? 1 : 1 + kMore;
  if (wide || layer_norm) return 4;
  return (steered ? 4 : 5) + kMore;
}

// Few rows: spread each over many threads, latency is all. Many rows: more elements a thread rather than more than 256 threads,
// since the more warps a reduction waits for, the longer it waits.
inline NormPlan plan_norm(int64_t rows, int64_t d, int element_bytes, NormForm form, Norm norm, int multiprocessors) {
  // An unaligned row may begin anywhere in 16 bytes.
  const int64_t span = form == NormForm::unaligned ? d + 16 / element_bytes - 1 : d;
  const auto threads_for = [&](int elements) { return ((span + elements - 1) / elements + 31) / 32 * 32; };
  const bool few = rows <= 2 * int64_t(multiprocessors);
  // Few long rows: 16 elements on up to 1024 threads, which most aligned kernels have, were faster than 32 on fewer.
  if (few && form == NormForm::plain && threads_for(8) > 1024 && norm != Norm::sandwich) form = NormForm::aligned;
  const auto most = [&](int elements) { return norm_max_threads(elements, form, norm); };

  int elements = 8;
  if (form != NormForm::unaligned && threads_for(8) > (few ? most(8) : 256)) elements = 16;
  if (form == NormForm::plain && threads_for(elements) > most(elements)) elements = 32;
  if (threads_for(elements) > most(elements)) return {8, norm_long_threads(norm), 1, form, false};
  const int threads = static_cast<int>(threads_for(elements));
  return {elements, threads, threads == 32 && !few ? kRowsPerBlock : 1, form, true};
}

}  // namespace ras::cuda
