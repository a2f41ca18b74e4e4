"""Data-parallel calibration and evaluation: two gloo ranks give what one gives, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ras_fast import parallel
from ras_fast.profile import RasProfile


def test_alone():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    assert parallel.each(lambda item: item + 1, range(3), "items", progress=False) == [1, 2, 3]


@pytest.mark.slow  # three fresh processes
def test_two_ranks_are_one(tmp_path):
    script = str(Path(__file__).with_name("parallel_ranks.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    results, environment = [], os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun has it: other threads, other roundings
    for name, launcher in (("one", []), ("two", torchrun)):
        folder = tmp_path / name
        command = [sys.executable, *launcher, script, str(folder)]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert finished.returncode == 0, finished.stderr[-3000:]
        results.append(folder)
    one, two = results
    for method in ("moras", "attention", "autosteer"):
        alone, shared = RasProfile.from_pretrained(one / method), RasProfile.from_pretrained(two / method)
        assert alone.config == shared.config
        assert alone.tensors.keys() == shared.tensors.keys()
        assert all(torch.equal(tensor, shared.tensors[name]) for name, tensor in alone.tensors.items())
    records = [json.loads((folder / "records.json").read_text()) for folder in results]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["records"] == records[1]["records"]
    lines = [sorted((folder / "answers.jsonl").read_text().splitlines()) for folder in results]
    assert len(lines[0]) == len(lines[1]) == len(records[0]["records"])
