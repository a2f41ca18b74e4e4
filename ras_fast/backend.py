"""Which implementation runs an op: "cuda" and "cpu" (csrc), "triton", or "torch" (the reference)."""

from __future__ import annotations

import importlib.util
import mmap
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ras_fast import build

NAMES = ("cuda", "triton", "cpu", "torch")
ENVIRONMENT_VARIABLE = "RAS_FAST_BACKEND"
CPU_ISA_VARIABLE = "RAS_FAST_CPU_ISA"
CPU_ISAS = ("avx512bf16", "avx512", "avx2", "portable")  # builds of the CPU kernels; dispatch.h takes other words for avx2
_LIBRARIES = Path(__file__).resolve().parent / "_lib"


@dataclass(frozen=True)
class Backend:
    """State of one backend on this machine."""

    name: str
    available: bool
    reason: str = ""  # why it is not available
    fix: str = ""  # the command that mends it

    @property
    def state(self) -> str:
        """ "available", or why not and the command that mends it."""
        return "available" if self.available else f"{self.reason}; to mend it: {self.fix}"

    def __str__(self) -> str:
        return f"{self.name}: {self.state}"


@cache
def load_library(kind: str) -> str:
    """Loads libras_fast_{kind}.so once; returns "" or why it could not be loaded."""
    path = _LIBRARIES / f"libras_fast_{kind}.so"
    if not path.is_file():
        return f"{path.name} is not built"
    if not _is_of_these_sources(path):
        return f"{path.name} was built from other sources than csrc/ holds"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error})"
    return ""


def _is_of_these_sources(path: Path) -> bool:
    """Whether the library was built from the csrc/ that is here; looked up before it is loaded, as loading cannot be undone."""
    try:
        marker = build.sources_marker(build.sources()).encode()
    except build.BuildError:  # installed without its sources
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(marker) >= 0


def _native(kind: str) -> Backend:
    reason = load_library(kind)
    return Backend(kind, not reason, reason, "ras-fast build" if reason else "")


def _cuda() -> Backend:
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return Backend("cuda", False, why, "install a CUDA build of torch on a machine with an NVIDIA GPU")
    return _native("cuda")


@cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; whether it can run here is what `backends()` says."""
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton's interpreter, which also takes CPU tensors, replaces its compiler."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> Backend:
    if not triton_is_installed():
        return Backend("triton", False, "triton is not installed", "pip install triton")
    if torch.cuda.is_available() or interprets_triton():
        return Backend("triton", True)
    return Backend("triton", False, "torch sees no CUDA device", "use a GPU, or TRITON_INTERPRET=1 to run it on the CPU")


def backends() -> dict[str, Backend]:
    """Every backend and its state: {name: Backend(name, available, reason, fix)}. A missing compiler is never an error."""
    return {backend.name: backend for backend in (_cuda(), _triton(), _native("cpu"), Backend("torch", True))}


_forced = "auto"


def set_backend(name: str) -> None:
    """Forces one backend for every op, or "auto" for the fastest built for the device and shape.

    The environment variable RAS_FAST_BACKEND does the same for a whole process.

    Raises:
        ValueError: `name` is not one of "auto", "cuda", "triton", "cpu", "torch".
        RuntimeError: that backend is not available here; says why and what mends it.
    """
    global _forced
    if name != "auto":
        if name not in NAMES:
            raise ValueError(f"backend is {name!r}; it must be one of {('auto', *NAMES)}")
        if not backends()[name].available:
            raise RuntimeError(f"backend {backends()[name]}")
    _forced = name


_requests: dict[object, str] = {}  # those in force, the latest last
_before_requests = "auto"


def request_backend(name: str, request: object) -> None:
    """`set_backend(name)` until `withdraw_backend(request)`, which is also to be called where this raises. Of several requests
    in force the latest counts."""
    global _before_requests
    if not _requests:
        _before_requests = _forced
    _requests[request] = name  # first, so that an interrupt leaves nothing that cannot be withdrawn
    set_backend(name)


def withdraw_backend(request: object) -> None:
    """Ends a request: the latest of the others counts, or after the last what was forced before them all. Nothing happens where
    it is not in force."""
    if request not in _requests:
        return
    others = [name for other, name in _requests.items() if other is not request]
    if request is next(reversed(_requests)):
        set_backend(others[-1] if others else _before_requests)
    _requests.pop(request, None)  # last: an interrupt in between does the same once more


def forced_backend() -> str:
    """The forced backend's name, or "auto"."""
    return _forced


def device_type(tensor: torch.Tensor) -> str:
    """`tensor.device.type`, without making a device: among other work that takes Python 2 µs."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def has_kernel(op: str, device: str) -> bool:
    """Whether `op` has a kernel registered for the device type ("cpu" or "cuda"), beside the reference."""
    return device in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(f"ras_fast::{op}", device.upper())


@cache
def _automatic(op: str, device: str) -> str:
    # Whether or not the library is built: ops that are put together in Python have a kernel of their own, too.
    if has_kernel(op, device):
        return device
    if device == "cuda" and backends()["triton"].available and hasattr(torch.ops.ras_fast, f"{op}_triton"):
        return "triton"
    return "torch"


def resolve(op: str, device: torch.device) -> str:
    """The backend that runs `op` on tensors of `device`. torch.compile takes the choice in force while it traces.

    Raises:
        ValueError: the forced backend cannot run on this device.
    """
    if _forced == "auto":
        return _automatic(op, device.type)
    wrong_device = _forced in ("cuda", "cpu") and device.type != _forced
    if wrong_device or (_forced == "triton" and device.type != "cuda" and not interprets_triton()):
        raise ValueError(f"backend {_forced!r} is forced, but the tensors given to {op} are on {device.type!r}")
    return _forced


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which would double our own import time.
resolve._dynamo_marked_constant = True


def _read_environment() -> ValueError | RuntimeError | None:
    """Forces the backend that the environment asks for; what is wrong with its variables is returned."""
    try:
        set_backend(os.environ.get(ENVIRONMENT_VARIABLE) or "auto")
    except (ValueError, RuntimeError) as error:
        return type(error)(f"environment variable {ENVIRONMENT_VARIABLE}: {error}")
    isa = os.environ.get(CPU_ISA_VARIABLE, CPU_ISAS[0])
    if isa not in CPU_ISAS:
        return ValueError(f"environment variable {CPU_ISA_VARIABLE} is {isa!r}; it must be one of {CPU_ISAS}")
    return None


def _is_command_line() -> bool:
    """Whether this process is `ras-fast` or `python -m ras_fast.cli`: `ras_fast.cli.main` says in one line what is wrong."""
    return Path(sys.argv[0]).stem == "ras-fast" or "ras_fast.cli" in sys.orig_argv


# Loads the libraries at import, not at the first call, so that torch.ops.ras_fast is complete for those who use it directly.
backends()
environment_error = _read_environment()
if environment_error and not _is_command_line():
    raise environment_error
