"""Benchmarks of shapes that the command line names."""

import importlib
import sys

import pytest
import torch

CASES = {
    "bench_norm": ("3,64", ["T", "d"]),
    "bench_linear": ("48,64,2,0", ["N", "K", "T"]),
    "bench_rotary": ("4,2,16,16,5", ["Hq", "Hkv", "D", "rotated", "T"]),
}


@pytest.fixture
def main(monkeypatch, tmp_path):
    def run(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(module.harness, "RESULTS", tmp_path)
        monkeypatch.setattr(module.harness, "ceilings", lambda: {"copy GB/s": 10.0, "matmul GFLOP/s": 100.0})
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes its time
        monkeypatch.setattr(module, "CACHE", 0, raising=False)  # of bench_linear: one copy of a weight
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--seconds", "0", *arguments])
        with torch.no_grad():
            return module

    return run


@pytest.mark.parametrize("name", CASES)
def test_a_shape_is_measured_and_not_written(main, name, tmp_path, capsys, monkeypatch):
    shape, columns = CASES[name]
    module = main(name, "--shape", shape)
    dims = {"bench_norm": "T,d", "bench_linear": "N,K,T,gated", "bench_rotary": "Hq,Hkv,D,rotated,T"}[name]
    with torch.no_grad():
        module.harness.bound_by_memory("", "name", dims, [], [], module.case)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in lines[0].split("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    assert len(cells) == 2  # bf16 and fp32
    for row in cells:
        assert [row[head.index(column)] for column in columns] == shape.split(",")[: len(columns)]
    assert not list(tmp_path.iterdir())


def test_attention_of_another_number_of_heads(main, tmp_path, capsys):
    module = main("bench_attention", "--shape", "1,8,8,16,2", "--heads", "6,2")
    seen = []
    make = module.make
    module.make = lambda heads, *shape: seen.append((heads, shape[:4])) or make(heads, *shape)
    try:
        with torch.no_grad():
            assert module.main() == 0
    finally:
        module.make = make
    assert seen == [((6, 2), (1, 8, 8, 16))]
    assert "B 1 · Lq 8 · Lk 8 · D 16 · rows 2" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--shape", "3"), "it needs to be"), (("--heads", "4,2"), "needs --shape"), (("--shape", "1,6,8,16,2"), "1 or Lk")],
)
def test_what_is_no_shape(main, arguments, message, capsys):
    module = main("bench_attention", *arguments)
    with pytest.raises(SystemExit):
        module.main()
    assert message in capsys.readouterr().err
