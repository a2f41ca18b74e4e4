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
};

}  // namespace ras
