// Launch plan of the norm kernels (norm.cuh): plain host code, so that it is tested without a GPU.
#pragma once

#include <cstdint>

namespace ras::cuda {

struct NormPlan {
  int elements;        // of the row in each thread's registers: 8, 16 or 32
  int threads;         // per row: one warp or one block
  int rows_per_block;  // above 1 only when a row is one warp
  bool aligned;        // whole 16-byte accesses everywhere
  bool resident;       // the row fits into its threads' registers
};

constexpr int kRowsPerBlock = 4;

// 32 elements are for rows of one warp: a block of 1024 threads has no registers for them.
constexpr int norm_max_threads(int elements) { return elements == 32 ? kRowsPerBlock * 32 : 1024; }

// Few rows: spread each over many threads, latency is all. Many rows: fewer threads with more loads in flight each, and
// several blocks per multiprocessor so that one block's loads cover another's reduction.
inline NormPlan plan_norm(int64_t rows, int64_t d, int element_bytes, bool aligned, int multiprocessors) {
  const int64_t span = aligned ? d : d + 16 / element_bytes - 1;  // an unaligned row may begin anywhere in 16 bytes
  const auto threads_for = [&](int elements) { return ((span + elements - 1) / elements + 31) / 32 * 32; };
  const bool few = rows <= 2 * int64_t(multiprocessors);

  int elements = 8;
  if (aligned && span <= 32 * 32) {
    while (threads_for(elements) > 32) elements *= 2;
  } else if (aligned && (!few || threads_for(8) > norm_max_threads(8))) {
    elements = 16;
  }
  if (threads_for(elements) > norm_max_threads(elements)) return {8, 1024, 1, aligned, false};
  const int threads = static_cast<int>(threads_for(elements));
  return {elements, threads, threads == 32 && !few ? kRowsPerBlock : 1, aligned, true};
}

}  // namespace ras::cuda
