"""Tuned launch configurations: the file, who reads it, and how the tuner chooses. No GPU: times are made up."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ras_fast import cli, tune

tuned = pytest.importorskip("ras_fast.triton_kernels.tuned")
attention = pytest.importorskip("ras_fast.triton_kernels.attention")
norm = pytest.importorskip("ras_fast.triton_kernels.norm")
device = pytest.importorskip("ras_fast.triton_kernels.device")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREFILL = tuned.ShapeClass("prefill", 90, 2, 128, "plain")
TILE = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}


def entry(wanted=PREFILL, **changes):
    facts = {"us": 90.0, "default_us": 100.0, "shape": "B1", "device": "none", "torch": "2", "triton": "3"}
    return wanted._asdict() | {"config": TILE} | facts | changes


def written(path, *entries):
    path.write_text(json.dumps({"entries": entries}))
    return path


@pytest.fixture
def empty_table(monkeypatch):
    """What the launchers read, without entries."""
    table = {}
    monkeypatch.setattr(tuned, "table", lambda: table)
    return table


@pytest.mark.parametrize("error", ["OutOfResources(1, 0, 'shared memory')", "PTXASError('too few registers')"])
def test_a_configuration_that_cannot_be_had_drops_out(monkeypatch, empty_table, error):
    def problem(wanted):
        raise eval(error, vars(pytest.importorskip("triton.runtime.errors")))

    monkeypatch.setattr(tune, "problem", problem)
    assert not tune._runs(PREFILL, TILE)


def test_a_configuration_that_computes_something_else_is_not_timed(monkeypatch, empty_table):
    """As Triton 3.6 did on sm_90 with tiles of 64 × 16 and 8 warps."""
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: 0.1)
    exact = torch.tensor([1.0, -3.0, -torch.inf]), torch.zeros(0), None
    wrong = {32: 0.0, 64: 0.01, 128: 0.2, 16: torch.nan}

    def call():
        return exact[0] + torch.tensor([0.0, wrong[empty_table[PREFILL]["block_n"]], 0.0]), *exact[1:]

    class Pool:
        map = staticmethod(lambda run, *columns: [True] * len(columns[0]))

    times = tune._microseconds(PREFILL, [TILE | {"block_n": n} for n in wrong], call, Pool)
    assert times == [100.0, 100.0, None, None]


def test_the_shipped_file_is_read():
    """It has no entries yet: reading it, which checks its form, is the test until it has."""
    for shipped in tuned.read(tuned.FILE):
        assert shipped["us"] <= shipped["default_us"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "'entries' is missing"),
        (json.dumps({"entries": [{"kernel": "prefill"}]}), "entry 1 lacks 'arch'"),
        (json.dumps({"entries": [entry(kernel="gemm")]}), "entry 1 is of kernel 'gemm'"),
        (json.dumps({"entries": [entry(config={"num_warps": 4})]}), "prefill needs .*'block_m'"),
        (json.dumps({"entries": [entry(config=TILE | {"num_warps": 4.5})]}), "positive integer"),
        (json.dumps({"entries": [entry(), entry()]}), "entry 2 repeats"),
    ],
)
def test_a_broken_file_says_where_and_what_mends_it(tmp_path, text, message):
    path = tmp_path / "configs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"configs.json: .*{message}.*ras-fast bench --tune"):
        tuned.read(path)


def test_a_missing_file_is_no_excuse(tmp_path):
    with pytest.raises(ValueError, match="ras-fast bench --tune"):
        tuned.read(tmp_path / "none.json")


def test_an_entry_decides_for_its_class_alone(empty_table):
    empty_table[PREFILL] = TILE
    assert attention.config(PREFILL) == attention.Config(64, 32, 4, 2)
    for other in (PREFILL._replace(arch=86), PREFILL._replace(variant="every"), PREFILL._replace(size=64)):
        assert attention.config(other) == attention.rule(other)


def test_unknown_architectures_take_the_rule(empty_table):
    assert attention.config(PREFILL._replace(arch=999)) == attention.rule(PREFILL._replace(arch=80))
    assert norm.config(norm.shape_class(999, 2, 4096)).num_warps == 8


class Launched(Exception):
    pass


def launched_with(monkeypatch, module, kernel, call):
    """The keywords with which `call` launches `kernel`."""

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **options):
                raise Launched(options)

            return launch

    monkeypatch.setattr(module, kernel, Kernel())
    with pytest.raises(Launched) as caught:
        call()
    return caught.value.args[0]


MASKS = (0.1, True, None, None, 0, 0.0)


def states(rows, keys=256, heads=4, dim=80):
    query, key = torch.zeros(1, heads, rows, dim).bfloat16(), torch.zeros(1, 2, keys, dim).bfloat16()
    return query, key, torch.zeros(1, heads, rows), torch.zeros(1, keys, dtype=torch.int32)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("kernel", ["prefill", "decode", "mass", "keys"])
def test_attention_launchers_honour_an_entry(empty_table, monkeypatch, kernel, softcap):
    query, key, lse, ids = states(1 if kernel == "decode" else 200)
    masks = (*MASKS[:5], softcap)
    calls = {
        "mass": ("_selected_rows_kernel", lambda: attention.region_mass(query, key, lse, ids, 1, *masks, None, 64)),
        "keys": ("_key_attention_kernel", lambda: attention.key_attention(query, key, lse, 200, "mean", None, *masks, None)),
    }
    attend = "_attention_kernel", lambda: attention.region_attention(query, key, key, ids, 1, *masks, None, None, 1)
    variant = "every" if softcap else "plain"
    config = {field: TILE[field] for field in tuned.FIELDS[kernel]}
    empty_table[tuned.ShapeClass(kernel, 90, 2, 128, variant)] = config
    options = launched_with(monkeypatch, attention, *calls.get(kernel, attend))
    assert {field: options[field if field.startswith("num") else field.upper()] for field in config} == config


@pytest.mark.parametrize("steered", [False, True])
def test_the_norm_launcher_honours_an_entry(empty_table, monkeypatch, steered):
    x = torch.zeros(2, 600).bfloat16()
    steering = (torch.zeros(1, 600), torch.zeros(2, dtype=torch.int32), torch.zeros(2)) if steered else (None, None, None)
    empty_table[norm.shape_class(90, 2, 600)] = {"num_warps": 2, "maxnreg": 96}
    options = launched_with(
        monkeypatch, norm, "add_norm_kernel",
        lambda: norm.add_rms_norm(x, x, x[0], 1e-6, *steering, False, 0.0, True, None),
    )  # fmt: skip
    assert (options["BLOCK"], options["num_warps"], options["maxnreg"]) == (1024, 2, 96)


def test_every_class_has_a_call_that_its_launcher_takes(monkeypatch):
    """What is timed, up to the launch: on a CPU, with kernels that compute nothing."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(options)

    monkeypatch.setattr(tune, "DEVICE", "cpu")
    for module in (attention, norm):
        for name in [name for name, value in vars(module).items() if hasattr(value, "fn") and hasattr(value, "arg_names")]:
            monkeypatch.setattr(module, name, Kernel())
    for wanted in tune.shape_classes(90):
        launches.clear()
        _, call = tune.problem(wanted)
        call()
        assert launches, wanted


