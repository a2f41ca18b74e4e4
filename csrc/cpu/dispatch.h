// Picks the widest build of a kernel that this processor can run.
#pragma once

#include <cstdlib>
#include <cstring>

// Declares `signature` once for every ISA that build.py compiles, and `pick_<name>` that returns the one to call; with _PAIRS for
// kernels that multiply bf16 by itself where a processor does that well, and so have one build more.
#if RAS_FAST_X86
#define RAS_FAST_DECLARE_IN(isa, name, ...) \
  namespace isa {                           \
  void name(__VA_ARGS__);                   \
  }
#define RAS_FAST_DECLARE_WITH(widest, name, ...)                                          \
  RAS_FAST_DECLARE_IN(avx512, name, __VA_ARGS__)                                          \
  RAS_FAST_DECLARE_IN(avx2, name, __VA_ARGS__)                                            \
  RAS_FAST_DECLARE_IN(portable, name, __VA_ARGS__)                                        \
  inline auto* pick_##name() {                                                            \
    static auto* const kernel = isa() == Isa::avx512bf16 ? widest::name                   \
                                : isa() == Isa::avx512   ? avx512::name                   \
                                : isa() == Isa::avx2     ? avx2::name                     \
                                                         : portable::name;                \
    return kernel;                                                                        \
  }
#define RAS_FAST_DECLARE(name, ...) RAS_FAST_DECLARE_WITH(avx512, name, __VA_ARGS__)
#define RAS_FAST_DECLARE_PAIRS(name, ...)            \
  RAS_FAST_DECLARE_IN(avx512bf16, name, __VA_ARGS__) \
  RAS_FAST_DECLARE_WITH(avx512bf16, name, __VA_ARGS__)
#else
#define RAS_FAST_DECLARE(name, ...) \
  namespace portable {              \
  void name(__VA_ARGS__);           \
  }                                 \
  inline auto* pick_##name() { return portable::name; }
#define RAS_FAST_DECLARE_PAIRS RAS_FAST_DECLARE
#endif

namespace ras::cpu {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// RAS_FAST_CPU_ISA=avx512|avx2|portable lowers the choice, so that tests reach every build on one machine.
inline Isa isa() {
  static const Isa chosen = [] {
#if RAS_FAST_X86
    const char* limit = std::getenv("RAS_FAST_CPU_ISA");
    const auto is = [limit](const char* name) { return limit && !std::strcmp(limit, name); };
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    // AMD's processors make twice as many operations with bf16 as with float, Intel's half as many: there it has to be asked for.
    if (avx512 && __builtin_cpu_supports("avx512bf16") && (is("avx512bf16") || (!limit && __builtin_cpu_is("amd"))))
      return Isa::avx512bf16;
    if (avx512 && (!limit || is("avx512bf16") || is("avx512"))) return Isa::avx512;
    if (!is("portable") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return chosen;
}

}  // namespace ras::cpu
