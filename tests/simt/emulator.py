"""Builds and loads the host emulation of the CUDA kernels (emulator.h says what it checks)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# The two sanitizers exclude each other. "thread": emulator.cpp's own hooks see every access (bounds, hazards), and so whatever
# a null or a wrapped pointer leads to, whose own checks are most of the code. "address": the real AddressSanitizer, for what a
# thread does inside its own stack; it must be preloaded into Python.
SANITIZERS = {
    "thread": "-fsanitize=thread,undefined -fno-sanitize=vptr,null,pointer-overflow,object-size",
    "address": "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined",
}
FLAGS = f"-std=c++20 -O1 -fPIC -ffp-contract=off -fno-strict-aliasing -w -I{HERE}/include -I{HERE} -I{CSRC}"


def sanitizer() -> str:
    """Which build this process uses: SIMT_SANITIZER, "thread" unless set."""
    return os.environ.get("SIMT_SANITIZER", "thread")


def build(source: str, folder: Path) -> Path:
    """Compiles tests/simt/<source>.cpp and, once in a folder, the emulator into a shared library in `folder`."""
    flags = SANITIZERS[sanitizer()]
    compiler = os.environ.get("CXX", "g++").split()
    runtime_flags = flags if sanitizer() == "address" else ""
    link_flags = runtime_flags or "-fsanitize=undefined -static-libubsan"

    def compiled(name: str, sanitizer_flags: str) -> Path:
        out = folder / f"{name}.o"
        if not out.exists():
            subprocess.run([*compiler, *f"{FLAGS} {sanitizer_flags} -c {HERE}/{name}.cpp -o {out}".split()], check=True)
        return out

    # Not linked with the thread sanitizer's runtime: emulator.cpp has the functions that the compiler calls. UBSan's is linked
    # in, so that each library's findings reach its own emulator.cpp.
    objects = [compiled(source, flags), *(compiled(name, runtime_flags) for name in ("emulator", "emulator_hopper"))]
    library = folder / f"{source}.so"
    subprocess.run([*compiler, "-shared", *objects, "-o", library, *link_flags.split()], check=True)
    return library


class Emulator:
    """One emulation library: `run` calls an exported function and raises what the emulator found.

    Arrays are numpy arrays; their memory is registered for the time of the call, exactly as long as it is.
    """

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]

    def run(self, function: str, *arguments, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        for writable, arrays in ((0, inputs), (1, outputs)):
            for name, array in arrays.items():
                last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
                self.library.simt_allow(array.ctypes.data, last + array.itemsize, writable, name.encode())
        try:
            ok = getattr(self.library, function)(*arguments)
        finally:
            self.library.simt_forget_buffers()
        if not ok:
            raise AssertionError(self.library.simt_error().decode())


def available() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None
