"""The Triton attention kernels, compiled ahead of time: they fit into registers, use tensor cores and overlap their loads."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compiled(match, *archs):
    """What `ras-fast inspect` reads off the kernels whose name contains `match`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = [option for arch in archs for option in ("--arch", str(arch))]
    command = [sys.executable, "-m", "ras_fast.inspect", "triton", "--json", "--match", match, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_decode_loads_ahead_and_uses_tensor_cores():
    [facts] = compiled("decode[D=64, plain]", 90)
    assert facts["tensor_core"] > 0
    assert facts["wide_loads"] > 0
    one_stage = 64 * 64 * 2 * 2  # a block of keys and values
    assert facts["shared_bytes"] >= 2 * one_stage, "the loop is not pipelined; does it hold a barrier?"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_no_default_configuration_spills(arch):
    """The inspector's exit status says so; `compiled` asserts it."""
    for kind in ("prefill", "decode[", "region_mass", "key_attention", "merge"):
        assert compiled(kind, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_prefill_loads_ahead_with_mass(arch):
    for dim, stage in ((64, 64 * 64 * 2 * 2), (128, 32 * 128 * 2 * 2)):
        [facts] = compiled(f"prefill[D={dim}, plain]", arch)
        assert facts["shared_bytes"] >= 2 * stage