def test_results_do_not_depend_on_the_configuration(empty_table):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 64, device=DEVICE) for heads in (2, 1, 1))
    ids = (torch.arange(40, dtype=torch.int32, device=DEVICE) // 15)[None]
    call = lambda: attention.region_attention(query, key, value, ids, 3, *MASKS, None, None, 40)  # noqa: E731
    expected = call()
    arch, _ = device.device_facts(query.device)
    wanted = tuned.ShapeClass("prefill", arch, 4, 64, "plain")
    empty_table[wanted] = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1}
    for actual, before in zip(call(), expected, strict=True):
        torch.testing.assert_close(actual, before, atol=1e-5, rtol=1e-5)


CONFIGS = [{"n": i} for i in range(4)]


@pytest.mark.parametrize(
    ("times", "spilling", "chosen"),
    [
        ([100, 90, 80, None], [], 2),
        ([100, 90, 80, 70], [3], 2),
        ([100, 90, 80, 70], [1, 2, 3], 0),
        ([100, 99, 98.5, None], [], 0),  # within the noise
        ([100, None, None, None], [], 0),
    ],
)
def test_the_fastest_that_does_not_spill_and_beats_the_noise(times, spilling, chosen):
    config, us, default_us = tune.select(CONFIGS, times, lambda config: config["n"] in spilling)
    assert (config, us, default_us) == (CONFIGS[chosen], times[chosen], 100)


def test_a_rule_that_does_not_run_is_an_error():
    with pytest.raises(ValueError, match="does not run"):
        tune.select(CONFIGS, [None, 1.0, 1.0, 1.0], lambda config: False)


