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
# The two sanitizers exclude each other. "thread": emulator.cpp's own hooks see every access (bounds, hazards). "address": the
# real AddressSanitizer, for what a thread does inside its own stack; it must be preloaded into Python.
SANITIZERS = {
    "thread": "-fsanitize=thread,undefined -fno-sanitize=vptr",
    "address": "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined",
}
FLAGS = f"-std=c++20 -O1 -fPIC -ffp-contract=off -fno-strict-aliasing -w -I{HERE}/include -I{HERE} -I{CSRC}"


def sanitizer() -> str:
    """Which build this process uses: SIMT_SANITIZER, "thread" unless set."""
    return os.environ.get("SIMT_SANITIZER", "thread")


def build(source: str, folder: Path) -> Path:
    """Compiles tests/simt/<source>.cpp and the emulator into a shared library in `folder`."""
    flags = SANITIZERS[sanitizer()]
    library = folder / f"{source}.so"
    compiler = os.environ.get("CXX", "g++")
    runtime_flags = flags if sanitizer() == "address" else ""
    link_flags = runtime_flags or "-fsanitize=undefined -static-libubsan"
    steps = [
        f"{compiler} {FLAGS} {runtime_flags} -c {HERE}/emulator.cpp -o {folder}/emulator.o",
        f"{compiler} {FLAGS} {runtime_flags} -c {HERE}/emulator_hopper.cpp -o {folder}/emulator_hopper.o",
        f"{compiler} {FLAGS} {flags} -c {HERE}/{source}.cpp -o {folder}/{source}.o",
        # Not linked with the thread sanitizer's runtime: emulator.cpp has the functions that the compiler calls. UBSan's is
        # linked in, so that each library's findings reach its own emulator.cpp.
        f"{compiler} -shared {folder}/{source}.o {folder}/emulator.o {folder}/emulator_hopper.o -o {library} {link_flags}",
    ]
    for step in steps:
        subprocess.run(step.split(), check=True)
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
