"""The benchmark's GPU mode, at a size that shows that it runs: its figures are for a GPU to give."""

import bench_engine
import pytest
import torch

from ras_fast.patching import Patch


@pytest.mark.parametrize("left_out", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gpu_mode(capsys, left_out):
    model, processor = bench_engine.build("tiny", "cpu", torch.float32)
    cases = dict(bench_engine.gpu_cases(model, processor, 5, [1, 2], 1, 0.0 if left_out else 1e3))
    said = capsys.readouterr().out
    assert list(cases) == ([] if left_out else ["benign, 5 answer tokens", "benign, 5 answer tokens, batch 2"])
    assert said.count("is left out") == (2 if left_out else 0)
    assert said.count("undefended, graphs ") == len(cases)
    assert said.count("MoRAS in sequence") == said.count("AutoSteer, engine, gate on") == min(len(cases), 1)
    assert Patch.of(model) is None


def test_the_floor_counts_what_a_decode_step_reads(monkeypatch):
    monkeypatch.setattr(bench_engine.harness, "copy_bandwidth", lambda: 1e9)
    model, _ = bench_engine.build("tiny", "cpu", torch.float32)
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert bench_engine.floor(model)["decode step s"] == pytest.approx(4 * (2 * layer + 64 * 32000) / 1e9)
