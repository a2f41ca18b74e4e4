"""ras_fast.build: what the linked libraries need at run time, where it builds and with which compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ras_fast import build


@pytest.mark.skipif(build.find_cuda_tool("nvcc") is None or shutil.which("readelf") is None, reason="needs nvcc and readelf")
def test_the_cuda_library_leads_the_loader_to_torchs_cuda_half(tmp_path, monkeypatch):
    """Without libtorch.so among its needs, current_stream's weak symbol stays unresolved on a machine with a GPU."""
    tmp_path = tmp_path / "with space"
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/empty.cu").write_text("__global__ void nothing() {}\n")
    (tmp_path / "csrc/sources.cpp").touch()
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    library = build.build_cuda(tmp_path, tmp_path / "build", archs="90")
    needs = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needs


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("make", [build.build_cpu, build.build_binding])
def test_builds_in_a_path_with_spaces_by_a_compiler_behind_a_launcher(tmp_path, monkeypatch, make):
    root = tmp_path / "a b: $c"
    (root / "csrc/cpu").mkdir(parents=True)
    for name in ("sources.cpp", "binding.cpp", "cpu/own_kernel.cpp"):
        (root / "csrc" / name).write_text('#include "empty.h"\n')
    (root / "csrc/empty.h").touch()
    found = build.Torch.find()
    (root / "torch").symlink_to(found.lib.parent)
    monkeypatch.setattr(build.Torch, "find", lambda: build.Torch(root / "torch/include", root / "torch/lib"))
    monkeypatch.setattr(build, "sources", lambda: root / "csrc")
    monkeypatch.setenv("CXX", "env g++")
    library = make(root, root / "build")
    made = library.stat().st_mtime_ns
    assert make(root, root / "build").stat().st_mtime_ns == made  # what the compiler noted of the headers is understood, too


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """CXX is this program, which a test writes."""
    program = tmp_path / "c++"
    program.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(program))
    return program


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_cross_compiler_gets_the_builds_of_its_target(tmp_path, monkeypatch, compiler):
    compiler.write_text('#!/bin/sh\nif [ "$1" = -dumpmachine ]; then echo aarch64-linux-gnu; else exec g++ "$@"; fi\n')
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/sources.cpp").touch()
    (tmp_path / "csrc/cpu/own_kernel.cpp").write_text("int x86 = RAS_FAST_X86;\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    build.build_cpu(tmp_path, tmp_path / "build")
    assert [path.name for path in (tmp_path / "build").rglob("own_kernel.*.o")] == ["own_kernel.portable.o"]
    assert "-DRAS_FAST_X86=0" in (tmp_path / "build/cpu/build.ninja").read_text()


def test_a_compiler_that_does_not_say_what_it_compiles_for(tmp_path, compiler):
    compiler.write_text("#!/bin/sh\necho no licence >&2; exit 1\n")
    with pytest.raises(build.BuildError, match=r"-dumpmachine` failed.*no licence"):
        build.build_cpu(tmp_path, tmp_path / "build")


@pytest.mark.parametrize(("source", "archs", "expected"), [
    ("norm.cu", "80", True), ("hopper_prefill.cu", "80;90a", True), ("hopper_prefill.cu", "90a,100", True),
    ("hopper_prefill.cu", "80;90", False),
])  # fmt: skip
def test_hopper_sources_need_sm_90a(source, archs, expected):
    assert build.builds_for(Path(source), archs) == expected
