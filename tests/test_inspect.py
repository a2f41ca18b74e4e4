"""ras_fast.inspect: it sees a planted spill, counts wide loads, and its exit status says so."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from ras_fast import inspect

PROBE = """
import json, sys
from dataclasses import asdict
import triton
import triton.language as tl
from ras_fast import inspect

@triton.jit
def centre(source, target, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    row = tl.load(source + offsets, mask=offsets < n)
    tl.store(target + offsets, row - tl.sum(row), mask=offsets < n)

def case(block, warps):
    return {"name": f"centre {block}", "kernel": centre, "signature": {"source": "*fp32", "target": "*fp32", "n": "i32"},
            "constexprs": {"BLOCK": block}, "divisible_by_16": ["source", "target", "n"], "num_warps": warps, "num_stages": 1}

print(json.dumps([asdict(row) for row in inspect.compile_triton([case(1024, 4), case(16384, 1)], 90)]))
"""


def facts(**changes):
    row = {"kernel": "k", "arch": "sm_90a", "registers": 40, "stack_bytes": 0, "shared_bytes": 0, "local_accesses": 0,
           "tensor_core": 0, "loads": 4, "wide_loads": 4}  # fmt: skip
    return inspect.KernelFacts(**(row | changes))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A small kernel, and one that holds 16384 values in the registers of one warp, compiled without the interpreter."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = tmp_path_factory.mktemp("probe") / "probe.py"
    script.write_text(PROBE)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [inspect.KernelFacts(**row) for row in json.loads(done.stdout)]


def test_reads_registers_and_wide_loads(compiled):
    small, _ = compiled
    assert small.arch.startswith("sm_90")
    assert 0 < small.registers < 64
    assert small.loads == small.wide_loads == 2  # 1024 values by 128 threads
    assert not small.spills


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")
def test_names_tell_kernels_apart():
    """By all arguments of their templates, those of a type of ours among them; what a kernel is called with goes."""
    forms = {f"_ZN3ras4cuda8add_normI6__halfLb0ELi8ELNS0_8NormFormE{form}EEEvNS0_8NormArgsIT_EE": form for form in (1, 2)}
    expected = {name: f"add_norm<half, false, 8, (NormForm){form}>" for name, form in forms.items()}
    assert inspect._demangle([*forms, "_Z5plainPf"]) == expected | {"_Z5plainPf": "plain"}


def test_finds_a_planted_spill(compiled):
    _, large = compiled
    assert large.local_accesses > 0
    assert large.stack_bytes > 0
    assert large.spills


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"local_accesses": 3}, 1), ({"stack_bytes": 8}, 1)])
def test_exit_status_says_whether_a_kernel_spills(monkeypatch, capsys, changes, status):
    monkeypatch.setattr(inspect, "inspect_cuda", lambda **_: [facts(), facts(kernel="other", **changes)])
    assert inspect.main(["cuda"]) == status
    output = capsys.readouterr().out
    assert ("SPILLS" in output) == bool(status)
    assert len(output.splitlines()) == 3


@pytest.mark.parametrize("spilling", [None, "cuda", "triton"])
def test_both_kinds_are_read_unless_one_is_named(monkeypatch, capsys, spilling):
    for kind in ("cuda", "triton"):
        found = facts(kernel=kind, local_accesses=3 if kind == spilling else 0)
        monkeypatch.setattr(inspect, f"inspect_{kind}", lambda *_, found=found, **__: [found])
    assert inspect.main([]) == (0 if spilling is None else 1)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_nothing_found_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(inspect, "inspect_cuda", lambda **_: [])
    assert inspect.main(["cuda", "--match", "nrom"]) == 2
    assert "'nrom'" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["foo", "sm_90", "90b"])
def test_what_is_no_compute_capability_is_refused(capsys, arch):
    with pytest.raises(SystemExit) as stopped:
        inspect.main(["triton", "--arch", arch])
    assert stopped.value.code == 2
    assert f"argument --arch: '{arch}' is not a compute capability such as 90 or 90a" in capsys.readouterr().err


def test_an_architecture_that_the_library_lacks_is_named_beside_those_that_it_has(monkeypatch, tmp_path):
    library = tmp_path / "library.so"
    library.touch()
    kernels = [facts(arch="sm_80"), facts(), facts(kernel="other")]
    monkeypatch.setattr(inspect, "_resources", lambda path: {(row.arch, row.kernel): {} for row in kernels})
    monkeypatch.setattr(inspect, "read_binary", lambda path, arch: [row for row in kernels if row.arch == arch])
    with pytest.raises(inspect.InspectError, match=r"--arch is 75; library.so has kernels for 80, 90a$"):
        inspect.inspect_cuda(library, ["75"])
    assert inspect.inspect_cuda(library, ["75", "90a"], "other") == [facts(kernel="other")]


def test_json_has_every_field(monkeypatch, capsys):
    monkeypatch.setattr(inspect, "inspect_cuda", lambda **_: [facts()])
    assert inspect.main(["cuda", "--json"]) == 0
    assert inspect.KernelFacts(**json.loads(capsys.readouterr().out)[0]) == facts()


def test_missing_library_names_the_command_that_builds_it(monkeypatch, tmp_path, capsys):
    with pytest.raises(inspect.InspectError, match="ras-fast build"):
        inspect.inspect_cuda(tmp_path / "none.so")
    monkeypatch.setattr(inspect, "CUDA_LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(inspect.inspect_cuda, "__defaults__", (tmp_path / "none.so", (), ""))
    assert inspect.main(["cuda"]) == 2
    assert "ras-fast build" in capsys.readouterr().err


def test_interpreter_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(inspect.InspectError, match="unset it"):
        inspect.inspect_triton([90])


def _dies(arch, match):
    os._exit(1)


def test_an_architecture_that_triton_dies_of_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(inspect, "triton_is_installed", lambda: True)
    monkeypatch.setattr(inspect, "_inspect_arch", _dies)
    with pytest.raises(inspect.InspectError, match="--arch is 42; Triton's compiler died of it"):
        inspect.inspect_triton([42])
