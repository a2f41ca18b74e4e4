"""ras_fast.build: what the linked libraries need at run time."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ras_fast import build


@pytest.mark.skipif(build.find_nvcc() is None or shutil.which("readelf") is None, reason="needs nvcc and readelf")
def test_the_cuda_library_leads_the_loader_to_torchs_cuda_half(tmp_path, monkeypatch):
    """Without libtorch.so among its needs, current_stream's weak symbol stays unresolved on a machine with a GPU."""
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/empty.cu").write_text("__global__ void nothing() {}\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    library = build.build_cuda(tmp_path, tmp_path / "build", archs="90")
    needs = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needs


@pytest.mark.parametrize(("source", "archs", "expected"), [
    ("norm.cu", "80", True), ("hopper_prefill.cu", "80;90a", True), ("hopper_prefill.cu", "90a,100", True),
    ("hopper_prefill.cu", "80;90", False),
])  # fmt: skip
def test_hopper_sources_need_sm_90a(source, archs, expected):
    assert build.builds_for(Path(source), archs) == expected
