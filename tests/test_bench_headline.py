"""The table that `make bench` ends with, made from figures like those that the benchmarks write."""

import json

import headline
import pytest

NORM = {"dtype": "bfloat16", "T": 1024, "d": 4096, "ras_fast µs": 800.0, "steer all µs": 1000.0,
        "in place µs": 400.0, "clone µs": 2.0,
        "sandwich µs": 900.0, "sandwich, two calls µs": 950.0, "sandwich, compile µs": 990.0,
        "eager µs": 4200.0, "compile µs": 1200.0, "GB/s": 40.0, "share": 0.8}  # fmt: skip
PREFILL = {"B": 1, "Lq": 1024, "Lk": 1024, "D": 128, "rows": 64, "GFLOP/s": 250.0, "share": 0.9, "ras_fast µs": 34e3,
           "no mass µs": 33e3, "eager weights µs": 300e3, "sdpa flash µs": 85e3}  # fmt: skip
CONTENDERS = {"undefended": (5.0, 1.4), "undefended, patched": (5.1, 1.5), "MoRAS by hooks": (10.2, 6.6),
              "MoRAS, engine": (5.0, 4.0)}  # fmt: skip


def write(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}_quick.json").write_text(json.dumps({"ceilings": {}, "rows": rows}))


def cells(folder):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in headline.table(folder).splitlines()[2:]]


def test_a_call_stands_beside_its_fastest_peer(tmp_path):
    write(tmp_path, norm=[NORM], attention=[PREFILL, PREFILL | {"Lq": 1, "rows": 1}])
    rms, steered, in_place, prefill, *_ = cells(tmp_path)
    assert rms == ["residual + RMSNorm, bfloat16 [1024, 4096]", "800 µs", "1.2 ms compile", "1.50 ×", "40 GB/s", "0.8"]
    assert steered[1:] == ["1 ms", "1.2 ms compile", "1.20 ×", "32 GB/s", "0.64"]
    assert in_place[1:] == ["400 µs", "1.2 ms compile", "3.00 ×", "80 GB/s", "1.6"]
    assert prefill[0] == "attention, masses of 64 rows, 1024 keys, D 128, batch 1"
    assert prefill[1:] == ["34 ms", "85 ms sdpa flash", "2.50 ×", "250 GFLOP/s", "0.9"]


def test_on_a_gpu_it_says_what_is_a_graph(tmp_path):
    write(tmp_path, norm=[NORM | {"graph": False}, NORM | {"graph": True}])
    calls = [call for call, *_ in cells(tmp_path)]
    assert calls[3:] == [f"{call}, in a graph" for call in calls[:3]]


def test_a_defended_answer_stands_beside_the_undefended_one(tmp_path):
    contenders = {name: {"seconds": seconds, "first_token": first} for name, (seconds, first) in CONTENDERS.items()}
    write(tmp_path, engine=[{"case": "benign, 64 answer tokens", "contenders": contenders}])
    answer, first = cells(tmp_path)
    assert answer == ["benign, 64 answer tokens, MoRAS", "5 s", "10.2 s by hooks", "2.04 ×", "5 s undefended", "1"]
    assert first[1:] == ["4 s", "6.6 s by hooks", "1.65 ×", "1.4 s undefended", "0.35"]


def test_without_figures_it_says_how_to_take_them(tmp_path):
    with pytest.raises(SystemExit, match="has no figures of benchmarks with --quick: `make bench` takes them"):
        headline.table(tmp_path)
