"""The benchmark of vision towers' attention, on shapes that take no time."""

import json
import sys

import bench_towers


def test_both_candidates_are_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_towers.harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_towers.harness, "ceilings", lambda: {"matmul GFLOP/s": 100.0})
    monkeypatch.setattr(bench_towers, "SHAPES", {"tiny": (2, 8, [9]), "windows": (2, 8, [4, 4, 2])})
    monkeypatch.setattr(sys, "argv", ["bench_towers.py", "--seconds", "0"])
    bench_towers.main()
    (path,) = tmp_path.glob("*/towers.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], row["N"], row["images"]) for row in rows[:2]] == [("bfloat16", 9, 1), ("bfloat16", 10, 3)]
    assert all(row["ras_fast ms"] > 0 and row["SDPA ms"] > 0 for row in rows)
    assert "tiny" in capsys.readouterr().out
