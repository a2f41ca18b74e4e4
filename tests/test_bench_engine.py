"""The benchmark's GPU mode, at a size that shows that it runs: its figures are for a GPU to give."""

import sys
from argparse import ArgumentTypeError

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


@pytest.mark.parametrize("case", ["benign:-1", "benign:0", "refused:4:0", "benign", "odd:4", "benign:4:1:0", "benign:4:1:1:1"])
def test_a_wrong_case_is_refused(case):
    with pytest.raises(ArgumentTypeError, match=f"^'{case}' is not benign or refused, then"):
        bench_engine.case(case)


def test_a_case_may_name_its_rounds_and_its_batch():
    assert bench_engine.case("benign:64") == ("benign", 64, None, 1)
    assert bench_engine.case("refused:16:3") == ("refused", 16, 3, 1)
    assert bench_engine.case("refused:16:3:8") == ("refused", 16, 3, 8)


@pytest.mark.parametrize(
    ("shape", "image_tokens"),
    [("tiny", 576), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("qwen3-vl-tiny", 576), ("smolvlm-tiny", 320)))],
)
def test_answers_at_once(tmp_path, shape, image_tokens):
    model, processor = bench_engine.build(shape, "cpu", torch.float32)
    ids = bench_engine.chat(model, processor, bench_engine.pictures(1), [bench_engine.QUESTION])["input_ids"]
    assert (ids == model.config.image_token_id).sum() == image_tokens
    cases = dict(bench_engine.cpu_cases(model, processor, [bench_engine.case("benign:5:1:2")], 1))
    (found,) = cases.values()
    assert list(cases) == ["benign, 5 answer tokens, batch 2"]
    assert list(found) == ["undefended", "undefended, patched", "undefended, engine's loop", "MoRAS by hooks", "MoRAS, engine"]
    assert all(row["seconds"] > 0 and row["first_token"] is None for row in found.values())
    row = {"shape": shape, "case": "benign", "parameters": 1, "dtype": "float32", "contenders": found}
    bench_engine.plot([row], tmp_path / "timeline.png")


def test_the_gpu_mode_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", "--gpu"])
    with pytest.raises(SystemExit, match="--gpu needs a CUDA device"):
        bench_engine.main()


def test_the_floor_counts_what_a_decode_step_reads(monkeypatch):
    monkeypatch.setattr(bench_engine.harness, "copy_bandwidth", lambda: 1e9)
    model, _ = bench_engine.build("tiny", "cpu", torch.float32)
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert bench_engine.floor(model)["decode step s"] == pytest.approx(4 * (2 * layer + 64 * 32000) / 1e9)
