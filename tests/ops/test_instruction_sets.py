"""The CPU kernels' tests once more under other builds for this processor than the one that it takes by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Of each file in this folder, what `-k` selects.
SELECTED = {
    "test_activation": "cpu",
    "test_attention": "test_blocks_of_keys or cpu and (test_garbage or test_many_rows)",
    "test_gated_linear": "cpu and (float64 or strides)",
    "test_linear": "cpu or beside or more_rows or ends",
    "test_norm": "cpu and (test_steered or test_unsteered_rows or test_in_place_writes or test_unsteered and 769)",
    "test_rotary": "cpu and (eager or strides or special)",
}
OTHERS = {"AVX512": ["avx2", "portable"], "AVX2": ["portable"]}.get(torch.backends.cpu.get_cpu_capability(), [])
if torch.cpu._is_avx512_bf16_supported():
    OTHERS += ["avx512" if "AuthenticAMD" in Path("/proc/cpuinfo").read_text() else "avx512bf16"]


@pytest.mark.parametrize("isa", OTHERS)
def test_another_build_passes(isa):
    """In a process of its own, because the choice is made once a process."""
    files = [str(Path(__file__).with_name(f"{name}.py")) for name in SELECTED]
    selected = " or ".join(f"{name} and ({which})" for name, which in SELECTED.items())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", selected]
    done = subprocess.run(command, env=os.environ | {"RAS_FAST_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
