"""bench/gpu.sh and what it calls, without a GPU: tools and figures are made up, the script and its tables are real."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import aims
import bench_crossovers
import harness
import ncu_table
import pytest
import roofline

BENCH = Path(__file__).resolve().parents[1] / "bench"
NORM = {"dtype": "bfloat16", "T": 8192, "d": 4096, "graph": True, "ras_fast µs": 60.0, "steer all µs": 61.0,
        "steer no row µs": 60.0, "empty µs": 2.0, "compile µs": 70.0, "MB": 268.0, "share": 0.95}  # fmt: skip
SELECTED = {"B": 1, "Lq": 4096, "Lk": 4096, "D": 128, "rows": 64, "graph": False, "ras_fast µs": 200.0, "no mass µs": 196.0,
            "floor": "sdpa cudnn", "sdpa cudnn µs": 195.0, "over floor": 200 / 195, "mass costs": 200 / 196}  # fmt: skip
EVERY = SELECTED | {"rows": 4096, "ras_fast µs": 300.0, "triton fused µs": 300.0, "triton no mass µs": 290.0, "flex µs": 900.0,
                    "hopper µs": 200.0}  # fmt: skip
DECODE = SELECTED | {"B": 8, "Lq": 1, "rows": 1, "graph": True, "share": 0.88, "over floor": 0.5, "mass costs": 1.01,
                     "range, no mass µs": 30.0, "sdpa under a mask, no mass µs": 90.0}  # fmt: skip
SECONDS = {"undefended, graphs": 1.0, "MoRAS by hooks": 9.0, "MoRAS, engine": 1.05, "AutoSteer, engine, gate off": 1.0,
           "AutoSteer, engine, gate on": 1.02}  # fmt: skip
AUTOSTEER = {"dtype": "bfloat16", "B": 8, "off, %": 0.2, "on beyond M h, %": 1.5}
ENGINE = {"case": "benign, 128 answer tokens"} | {f"{name} s": seconds for name, seconds in SECONDS.items()}


def write_results(folder, norm=(NORM,), attention=(SELECTED, EVERY, DECODE), autosteer=(AUTOSTEER,), engine=(ENGINE,)):
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"copy GB/s": 4300.0}
    for name, rows in (("norm", norm), ("attention", attention), ("autosteer", autosteer), ("engine", engine)):
        (folder / f"{name}.json").write_text(json.dumps({"ceilings": limits, "rows": rows}))


def verdicts(folder):
    return {aim.text: aims.judge(aim, folder) for aim in aims.AIMS}


@pytest.mark.parametrize("script", [bench_crossovers, roofline, aims])
def test_help_measures_and_writes_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(harness, "compare", lambda *_, **__: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "usage: script" in capsys.readouterr().out


def test_a_roofline_needs_results_with_ceilings(tmp_path):
    with pytest.raises(SystemExit, match=r"has no norm\*.json or attention\*.json"):
        roofline.draw(tmp_path)
    write_results(tmp_path)
    with pytest.raises(SystemExit, match=r"attention.json has no ceilings matmul GFLOP/s: run its benchmark again"):
        roofline.draw(tmp_path)


def test_all_aims_met(tmp_path):
    small = NORM | {"T": 8, "ras_fast µs": 3.0, "MB": 0.27, "compile µs": 5.0}
    write_results(tmp_path, norm=[NORM, small])
    assert {verdict for verdict, _, _ in verdicts(tmp_path).values()} == {"PASS"}
    text, missed = aims.table(tmp_path)
    assert not missed
    assert len(text.splitlines()) == len(aims.AIMS)


MISSES = [
    ("norm: share of copy, T, d ≥ 4096", {"norm": [NORM, NORM | {"d": 8192, "share": 0.8}]}, "0.800", "d 8192"),
    ("norm: over the best peer, any size", {"norm": [NORM | {"T": 1, "compile µs": 50.0, "eager µs": 90.0}]}, "1.200", "T 1 "),
    ("norm: over empty kernel + bytes, T ≤ 64", {"norm": [NORM | {"T": 8, "MB": 0.0, "ras_fast µs": 6.0}]}, "2.000", "T 8 "),
    ("norm: steering all rows, T ≥ 4096", {"norm": [NORM | {"steer all µs": 66.0}]}, "1.100", "T 8192"),
    ("selected rows: over best SDPA, N ≥ 1k", {"attention": [SELECTED, SELECTED | {"over floor": 1.5}]}, "1.500", "rows 64"),
    ("all rows: fused over itself without mass", {"attention": [EVERY | {"triton fused µs": 580.0}]}, "2.000", "rows 4096"),
    ("all rows: over the best that gives masses", {"attention": [EVERY | {"flex µs": 150.0}]}, "2.000", "rows 4096"),
    ("decode: share of copy, batch ≥ 8", {"attention": [DECODE | {"share": 0.5}]}, "0.500", "B 8"),
    ("decode: a range over SDPA under a mask", {"attention": [DECODE | {"range, no mass µs": 180.0}]}, "2.000", "B 8"),
    ("Hopper prefill: best SDPA over it, 4k–16k", {"attention": [EVERY | {"hopper µs": 390.0}]}, "0.500", "D 128"),
    ("AutoSteer: a plain decode step, gate off, %", {"autosteer": [AUTOSTEER | {"off, %": 4.0}]}, "4.000", "B 8"),
]


@pytest.mark.parametrize(("text", "results", "worst", "where"), MISSES)
def test_a_miss_shows_its_worst_case_and_where(tmp_path, text, results, worst, where):
    write_results(tmp_path, **results)
    verdict, value, place = verdicts(tmp_path)[text]
    assert (verdict, value) == ("miss", worst)
    assert where in place
    assert aims.table(tmp_path)[1]


def test_what_was_not_measured_is_neither_met_nor_missed(tmp_path):
    assert {verdict for verdict, _, _ in verdicts(tmp_path).values()} == {"not measured"}
    without = {"norm": [{key: value for key, value in NORM.items() if key != "graph"}],  # as on a CPU
               "attention": [{key: value for key, value in EVERY.items() if "hopper" not in key}]}  # fmt: skip
    write_results(tmp_path, **without)
    assert verdicts(tmp_path)["norm: steering all rows, T ≥ 4096"][0] == "not measured"
    assert verdicts(tmp_path)["Hopper prefill: best SDPA over it, 4k–16k"][0] == "not measured"
    assert verdicts(tmp_path)["decode: over itself without mass"][0] == "not measured"


def test_figures_can_be_saved_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness._commit() == ""


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","us","%","register/thread","inst","inst"
"0","void ras::cuda::add_norm<__nv_bfloat16, (int)16, (bool)1>(ras::cuda::NormArgs<T1>)","1,062.50","91.25","56","12.5","1.5"
"1","_attention_kernel","350","8","242","0.5","2"
"""  # noqa: E501


