"""The emulator finds planted mistakes, and nothing in the same kernels without them (planted.cpp)."""

import ctypes

import numpy as np
import pytest

PLANTED = {
    0: ("a guard that lets one thread too many through", "out of bounds: read of 4 bytes at byte 228 of from"),
    1: ("no barrier between writing and reading shared memory", "hazard: a write of byte .* follows a read by thread 0"),
    2: ("no barrier between reading shared memory and writing it again", "hazard: a write of byte .* follows a read"),
    3: ("a shuffle called by lanes outside its mask", "mask 0x0000ffff reads lane 16, which is not in it"),
    4: ("a shuffle mask that names lanes which left", "mask 0xffffffff never sees lanes 16, 17"),
    5: ("a barrier that half of the block skips", "__syncthreads is reached by 32 of 64 threads"),
    6: ("shared memory read before it is written", "before anyone wrote it"),
    7: ("an array of one thread overrun by one", r"\(.*planted.cpp:\d+\)"),
}


def run(emulator, which, faulty):
    source = np.random.default_rng(which).standard_normal(64).astype(np.float32)
    source = source[: 64 - 7] if which == 0 else source
    result = np.full(source.shape, np.nan, np.float32)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (source, result))
    emulator.run("planted_run", which, int(faulty), *pointers, 64, inputs={"from": source}, outputs={"to": result})
    return source, result


@pytest.mark.parametrize("which", PLANTED, ids=[name for name, _ in PLANTED.values()])
def test_planted_mistake_is_found(load_emulator, which):
    with pytest.raises(AssertionError, match=PLANTED[which][1]):
        run(load_emulator("planted"), which, faulty=True)


@pytest.mark.parametrize("which", PLANTED, ids=[name for name, _ in PLANTED.values()])
def test_right_twin_passes(load_emulator, which):
    source, result = run(load_emulator("planted"), which, faulty=False)
    expected = {
        1: lambda: np.roll(source, -1),
        2: lambda: np.roll(source, -2),
        3: lambda: np.repeat(source.reshape(2, 32).sum(1), 32),
        4: lambda: np.where(np.arange(64) % 32 < 16, np.repeat(source.reshape(4, 16).sum(1), 16), np.nan),
        7: lambda: source * 6,
    }.get(which, lambda: source)()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
