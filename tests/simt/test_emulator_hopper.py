"""The emulation of Hopper's asynchronous instructions finds planted mistakes, and nothing without them (planted_hopper.cpp)."""

import ctypes

import numpy as np
import pytest

FAULTS = {  # in the order of enum Fault: what is planted, and what the emulator says; None: the result is wrong
    "none": "",
    "no wait for a copy": "no copy has written|without having waited for the copy",
    "a wait for the wrong parity": "no copy has written|without having waited for the copy",
    "a tile released before the product is over": "in flight reads|before warp 4 said it has read it",
    "a tile never released": "mbarrier 2, phase 0: 4 arrivals and 0 bytes never come",
    "a tile overwritten without a wait": "gets one more in the same phase|another copy is still on its way",
    "no wgmma_wait": None,
    "no wgmma_fence": "touched since the last wgmma_fence",
    "no commit": None,
    "too few bytes expected": "bytes never come",
    "too many bytes expected": "bytes never come",
    "barriers not shown to the copy engine": "mbarrier_init_fence is missing",
    "no barrier after the initialisation": "nobody has initialised|no barrier after its initialisation",
    "a wrong group stride": None,
    "a descriptor without swizzle": "only 128-byte swizzle",
    "a tile at a multiple of 512 bytes": "it needs a multiple of 1024",
    "a turn that nobody else takes": "named barrier 1 is reached by 128 of 256",
    "a variable read without a wait": "hazard: a .* no barrier in between|before anyone wrote it",
    "a variable written behind the arrival": "hazard: a .* no barrier in between|before anyone wrote it",
}


def run(emulator, fault, columns=64):
    rng = np.random.default_rng(fault)
    a, b, c = (rng.standard_normal((60, columns)).astype(np.float16) for _ in range(3))
    out = np.full((64, 64), np.nan, np.float32)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (a, b, c, out))
    emulator.run("planted_hopper_run", fault, *pointers, columns, inputs={"a": a, "b": b, "c": c}, outputs={"out": out})
    expected = np.zeros((64, 64))
    expected[:60, :60] = a.astype(np.float64) @ (b.astype(np.float64) + c).T
    return out, expected


@pytest.fixture
def emulator(load_emulator):
    return load_emulator("planted_hopper")


@pytest.mark.parametrize("columns", [64, 56])
def test_right_kernel_passes(emulator, columns):
    """Rows, and columns, outside the tensor arrive as zeros."""
    out, expected = run(emulator, 0, columns)
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("fault", list(FAULTS)[1:])
def test_planted_mistake_is_found(emulator, fault):
    said = FAULTS[fault]
    if said is not None:
        with pytest.raises(AssertionError, match=said):
            run(emulator, list(FAULTS).index(fault))
        return
    out, expected = run(emulator, list(FAULTS).index(fault))
    assert not np.allclose(out, expected, atol=1e-2)


def test_a_map_that_the_driver_would_refuse(emulator):
    """Rows of 60 elements do not begin at multiples of 16 bytes."""
    with pytest.raises(AssertionError):
        run(emulator, 0, 60)
