"""The benchmark of growing caches, on a model of a few thousand weights."""

import json
import sys

import bench_decode


def test_every_contender_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_decode.harness, "RESULTS", tmp_path)
    options = ["--shape", "tiny", "--dtype", "float32", "--batch", "2", "--tokens", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *options])
    bench_decode.main()
    (written,) = tmp_path.glob("*/decode.json")
    rows = json.loads(written.read_text())["rows"]
    assert [row["contender"] for row in rows] == list(bench_decode.CONTENDERS)
    assert all(row["B"] == 2 and row["tokens"] == 4 and {"ms a step", "MB"} < set(row) for row in rows)
