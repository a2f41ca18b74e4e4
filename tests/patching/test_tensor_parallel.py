"""transformers' own tensor parallelism, two gloo ranks on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import llava


@pytest.mark.slow  # two fresh processes
def test_two_ranks(tmp_path):
    llava().save_pretrained(tmp_path)
    script = Path(__file__).with_name("tensor_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