def test_a_line_a_profiled_kernel(tmp_path, capsys):
    (tmp_path / "ncu.csv").write_text(NCU)
    ncu_table.main(str(tmp_path / "ncu.csv"))
    norm, attention = capsys.readouterr().out.splitlines()
    assert norm.startswith("add_norm<__nv_bfloat16, 16, 1>")
    assert "µs 1062 " in norm
    assert "DRAM % 91.2" in norm
    assert "tensor % ?" in norm
    assert norm.endswith("stalls: long_scoreboard 12.5, wait 1.5")
    assert attention.startswith("_attention_kernel ")


PYTHON = """#!/bin/bash
# Stands for a Python whose torch has a GPU.
case "$*" in
  *get_device_capability*) echo 90a; exit "${NO_GPU:-0}" ;;
  *"import xdist"*) exit 1 ;;
  *"ras_fast.cli build"*) touch built; echo "ran: $*, arch $RAS_FAST_CUDA_ARCHS" ;;
  *"import ras_fast"*) [ -e built ] ;;
  *"-k hopper"*) echo "ran: $*"; exit "${HOPPER:-0}" ;;
  *profile_targets*) echo "ran: $*" ;;
  *bench_norm*) mkdir -p bench/results/gpu && cp "$NORM" bench/results/gpu/norm.json ;;
  *"bench_engine.py --gpu --tokens"*) echo "it broke: $*"; exit 3 ;;
  *bench_attention*) echo "a partial line: $*"; exec sleep 60 ;;
  bench/aims.py*) exec "$REAL_PYTHON" bench/aims.py gpu ;;
  bench/ncu_table.py*) exec "$REAL_PYTHON" "$@" ;;
  *) echo "ran: $*, arch $RAS_FAST_CUDA_ARCHS" ;;
esac
"""
TOOLS = {
    "nvidia-smi": "echo NVIDIA H200",
    "nvcc": "echo release 13.0",
    "compute-sanitizer": 'echo "checked: $*"; echo "ERROR SUMMARY: 0 errors"',
    "ncu": 'case "$*" in *--import*) cat "$NCU" ;; *) echo "$*"; touch bench/results/logs/ncu.ncu-rep ;; esac',
}