def test_candidates_start_with_the_rule_and_repeat_nothing():
    classes = tune.shape_classes(90)
    assert {wanted.kernel for wanted in classes} == set(tuned.FIELDS)
    for wanted in classes:
        found = tune.candidates(wanted)
        assert len({str(config) for config in found}) == len(found) > 3
        assert all(set(config) == set(tuned.FIELDS[wanted.kernel]) for config in found)
        kernels = norm if wanted.kernel == "norm" else attention
        assert kernels.config(wanted)._asdict().items() >= found[0].items() or wanted in tuned.table()


def test_every_class_that_is_tuned_is_inspected():
    cases = [case["shape_class"] for case in (*attention.aot_cases(90), *norm.aot_cases(90))]
    assert set(tune.shape_classes(90)) <= set(cases)


def test_a_trial_ends(empty_table):
    empty_table[PREFILL] = TILE
    with tune.trial(PREFILL, TILE | {"num_warps": 8}):
        assert attention.config(PREFILL).num_warps == 8
    assert empty_table == {PREFILL: TILE}
    with tune.trial(PREFILL._replace(size=64), TILE):
        pass
    assert empty_table == {PREFILL: TILE}


def test_writing_replaces_a_class_and_keeps_the_others(tmp_path):
    other = entry(PREFILL._replace(size=64))
    path = written(tmp_path / "configs.json", entry(), other)
    tune.write(path, [entry(us=70.0)])
    found = {tuned.shape_class(each): each for each in tuned.read(path)}
    assert found == {PREFILL: entry(us=70.0), tuned.shape_class(other): other}
    tune.write(tmp_path / "new.json", [other])
    assert tuned.read(tmp_path / "new.json") == [other]


CUT = '{\n "entries": [\n  {"kernel": "no'


def test_a_broken_file_stops_no_kernel(tmp_path, monkeypatch):
    path = tmp_path / "configs.json"
    path.write_text(CUT)
    monkeypatch.setattr(tuned, "FILE", path)
    monkeypatch.setattr(tuned, "table", tuned.table.__wrapped__)
    with pytest.warns(UserWarning, match=r"configs\.json: Unterminated string.*ras-fast bench --tune"):
        assert attention.config(PREFILL) == attention.rule(PREFILL)


def test_tuning_mends_a_broken_file(tmp_path, monkeypatch):
    path = tmp_path / "configs.json"
    path.write_text(CUT)
    monkeypatch.setattr(tune, "tune", lambda match, trying: iter([entry()]))
    with pytest.warns(UserWarning, match=r"configs\.json: Unterminated string"):
        assert cli.main(["bench", "--tune", "--out", str(path)]) == 0
    assert tuned.read(path) == [entry()]


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path, monkeypatch):
    path = written(tmp_path / "configs.json", entry())
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.write(path, [entry(us=70.0)])
    with pytest.raises(ValueError, match="positive integer"):
        tune.write(path, [entry(config=TILE | {"num_warps": -4})])
    assert tuned.read(path) == [entry()]


def test_the_command_needs_a_gpu(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["bench", "--tune"]) == 1
    error = capsys.readouterr().err
    assert "on a CUDA GPU: torch sees no CUDA device" in error
    assert "TRITON_INTERPRET" not in error  # which it refuses, too


def test_the_command_writes_as_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "tune", lambda match, trying: iter([entry(), entry(PREFILL._replace(size=64))]))
    assert cli.main(["bench", "--tune", "--out", str(tmp_path / "mine.json")]) == 0
    assert len(tuned.read(tmp_path / "mine.json")) == 2
    assert "prefill 128 plain" in capsys.readouterr().out
    assert cli.main(["bench", "--out", str(tmp_path / "none.json")]) == 0
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_a_spill_is_noticed_and_no_shipped_entry_has_one():
    """No entry is shipped yet: until one is, only the configuration that is made to spill is compiled."""
    script = (
        "from ras_fast import tune; from ras_fast.triton_kernels import tuned\n"
        "for entry in tuned.read(tuned.FILE):\n"
        "    assert not tune.spills(tuned.shape_class(entry), entry['config']), entry\n"
        "wanted = tuned.ShapeClass('norm', 90, 2, 16384, 'every')\n"
        "assert tune.spills(wanted, {'num_warps': 4, 'maxnreg': 32})\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
