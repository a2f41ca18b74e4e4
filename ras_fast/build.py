"""Builds the native libraries: ``python -m ras_fast.build`` or ``ras-fast build``.

Two libraries on the LibTorch stable ABI (``libras_fast_cpu.so`` with g++, ``libras_fast_cuda.so`` with nvcc), which do
not depend on the Python version and outlive torch upgrades, and one optional pybind11 module, ``ras_fast._C``, for host-side
introspection. ``setup.py`` runs this very file by path, so it imports neither torch nor the package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# 2.10 is the first torch whose stable ABI has what the kernels use (device guards, parallel_for, typed pointers).
STABLE_ABI = "0x020a000000000000"
DEFAULT_CUDA_ARCHS = "80;90a;100;120"
HOPPER_FLAGS = "-gencode=arch=compute_90a,code=sm_90a"  # for csrc/cuda/hopper_*.cu, whose instructions no other chip has
# One source, compiled once for each instruction set; csrc/cpu/dispatch.h picks at load time.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
X86_ISAS = {
    "avx512bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
    "portable": "",
}
# The kernels that have a build for "avx512bf16": those that multiply bf16 by itself.
MULTIPLY_PAIRS = ("linear_kernel", "prefill_kernel")
# An unsteered row must come out of every instance of the norm kernel with the same bits, and a rotated head with those of eager
# code. Left to itself the compiler fuses a product and a sum into one instruction, in some instances and not in others.
PLAIN_ARITHMETIC = dict.fromkeys(("norm_kernel", "rotary_kernel"), "-ffp-contract=off")


class BuildError(RuntimeError):
    """A library could not be built; the message says which tool or file is missing and what mends it."""


@dataclass(frozen=True)
class Torch:
    """Where torch's headers and libraries are, found without importing torch."""

    include: Path
    lib: Path

    @staticmethod
    def find() -> Torch:
        # Under pip's build isolation torch cannot be imported, but the environment it will be installed into holds it.
        spec = importlib.util.find_spec("torch")
        roots = [Path(spec.origin).parent] if spec and spec.origin else []
        roots += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
        for root in roots:
            if (root / "include/torch/csrc/stable/library.h").is_file():
                return Torch(root / "include", root / "lib")
        raise BuildError("torch >= 2.10 was not found: `pip install torch`, then `ras-fast build`")


def sources() -> Path:
    """The csrc folder: beside the package in a checkout, inside it in an installed wheel."""
    for folder in (PACKAGE.parent / "csrc", PACKAGE / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"csrc/ was found neither beside nor inside {PACKAGE}: reinstall ras_fast")


def sources_marker(csrc: Path) -> str:
    """A string with a hash of these sources. It is compiled into the libraries, to tell later what they were built from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")):
        digest.update(f"{path.relative_to(csrc).as_posix()}\n".encode() + path.read_bytes())
    return f"RAS_FAST_SOURCES={digest.hexdigest()[:32]}"


def find_cuda_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: CUDA_HOME/bin, then PATH, /usr/local/cuda/bin, and Triton's package, which brings
    cuobjdump but not nvcc; None where it is nowhere."""
    home, triton = os.environ.get("CUDA_HOME"), importlib.util.find_spec("triton")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    folders += [f"{Path(triton.origin).parent}/backends/nvidia/bin"] if triton and triton.origin else []
    return shutil.which(name, path=os.pathsep.join(folders))


def cuda_arch_flags(archs: str) -> list[str]:
    """``"80;90a"`` to nvcc's -gencode flags; the last architecture also ships PTX for what comes after it."""
    names = [name for name in archs.replace(",", ";").split(";") if name]
    if not names or not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise BuildError(f"RAS_FAST_CUDA_ARCHS is {archs!r}; it needs a list such as {DEFAULT_CUDA_ARCHS!r}")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    flags.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
    return flags


def is_hopper(source: Path) -> bool:
    """Whether a CUDA source is for sm_90a alone."""
    return source.stem.startswith("hopper_")


def builds_for(source: Path, archs: str) -> bool:
    """Whether a CUDA source is part of a library for these architectures."""
    return not is_hopper(source) or "90a" in archs.replace(",", ";").split(";")


