// Which keys a query row sees.
#pragma once

#include "cpu/attention_args.h"

namespace ras::cpu::RAS_FAST_ISA {  // as everything that a kernel inlines (vec.h)

// The valid keys [first, last) of a batch element, clamped to the memory there is.
struct ValidKeys {
  int64_t first, last;

  ValidKeys(const AttentionArgs& args, int64_t batch) {
    first = args.kv_start && args.kv_start[batch] > 0 ? args.kv_start[batch] : 0;
    last = args.kv_end && args.kv_end[batch] < args.length_k ? args.kv_end[batch] : args.length_k;
  }
};

// The keys [low, high] that query row `index` sees of them.
struct Span {
  int64_t low, high;

  Span(const AttentionArgs& args, const ValidKeys& valid, int64_t index) : low(valid.first), high(valid.last - 1) {
    const int64_t own = index + valid.last - args.length_q;
    if (args.causal && own < high) high = own;
    if (args.window && own - args.window + 1 > low) low = own - args.window + 1;
  }
};

}  // namespace ras::cpu::RAS_FAST_ISA
