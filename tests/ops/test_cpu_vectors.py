"""csrc/cpu/vec.h by itself."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shlex.split(os.environ.get("CXX", "").strip() or "g++")
CSRC = Path(__file__).parents[2] / "csrc"
FAR_BELOW = """
#include "cpu/vec.h"
using namespace ras::cpu::portable;
int main() {
  const float volatile far = -1.5e7f;  // the sum in which it is rounded is negative, and its bits near the lowest integer
  const vfloat x = splat(float(far));
  return exp(x)[0] != 0 || exp2_of_negative(x)[0] != 0;
}
"""


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"needs {COMPILER[0]}")
def test_exponentials_far_below_0_are_0_without_signed_overflow(tmp_path):
    source, program = tmp_path / "far_below.cpp", tmp_path / "far_below"
    source.write_text(FAR_BELOW)
    flags = ["-std=c++20", "-fsanitize=undefined", "-fno-sanitize-recover", "-Wno-psabi", "-DRAS_FAST_ISA=portable"]
    subprocess.run([*COMPILER, *flags, f"-I{CSRC}", source, "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