@dataclass
class Ninja:
    """A ninja file in the making: `rule` once per compiler, `edge` once per file."""

    text: str = "ninja_required_version = 1.5\n"

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.text += f"rule {name}\n  command = {command}\n  description = {name} $out\n"
        if depfile:
            self.text += "  depfile = $out.d\n  deps = gcc\n"

    def edge(self, out: Path | str, rule: str, inputs: list[Path | str], **variables: str) -> str:
        self.text += f"build {_escaped(out)}: {rule} {' '.join(map(_escaped, inputs))}\n"
        self.text += "".join(f"  {name} = {value}\n" for name, value in variables.items())
        return str(out)

    def run(self, folder: Path, verbose: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.text)
        command = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        if command == ["ninja"] and not shutil.which("ninja"):
            raise BuildError("ninja was not found: `pip install ninja`, then `ras-fast build`")
        done = subprocess.run([*command, "-C", str(folder), *(["-v"] if verbose else ["--quiet"])])
        if done.returncode:
            raise BuildError(f"ninja failed in {folder}; the compiler's messages are above")


def _escaped(path: Path | str) -> str:
    """A path in a ninja file's list of files, where ninja itself quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _quoted(argument: Path | str) -> str:
    """An argument in a ninja file's command, as the shell will read it."""
    return shlex.quote(str(argument)).replace("$", "$$")


def find_compiler() -> str:
    """The C++ compiler's command: CXX, which may hold arguments and a launcher such as ccache, else g++. Raises BuildError."""
    command = os.environ.get("CXX", "").strip() or "g++"
    if not shutil.which(shlex.split(command)[0]):
        raise BuildError(f"{command} was not found: install a C++20 compiler (Debian: apt-get install g++)")
    return command


def targets_x86(compiler: str) -> bool:
    """Whether a compiler makes code for x86-64, wherever it runs. Raises BuildError."""
    done = subprocess.run([*shlex.split(compiler), "-dumpmachine"], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"`{compiler} -dumpmachine` failed, so it is not known what it compiles for: {done.stderr.strip()}")
    return done.stdout.startswith("x86_64")


def common_flags(torch: Torch, csrc: Path) -> str:
    return f"-std=c++20 -O3 -DTORCH_TARGET_VERSION={STABLE_ABI} -I{_quoted(csrc)} -isystem {_quoted(torch.include)}"


def marker_flags(csrc: Path) -> str:
    return f"-DRAS_FAST_SOURCES=\\\"{sources_marker(csrc)}\\\""


def link_flags(torch: Torch) -> str:
    # No rpath: torch is always loaded before our library, and an absolute path would tie the binary to this machine.
    return f"-shared -L{_quoted(torch.lib)} -ltorch -ltorch_cpu -lc10"


def build_cpu(out: Path, work: Path, verbose: bool = False) -> Path:
    """Builds libras_fast_cpu.so into `out`. Raises BuildError."""
    compiler, torch, csrc, ninja = find_compiler(), Torch.find(), sources(), Ninja()
    x86 = targets_x86(compiler)
    isas = X86_ISAS if x86 else {"portable": ""}
    warnings = "-Wall -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"  # without noise of GCC's vector headers
    ninja.rule("cxx", f"{compiler} -MMD -MF $out.d {common_flags(torch, csrc)} -fPIC -fvisibility=hidden {warnings} "
               f"-fno-math-errno -fno-trapping-math -DRAS_FAST_X86={int(x86)} $flags -c $in -o $out")
    ninja.rule("link", f"{compiler} $in -o $out {link_flags(torch)}", depfile=False)
    kernels = sorted((csrc / "cpu").glob("*_kernel.cpp"))
    launchers = sorted(set((csrc / "cpu").glob("*.cpp")) - set(kernels))
    objects = [ninja.edge("sources.o", "cxx", [csrc / "sources.cpp"], flags=marker_flags(csrc))]
    objects += [ninja.edge(f"{source.stem}.o", "cxx", [source]) for source in launchers]
    for source in kernels:
        for isa, flags in isas.items():
            if isa == "avx512bf16" and source.stem not in MULTIPLY_PAIRS:
                continue
            options = f"-DRAS_FAST_ISA={isa} {flags} {PLAIN_ARITHMETIC.get(source.stem, '')}"
            objects.append(ninja.edge(f"{source.stem}.{isa}.o", "cxx", [source], flags=options))
    library = out / "libras_fast_cpu.so"
    ninja.edge(library, "link", objects)
    ninja.run(work / "cpu", verbose)
    return library


