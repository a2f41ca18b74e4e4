"""Choosing a backend, and living without a compiler."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import ras_fast
from ras_fast import backend, build
from ras_fast.ops import _registry
from ras_fast.patching import Patch

ROOT = Path(__file__).resolve().parents[1]


def run(code, cwd=ROOT, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_every_backend_is_listed_with_a_remedy():
    states = ras_fast.backends()
    assert list(states) == ["cuda", "triton", "cpu", "torch"]
    assert states["torch"].available
    assert states["cpu"].available, states["cpu"]
    for state in states.values():
        assert state.available or (state.reason and state.fix), state


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'fast'"):
        ras_fast.set_backend("fast")


def test_unavailable_backend_says_why(monkeypatch):
    state = backend.Backend("cuda", False, "no GPU", "buy one")
    monkeypatch.setattr(backend, "backends", lambda: {"cuda": state})
    with pytest.raises(RuntimeError, match="no GPU; to mend it: buy one"):
        ras_fast.set_backend("cuda")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("original", ["auto", "torch"])
def test_requests_end_in_any_order(original, order):
    names = ["torch", "cpu", "torch"]
    ras_fast.set_backend(original)
    try:
        requests = [object() for _ in names]
        for name, request in zip(names, requests, strict=True):
            backend.request_backend(name, request)
        in_force = [0, 1, 2]
        for ended in order:
            assert backend.forced_backend() == names[in_force[-1]]
            in_force.remove(ended)
            for _ in range(2):  # ending it again does nothing
                backend.withdraw_backend(requests[ended])
        assert backend.forced_backend() == original
    finally:
        ras_fast.set_backend("auto")


@pytest.mark.parametrize("end", [False, True])
def test_ctrl_c_forces_no_backend_for_good(model, monkeypatch, end):
    handle = ras_fast.patch(model, backend="torch") if end else None
    forced = backend.set_backend

    def interrupted(name):
        forced(name)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "set_backend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.unpatch() if end else ras_fast.patch(model, backend="torch")
    if end:
        assert Patch.of(model) is handle
        handle.unpatch()
    assert backend.forced_backend() == "auto"
    assert Patch.of(model) is None


def test_environment_variable():
    done = run("import ras_fast.backend as b; print(b.forced_backend())", RAS_FAST_BACKEND="torch")
    assert done.stdout.strip() == "torch"
    assert "variable RAS_FAST_BACKEND: backend is 'nonsense'" in run("import ras_fast", RAS_FAST_BACKEND="nonsense").stderr
    assert run("import ras_fast", RAS_FAST_BACKEND="").returncode == 0


def test_an_unknown_build_of_the_cpu_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "set_backend", lambda name: None)
    for limit in ("avx2", "avx512", "avx512bf16", "portable"):
        monkeypatch.setenv("RAS_FAST_CPU_ISA", limit)
        assert backend._read_environment() is None
    assert "RAS_FAST_CPU_ISA is 'avx-2'; it must be one of" in run("import ras_fast", RAS_FAST_CPU_ISA="avx-2").stderr


def test_triton_in_the_interpreter():
    code = (
        "import torch, ras_fast; ras_fast.set_backend('triton'); x = torch.randn(3, 8);"
        "print(ras_fast.ops.add_rms_norm(x, x, torch.ones(8), 1e-6)[0].shape)"
    )
    done = run(code, TRITON_INTERPRET="1")
    assert "[3, 8]" in done.stdout, done.stderr


def test_a_backend_forced_after_a_call_holds_for_the_next(monkeypatch):
    """What was chosen for the first call is remembered, but not for another backend."""
    reference = mock.Mock(side_effect=_registry._references["add_rms_norm"])
    monkeypatch.setattr(_registry, "_selected", {})
    monkeypatch.setitem(_registry._references, "add_rms_norm", reference)
    x, weight = torch.randn(3, 8), torch.ones(8)
    for name, calls in (("cpu", 0), ("torch", 1), ("cpu", 1)):
        monkeypatch.setattr(backend, "_forced", name)
        ras_fast.ops.add_rms_norm(x, None, weight, 1e-6)
        assert reference.call_count == calls


def test_forced_backend_on_the_wrong_device(monkeypatch):
    monkeypatch.setattr(backend, "_forced", "cuda")
    with pytest.raises(ValueError, match="'cuda' is forced, but the tensors given to add_rms_norm are on 'cpu'"):
        ras_fast.ops.add_rms_norm(torch.zeros(1, 8), None, torch.ones(8), 1e-6)


def test_without_native_libraries_the_reference_serves(tmp_path):
    """A machine without a compiler: same package, no _lib."""
    shutil.copytree(ROOT / "ras_fast", tmp_path / "ras_fast", ignore=shutil.ignore_patterns("_lib", "_C*", "assets"))
    code = (
        f"import torch, ras_fast; assert ras_fast.__file__.startswith({str(tmp_path)!r});"
        "print(ras_fast.backends()['cpu']); x = torch.randn(2, 8);"
        "op = torch.ops.ras_fast.add_rms_norm.default;"
        "print(op(x, x, torch.ones(8), 1e-6, None, None, None, False, 0.0, True, None, None, 1.0, None)[0].shape);"
        "print(ras_fast.ops.region_attention(*[torch.randn(1, 2, 3, 4)] * 3)[0].shape)"
    )
    done = run(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "libras_fast_cpu.so is not built; to mend it: ras-fast build" in done.stdout, done.stderr
    assert "[2, 8]" in done.stdout
    assert "[1, 2, 3, 4]" in done.stdout


def test_a_library_of_other_sources_is_not_loaded(monkeypatch):
    """Its kernels may read their arguments otherwise; a pull without a build leaves such a one."""
    monkeypatch.setattr(build, "sources_marker", lambda csrc: "RAS_FAST_SOURCES=other")
    reason = backend.load_library.__wrapped__("cpu")
    assert reason == "libras_fast_cpu.so was built from other sources than csrc/ holds"


def test_the_marker_follows_every_source(tmp_path):
    (tmp_path / "cpu").mkdir()
    found = set()
    for name, text in (("sources.cpp", "a"), ("cpu/a.h", "a"), ("cpu/a.h", "b"), ("cpu/b.h", "b"), ("notes.txt", "b")):
        (tmp_path / name).write_text(text)
        found.add(build.sources_marker(tmp_path))
    assert len(found) == 4


def test_build_reports_missing_tools(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "find_cuda_tool", lambda name: None)
    report = build.build_all(tmp_path, tmp_path / "work")
    assert "no-such-compiler was not found" in report["cpu"]
    assert "nvcc was not found" in report["cuda"]


def test_cuda_architectures():
    assert build.cuda_arch_flags("80;90a") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    for archs in ("", ";", "nonsense", "sm_90", "80; 90a"):
        with pytest.raises(build.BuildError, match="RAS_FAST_CUDA_ARCHS"):
            build.cuda_arch_flags(archs)


def test_import_is_light():
    """`import ras_fast` must not load transformers."""
    done = run("import sys, ras_fast; print('transformers' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_every_public_name_is_there_after_the_import_alone():
    done = run("import ras_fast; print([name for name in ras_fast.__all__ if not hasattr(ras_fast, name)])")
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ras_fast.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("op", "device", "kernel", "triton", "expected"),
    [
        ("add_rms_norm", "cuda", True, True, "cuda"),
        ("add_rms_norm", "cuda", False, True, "triton"),
        ("add_rms_norm", "cuda", False, False, "torch"),
        ("prefill_attention", "cuda", False, True, "torch"),  # which is in C++ alone
        ("add_rms_norm", "cpu", True, True, "cpu"),
        ("add_rms_norm", "cpu", False, True, "torch"),  # what the interpreter takes is for tests
    ],
)
def test_what_runs_where_nothing_is_forced(monkeypatch, op, device, kernel, triton, expected):
    monkeypatch.setattr(backend, "has_kernel", lambda op, device: kernel)
    monkeypatch.setattr(backend, "backends", lambda: {"triton": backend.Backend("triton", triton)})
    assert backend._automatic.__wrapped__(op, device) == expected
