"""What the compilers made of the kernels, read without a GPU: registers, spills, shared memory, tensor cores, vector loads.

`ras-fast inspect cuda` reads the built library; `ras-fast inspect triton` compiles each default configuration ahead of time;
`ras-fast inspect` does both.
A kernel that spills registers to memory is an error (exit status 1): every default configuration is meant to fit.
"""

from __future__ import annotations

import argparse
import bisect
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from ras_fast.backend import interprets_triton, triton_is_installed
from ras_fast.build import find_cuda_tool

CUDA_LIBRARY = Path(__file__).resolve().parent / "_lib/libras_fast_cuda.so"
# Modules of ras_fast.triton_kernels with an aot_cases(arch), a list of dicts: name, kernel, signature, constexprs,
# divisible_by_16 (names of arguments), num_warps, num_stages and, where it is set, maxnreg.
TRITON_MODULES = ("norm", "attention", "gated_linear", "rotary")
TRITON_ARCHS = (80, 90, 100, 120)
# A line of disassembly: where the instruction lies, and without its predicate the instruction.
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")


class InspectError(RuntimeError):
    """Something that the inspection needs is missing; the message says what and what mends it."""


@dataclass(frozen=True)
class KernelFacts:
    """One kernel compiled for one architecture. Instruction counts are static: how often they stand in the code."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int  # spilled registers, and arrays that could not be kept in registers
    shared_bytes: int  # static; cuobjdump adds the 1 KiB that sm_90 and newer reserve
    local_accesses: int  # loads and stores of spilled values
    tensor_core: int  # matrix instructions
    loads: int  # from global memory, asynchronous copies to shared memory included
    wide_loads: int  # of these, 16 bytes or more at a time

    @property
    def spills(self) -> bool:
        return self.local_accesses > 0 or self.stack_bytes > 0


def _dump(binary: Path, *options: str, tool: str = "cuobjdump") -> str:
    found = find_cuda_tool(tool)
    if found is None:
        raise InspectError(f"{tool} was not found: install the CUDA toolkit or `pip install triton`, which brings it")
    done = subprocess.run([found, *options, str(binary)], capture_output=True, text=True)
    if done.returncode:
        raise InspectError(f"{tool} {' '.join(options)} {binary} failed: {done.stderr.strip()}")
    return done.stdout


def _demangle(names: Iterable[str]) -> dict[str, str]:
    """{mangled: readable without namespaces and arguments}; the mangled name itself where c++filt is missing."""
    names = list(names)
    if not names or not shutil.which("c++filt"):
        return {name: name for name in names}
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    # The parenthesis of the arguments: that of a value's type, in a template's arguments, stands behind a blank.
    short = (re.sub(r"(?<=\S)\(.*", "", line).removeprefix("void ") for line in output)
    return {name: re.sub(r"ras::cuda::|__nv_|__(?=half)", "", line) for name, line in zip(names, short, strict=True)}


def _resources(binary: Path) -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture such as "sm_90a", mangled kernel name): {"REG", "STACK", "SHARED": registers or bytes}}; of a cubin the
    architecture is empty."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = kernel = ""
    for line in _dump(binary, "--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line and kernel:
            found[arch, kernel] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
    return found


def disassembly(binary: Path, arch: str | None = None) -> dict[tuple[str, str], list[str]]:
    """{(architecture such as "sm_90a", mangled kernel name): instructions in order} of a cubin, object file or shared library.

    An instruction is an opcode and its operands, as in "LDG.E.128 R4, [R2]"; the predicate in front of it is left out.

    arch: only kernels for this one.

    Raises:
        InspectError: cuobjdump is missing or cannot read the file.
    """
    kernels: dict[tuple[str, str], list[str]] = {}
    found, instructions = "", []
    for line in _dump(binary, "--dump-sass", *(["-arch", arch] if arch else [])).splitlines():
        if match := re.search(r"(?:arch = |code for )(sm_\w+)", line):
            found = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            instructions = kernels[found, match[1]] = []
        elif match := _INSTRUCTION.match(line):
            instructions.append(match[2])
    return kernels


def read_binary(binary: Path, arch: str | None = None) -> list[KernelFacts]:
    """Facts about every kernel in a cubin, object file or shared library, from its resource table and disassembly.

    arch: only kernels for this one, such as "sm_90a".

    Raises:
        InspectError: cuobjdump is missing or cannot read the file.
    """
    resources, kernels = _resources(binary), disassembly(binary, arch)
    names = _demangle(dict.fromkeys(kernel for _, kernel in kernels))
    rows = []
    for (built, kernel), instructions in kernels.items():
        found = resources.get((built, kernel)) or next(v for (_, k), v in resources.items() if k == kernel)
        rows.append(_facts(names[kernel], built, found, found["SHARED"], instructions))
    return rows


def _facts(kernel: str, arch: str, resources: dict[str, int], shared: int, instructions: Iterable[str]) -> KernelFacts:
    count = dict.fromkeys(("local", "tensor", "loads", "wide"), 0)
    for instruction in instructions:
        opcode = instruction.split()[0]
        name = opcode.split(".")[0]
        if name in ("LDL", "STL"):
            count["local"] += 1
        elif name in ("HMMA", "HGMMA", "QGMMA", "IMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA"):
            count["tensor"] += 1
        elif name in ("LDG", "LDGSTS", "UBLKCP", "UTMALDG"):
            count["loads"] += 1
            count["wide"] += name in ("UBLKCP", "UTMALDG") or ".128" in opcode or ".256" in opcode
    return KernelFacts(kernel, arch, resources["REG"], resources["STACK"], shared, *count.values())


def inspect_cuda(library: Path = CUDA_LIBRARY, archs: Sequence[str] = (), match: str = "") -> list[KernelFacts]:
    """Every kernel of the built CUDA library; `archs` ("90a", …) and `match` (part of a name) narrow it down.

    Raises:
        InspectError: the library is not built or holds none of `archs`, or cuobjdump is missing.
    """
    if not library.is_file():
        raise InspectError(f"{library} does not exist: run `ras-fast build` (it needs nvcc, but no GPU)")
    built = list(dict.fromkeys(arch for arch, _ in _resources(library)))
    wanted = [arch for arch in built if not archs or arch[3:] in archs]
    if not wanted:
        raise InspectError(f"--arch is {', '.join(archs)}; {library.name} has kernels for {', '.join(a[3:] for a in built)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # cuobjdump uses one processor
        return [row for rows in pool.map(partial(read_binary, library), wanted) for row in rows if match in row.kernel]


def inspect_triton(archs: Sequence[int] = TRITON_ARCHS, match: str = "") -> list[KernelFacts]:
    """Every default configuration of the Triton kernels, compiled ahead of time for each architecture, one process for each.

    Raises:
        InspectError: Triton is missing, TRITON_INTERPRET=1 has replaced its compiler, or it knows none of `archs`.
    """
    if not triton_is_installed():
        raise InspectError("triton is not installed: `pip install triton`")
    if interprets_triton():
        raise InspectError("TRITON_INTERPRET=1 replaces Triton's compiler by an interpreter: unset it")
    with ProcessPoolExecutor(min(len(archs), os.cpu_count()), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return [row for rows in pool.map(_inspect_arch, archs, [match] * len(archs)) for row in rows]
        except BrokenProcessPool as error:  # LLVM ends the process that asks it for an architecture it does not know
            raise InspectError(f"--arch is {', '.join(map(str, archs))}; Triton's compiler died of it") from error


def _inspect_arch(arch: int, match: str) -> list[KernelFacts]:
    modules = [importlib.import_module(f"ras_fast.triton_kernels.{name}") for name in TRITON_MODULES]
    return compile_triton([case for module in modules for case in module.aot_cases(arch) if match in case["name"]], arch)


def compile_triton(cases: Sequence[dict], arch: int) -> list[KernelFacts]:
    """Compiles cases (see TRITON_MODULES) for compute capability `arch`, such as 90, and reads what came out."""
    binaries = [_compile_triton(case, arch) for case in cases]
    code = [_code(binary.asm["cubin"]) for binary in binaries]
    rows = []
    for case, binary, instructions in zip(cases, binaries, _disassemble(code, arch), strict=True):
        with _file_of(binary.asm["cubin"]) as cubin:
            [resources] = _resources(cubin).values()
        target = re.search(r"\.target (sm_\w+)", binary.asm["ptx"])[1]
        rows.append(_facts(case["name"], target, resources, binary.metadata.shared, instructions))
    return rows


@contextmanager
def _file_of(content: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def _code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin: section ".text.<its name>" of a 64-bit ELF file."""
    (headers,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    [code] = [cubin[at : at + length] for name, _, _, _, at, length in sections
              if cubin[sections[names][4] + name :].startswith(b".text.")]  # fmt: skip
    return code


def _disassemble(kernels: Sequence[bytes], arch: int) -> list[list[str]]:
    """The instructions of each. All in one go: nvdisasm takes most of a second to begin."""
    if not kernels:
        return []
    ends = list(itertools.accumulate(map(len, kernels)))
    with _file_of(b"".join(kernels)) as code:
        lines = _dump(code, "--binary", f"SM{arch}", tool="nvdisasm").splitlines()
    found: list[list[str]] = [[] for _ in kernels]
    for match in filter(None, map(_INSTRUCTION.match, lines)):
        found[bisect.bisect_right(ends, int(match[1], 16))].append(match[2])
    return found


def _compile_triton(case: dict, arch: int):
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature = case["kernel"], case["signature"]
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case["divisible_by_16"]}
    source = ASTSource(kernel, full, constexprs=case["constexprs"], attrs=attributes)
    options = {name: case[name] for name in ("num_warps", "num_stages", "maxnreg") if name in case}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def table(rows: Sequence[KernelFacts]) -> str:
    """The facts as text, a line per kernel and architecture; kernels that spill end in "SPILLS"."""
    head = ("kernel", "arch", "regs", "stack", "smem", "local", "mma", "loads", "16 B")
    lines = [head]
    for row in rows:
        values = [str(getattr(row, field.name)) for field in fields(row)]
        lines.append((*values, "SPILLS") if row.spills else tuple(values))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        columns = zip(line, widths, strict=False)  # "SPILLS" has no column
        cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(columns)]
        text.append("  ".join([*cells, *line[len(head) :]]))
    return "\n".join(text)