@pytest.fixture
def tree(tmp_path):
    """A checkout in small, and the environment of a machine with a GPU."""
    for name in ("gpu.sh", "aims.py", "harness.py", "ncu_table.py"):
        (tmp_path / "bench").mkdir(exist_ok=True)
        shutil.copy(BENCH / name, tmp_path / "bench")
    (tmp_path / "ras_fast").mkdir()
    (tmp_path / "triton_kernels").mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {"python": PYTHON, **{name: f"#!/bin/bash\n{body}\n" for name, body in TOOLS.items()}}.items():
        (tools / name).write_text(body)
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    write_results(tmp_path / "made_up")
    (tmp_path / "ncu.csv").write_text(NCU)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "REAL_PYTHON": sys.executable,
        "NORM": str(tmp_path / "made_up/norm.json"), "NCU": str(tmp_path / "ncu.csv"), "OUT": str(tmp_path / "out"),
    }  # fmt: skip
    for name in ("RAS_FAST_CUDA_ARCHS", "PYTHONSAFEPATH"):  # the latter hides a script's neighbours
        environment.pop(name, None)
    return tmp_path, environment


def run(tree, *arguments, **variables):
    folder, environment = tree
    command = ["bash", folder / "bench/gpu.sh", *arguments]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    return done, folder / "out"


def test_tests_part(tree):
    done, out = run(tree, "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (out / "summary.txt").read_text()
    assert [line.split()[:2] for line in summary.splitlines()[:7]] == [
        [name, "ok"] for name in ("facts", "build", "backends", "hopper", "tests", "memcheck", "racecheck")
    ]
    assert "not measured" in summary
    assert "arch 90a" in (tree[0] / "bench/results/logs/build.log").read_text()


def test_libraries_that_were_brought_along_are_not_built_again(tree):
    (tree[0] / "built").touch()
    done, out = run(tree, "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build" not in (out / "summary.txt").read_text()


@pytest.mark.slow
def test_it_keeps_what_it_has(tree):
    """A section out of time and one that fails: both are named, the figures of the others come back, the aims are judged."""
    done, out = run(tree, "all", LIMIT="27")
    left = ["crossovers", "gated_linear", "towers", "image_masks", "autosteer", "decode", "qwen", "roofline", "ncu", "tune"]
    assert done.returncode == 2 + len(left), done.stdout + done.stderr
    verdicts = (out / "summary.txt").read_text().split("== aims")[0].splitlines()
    assert [line.split()[1] for line in verdicts[:12]] == [*["ok"] * 10, "FAILED", "FAILED"]
    assert [line.split()[:2] for line in verdicts[12:]] == [[name, "skipped:"] for name in left]
    assert "(status 3)" in verdicts[10]
    assert "(status 124, time limit)" in verdicts[11]
    assert "it broke" in done.stdout
    assert "norm: share of copy, T, d ≥ 4096             ≥ 0.9     0.950  PASS" in done.stdout
    assert len(list(out.iterdir())) == 2
    with tarfile.open(out / "results-all.tar.gz") as archive:
        names = archive.getnames()
    assert {"bench/results/gpu/norm.json", "bench/results/logs/attention.log", "bench/results/logs/tables.txt"} <= set(names)


def test_profile_part(tree):
    done, _ = run(tree, "profile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "add_norm<__nv_bfloat16, 16, 1>" in done.stdout
    assert "bench --tune --out" in (tree[0] / "bench/results/logs/tune.log").read_text()


@pytest.mark.parametrize(("status", "hopper"), [pytest.param(0, " hopper", marks=pytest.mark.slow), (1, "")])
def test_a_kernel_that_fails_its_tests_is_left_out(tree, status, hopper):
    logs = tree[0] / "bench/results/logs"
    for part, log, script in (("profile", "ncu", "profile_targets"), ("tests", "racecheck", "small_shapes")):
        done, _ = run(tree, part, HOPPER=str(status))
        assert done.returncode == status
        assert f"{script}.py norm attention rotary linear cache{hopper}\n" in (logs / f"{log}.log").read_text()


@pytest.mark.slow
def test_neither_of_its_candidates_is_timed_then(tree):
    run(tree, "bench", LIMIT="27", HOPPER="1")
    assert "--without hopper hopper no mass\n" in (tree[0] / "bench/results/logs/attention.log").read_text()


def test_no_script_has_a_neighbour_that_hides_the_standard_library():
    """Python puts the folder of a script before everything else: beside ras_fast/inspect.py nothing would start."""
    scripts = set(re.findall(r'"\$python" ([\w/]+\.py)', (BENCH / "gpu.sh").read_text()))
    assert len(scripts) > 5
    for folder in {(BENCH.parent / script).parent for script in scripts}:
        assert not {path.stem for path in folder.glob("*.py")} & sys.stdlib_module_names


def test_without_a_gpu_it_says_so_at_once(tree):
    done, out = run(tree, "tests", NO_GPU="1")
    assert done.returncode == 1
    assert "no torch that sees a GPU" in (out / "summary.txt").read_text()


def test_an_unknown_part_is_refused(tree):
    done, _ = run(tree, "everything")
    assert done.returncode == 2
    assert "bench/gpu.sh [all|tests|bench|profile]" in done.stdout