def build_cuda(out: Path, work: Path, verbose: bool = False, archs: str | None = None) -> Path:
    """Builds libras_fast_cuda.so into `out`. No GPU and no CUDA build of torch is needed. Raises BuildError."""
    nvcc = find_cuda_tool("nvcc")
    if nvcc is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit >= 12.8 or set CUDA_HOME, then `ras-fast build`")
    torch, csrc, ninja = Torch.find(), sources(), Ninja()
    archs = archs or os.environ.get("RAS_FAST_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
    arch_flags = " ".join(cuda_arch_flags(archs))
    cuda_sources = [source for source in sorted((csrc / "cuda").glob("*.cu")) if builds_for(source, archs)]
    if not cuda_sources:
        raise BuildError(f"no CUDA sources in {csrc / 'cuda'}: reinstall ras_fast")
    # torch/csrc/stable's CUDA entry points are declared under USE_CUDA and resolved at load time by a CUDA build of torch.
    ninja.rule("nvcc", f"{_quoted(nvcc)} -MMD -MF $out.d {common_flags(torch, csrc)} -DUSE_CUDA $archs $flags --threads 2 "
               "--expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -c $in -o $out")
    # libtorch.so has no symbols of its own, but leads the loader to the CUDA half of torch: many linkers would leave it out.
    ninja.rule("link", f"{_quoted(nvcc)} {arch_flags} $in -o $out -cudart static -Xlinker --no-as-needed {link_flags(torch)}",
               depfile=False)
    objects = [ninja.edge("sources.o", "nvcc", [csrc / "sources.cpp"], flags=marker_flags(csrc))]
    # Sources for the same architectures are one unit: torch's headers, read anew for each, take longer than most kernels.
    for name, flags, part in (("all", arch_flags, False), ("hopper", HOPPER_FLAGS, True)):
        if parts := [source for source in cuda_sources if is_hopper(source) == part]:
            objects.append(ninja.edge(f"{name}.o", "nvcc", [_unit(work / f"cuda/{name}.cu", parts)], archs=flags))
    library = out / "libras_fast_cuda.so"
    ninja.edge(library, "link", objects)
    ninja.run(work / "cuda", verbose)
    return library


def _unit(path: Path, parts: list[Path]) -> Path:
    """A source that includes these; left alone where it is there, since ninja would compile it again."""
    text = "".join(f'#include "{part}"\n' for part in parts)
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def build_binding(out: Path, work: Path, verbose: bool = False) -> Path:
    """Builds the pybind11 module ras_fast._C (build facts). Raises BuildError."""
    if not importlib.util.find_spec("pybind11"):
        raise BuildError("pybind11 was not found: `pip install pybind11`, then `ras-fast build`")
    import pybind11

    compiler, csrc, ninja = find_compiler(), sources(), Ninja()
    system = " ".join(f"-isystem {_quoted(folder)}" for folder in (pybind11.get_include(), sysconfig.get_path("include")))
    nvcc = f'-DRAS_FAST_NVCC="{find_cuda_tool("nvcc") or ""}"'
    facts = f"-DRAS_FAST_STABLE_ABI={STABLE_ABI}ULL {_quoted(nvcc)}"
    ninja.rule("pybind", f"{compiler} -MMD -MF $out.d -std=c++20 -O2 -fPIC -shared -fvisibility=hidden {system} "
               f"{facts} $in -o $out")
    module = out / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    ninja.edge(module, "pybind", [csrc / "binding.cpp"])
    ninja.run(work / "binding", verbose)
    return module


def build_all(package: Path, work: Path, verbose: bool = False) -> dict[str, str]:
    """Builds what this machine can into `package`; returns {target: "built" or why not}. Never raises BuildError."""
    lib = package / "_lib"
    lib.mkdir(parents=True, exist_ok=True)
    targets = {
        "cpu": lambda: build_cpu(lib, work, verbose),
        "cuda": lambda: build_cuda(lib, work, verbose),
        "_C": lambda: build_binding(package, work, verbose),
    }
    report = {}
    for name, build in targets.items():
        try:
            build()
            report[name] = "built"
        except BuildError as error:
            report[name] = str(error)
    return report


def main(argv: list[str] | None = None) -> int:
    """Builds in place; exit status 1 when the CPU library could not be built."""
    verbose = "-v" in (sys.argv[1:] if argv is None else argv)
    work = PACKAGE.parent / "build" if (PACKAGE.parent / "csrc").is_dir() else PACKAGE / "_build"
    report = build_all(PACKAGE, work, verbose)
    for name, result in report.items():
        print(f"{name:5} {result}")
    return 0 if report["cpu"] == "built" else 1


if __name__ == "__main__":
    raise SystemExit(main())