def _compute_capability(text: str) -> str:
    if not re.fullmatch(r"[0-9]{2,3}a?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 90 or 90a")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """`ras-fast inspect`: prints the table; exit status 1 when a kernel spills, 2 when something is missing."""
    parser = argparse.ArgumentParser(prog="ras-fast inspect", description=__doc__.split("\n\n")[0])
    parser.add_argument("which", nargs="?", choices=("cuda", "triton"), help="only the built library, or the Triton kernels")
    parser.add_argument("--arch", type=_compute_capability, action="append", default=[],
                        help="only this compute capability, such as 90a; repeatable")  # fmt: skip
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args(argv)
    rows: list[KernelFacts] = []
    try:
        if arguments.which != "triton":
            rows += inspect_cuda(archs=arguments.arch, match=arguments.match)
        if arguments.which != "cuda":
            archs = [int(arch.rstrip("a")) for arch in arguments.arch] or TRITON_ARCHS
            rows += inspect_triton(archs, arguments.match)
        if not rows:
            raise InspectError(f"no kernel was found whose name contains {arguments.match!r}")
    except InspectError as error:
        print(f"ras-fast inspect: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else table(rows))
    spilling = sum(row.spills for row in rows)
    print(f"{len(rows)} kernels, {spilling} with spills", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
