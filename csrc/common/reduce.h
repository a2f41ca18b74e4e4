// What key_attention makes of a key's probabilities over the query rows.
#pragma once

#include <string>

namespace ras {

enum class Reduce : int { mean, sum, max };

inline Reduce reduce_of(const std::string& name) {
  return name == "mean" ? Reduce::mean : name == "sum" ? Reduce::sum : Reduce::max;
}

}  // namespace ras
