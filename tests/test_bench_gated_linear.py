"""A quick run leaves the figures of the full one."""

import sys

import bench_gated_linear
import torch


@torch.no_grad()
def test_a_quick_run_has_a_file_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_gated_linear.harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_gated_linear.harness, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench_gated_linear, "QUICK", (64,))
    monkeypatch.setattr(sys, "argv", ["bench_gated_linear.py", "--quick", "--seconds", "0"])
    bench_gated_linear.main()
    assert [path.name for path in tmp_path.glob("*/*")] == ["gated_linear_quick.json"]
