// ras_fast._C: facts about this build, for `ras-fast doctor`. Optional at run time: no op needs it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of ras_fast's native libraries.";
  m.def("build_facts", [] {
    py::dict facts;
    facts["compiler"] = __VERSION__;
    facts["nvcc"] = RAS_FAST_NVCC;
    facts["torch_stable_abi"] = py::make_tuple(int(RAS_FAST_STABLE_ABI >> 56), int((RAS_FAST_STABLE_ABI >> 48) & 0xff));
    return facts;
  }, "Compiler, nvcc path (\"\" when there was none) and the torch version (major, minor) whose stable ABI is targeted.");
}
