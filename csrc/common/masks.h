// The keywords by which the attention ops turn products of queries and keys into scores, as the launchers hand them on.
#pragma once

#include "common/tensor.h"

namespace ras {

struct Masks {
  double scale;
  bool causal;
  const MaybeTensor &start, &end;
  int64_t window;
  double softcap;

  // Whether bounds are [B, Lq], each row's own, and not [B].
  bool per_row() const {
    const auto own = [](const MaybeTensor& bounds) { return bounds && bounds->dim() == 2; };
    return own(start) || own(end);
  }
};

}  // namespace ras
