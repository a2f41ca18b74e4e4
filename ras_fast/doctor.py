"""`ras-fast doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import ras_fast
from ras_fast.backend import environment_error, resolve
from ras_fast.build import find_cuda_tool
from ras_fast.loading import TINY

# Without the in-place twins, and without what runs no op.
OPS = [name for name in ras_fast.ops.__all__ if hasattr(torch.ops.ras_fast, name) and not name.endswith("_")]


def report() -> tuple[list[tuple[str, str]], list[str]]:
    """(facts, each a (topic, finding); problems, each with the command that mends it). Without a problem the package works."""
    facts = [("ras_fast", f"{ras_fast.__version__} in {Path(ras_fast.__file__).parent}"), ("python", platform.python_version())]
    packages, problems = _packages()
    facts += packages + _devices()
    facts += [(f"backend {name}", backend.state) for name, backend in ras_fast.backends().items()]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    facts += [(f"ops on {device}", _chosen(torch.device(device))) for device in devices]
    facts += _build()
    facts.append(("tiny model", str(TINY) if (TINY / "config.json").is_file() else "missing; to mend it: reinstall ras_fast"))
    wrong = _wrong_answer()
    return facts, problems + [str(problem) for problem in (environment_error, wrong) if problem]


def main() -> int:
    """Prints the report. 0: usable; 1: something that every use needs is missing or wrong."""
    facts, problems = report()
    width = max(len(topic) for topic, _ in facts)
    for topic, finding in facts:
        print(f"{topic:{width}}  {finding}")
    print()
    print("\n".join(f"PROBLEM  {problem}" for problem in problems) or "ras_fast is usable here.")
    return 1 if problems else 0


def _packages() -> tuple[list[tuple[str, str]], list[str]]:
    """Versions of what the package requires, by its own metadata, and of what it can use."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires("ras-fast") or ()]
    except metadata.PackageNotFoundError:
        return [("installed", "no, running from a source tree; to mend it: pip install -e .")], []
    facts, problems = [], []
    for requirement in required:
        optional = requirement.marker is not None
        if optional and requirement.name not in ("triton", "scikit-learn", "vllm"):
            continue
        extra = f"; to have it: pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            facts.append((requirement.name, f"not installed{', optional' if optional else ''}{extra}"))
            problems += [] if optional else [f"{requirement.name} is not installed{extra}"]
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        facts.append((requirement.name, version if fits else f"{version}, needs {requirement.specifier}{extra}"))
        problems += [] if fits or optional else [f"{requirement.name} is {version}, needs {requirement.specifier}{extra}"]
    return list(dict(facts).items()), problems


def _devices() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [("cpu", f"{platform.machine()}, {cores} core(s), {torch.backends.cpu.get_cpu_capability()}")]
    if not torch.cuda.is_available():
        return [*facts, ("cuda", f"no device (torch built for CUDA {torch.version.cuda or 'none'})")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        facts.append((f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}, CUDA {torch.version.cuda}"))
    return facts


def _chosen(device: torch.device) -> str:
    """Which backend runs each op, grouped."""
    by_backend: dict[str, list[str]] = {}
    for op in OPS:
        by_backend.setdefault(resolve(op, device), []).append(op)
    return "; ".join(f"{backend}: {', '.join(names)}" for backend, names in by_backend.items())


def _build() -> list[tuple[str, str]]:
    facts = [("nvcc", find_cuda_tool("nvcc") or "none; only needed to build the CUDA library")]
    try:
        native = importlib.import_module("ras_fast._C")
    except ImportError as error:  # it is not built, or of another Python, or its file is broken
        return [*facts, ("build facts", f"none, {error}; to have them: ras-fast build")]
    built = ", ".join(f"{name} {value}" for name, value in native.build_facts().items())
    return [*facts, ("build facts", built)]


def _wrong_answer() -> str | None:
    """One small op against torch, on the default backend: catches a library that loads and computes nonsense."""
    x, weight = torch.randn(3, 64), torch.ones(64)
    y, _, _ = ras_fast.ops.add_rms_norm(x, None, weight, 1e-6)
    if torch.allclose(y, torch.nn.functional.rms_norm(x, (64,), weight, 1e-6), atol=1e-5):
        return None
    return f"add_rms_norm computes wrong values on backend {resolve('add_rms_norm', x.device)!r}; to mend it: ras-fast build"
