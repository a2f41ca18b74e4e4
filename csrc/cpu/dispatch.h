// Picks the widest build of a kernel that this processor can run.
#pragma once

#include <cstdlib>
#include <cstring>

// Declares `signature` once for every ISA that build.py compiles, and `pick_<name>` that returns the one to call.
#if RAS_FAST_X86
#define RAS_FAST_DECLARE(name, ...)                                                   \
  namespace avx512 {                                                                  \
  void name(__VA_ARGS__);                                                             \
  }                                                                                   \
  namespace avx2 {                                                                    \
  void name(__VA_ARGS__);                                                             \
  }                                                                                   \
  namespace portable {                                                                \
  void name(__VA_ARGS__);                                                             \
  }                                                                                   \
  inline auto* pick_##name() {                                                        \
    static auto* const kernel = isa() == Isa::avx512 ? avx512::name                   \
                                : isa() == Isa::avx2 ? avx2::name                     \
                                                     : portable::name;                \
    return kernel;                                                                    \
  }
#else
#define RAS_FAST_DECLARE(name, ...) \
  namespace portable {              \
  void name(__VA_ARGS__);           \
  }                                 \
  inline auto* pick_##name() { return portable::name; }
#endif

namespace ras::cpu {

enum class Isa { portable, avx2, avx512 };

// RAS_FAST_CPU_ISA=avx2|portable lowers the choice, so that tests reach every build on one machine.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* limit = std::getenv("RAS_FAST_CPU_ISA");
    const auto allowed = [limit](const char* name) { return !limit || !std::strcmp(limit, name); };
#if RAS_FAST_X86
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if ((!limit || std::strcmp(limit, "portable")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return Isa::avx2;
#endif
    (void)allowed;
    return Isa::portable;
  }();
  return chosen;
}

}  // namespace ras::cpu
