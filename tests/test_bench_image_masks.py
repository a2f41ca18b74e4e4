"""The benchmark of prompts whose image tokens see each other, on shapes that take no time."""

import json
import sys

import bench_image_masks


def test_every_candidate_gives_the_same_and_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_image_masks.harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_image_masks.harness, "ceilings", lambda: {"matmul GFLOP/s": 100.0})
    shapes = {"images": (4, 2, 16, None, [9, 5], 3, 70, False), "prefix": (4, 2, 16, 5.0, [20], 0, 60, True)}
    monkeypatch.setattr(bench_image_masks, "SHAPES", shapes)
    monkeypatch.setattr(sys, "argv", ["bench_image_masks.py", "--seconds", "0"])
    bench_image_masks.main()
    (path,) = tmp_path.glob("*/image_masks.json")
    images, prefix = json.loads(path.read_text())["rows"]
    assert (images["N"], prefix["N"]) == (90, 80)
    timed = {"no mass ms", "ras_fast, 64 rows ms", "ras_fast, all rows ms", "eager weights ms"}
    assert {name for name in prefix if name.endswith(" ms")} == timed  # SDPA caps no scores
    assert timed | {"SDPA ms", "indicator values ms"} <= images.keys()
