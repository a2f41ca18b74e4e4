"""Tests of CPU kernels under a narrower build of them."""

import os
import subprocess
import sys

import pytest

NARROWER = pytest.mark.parametrize("isa", ["avx2", "portable"])


def check(isa: str, file: str, selected: str) -> None:
    """Runs a file's tests that `-k selected` names; in a process of its own, because the choice is made once a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selected]
    done = subprocess.run(command, env=os.environ | {"RAS_FAST_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
