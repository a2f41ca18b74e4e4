"""The CUDA kernel that writes a cache (csrc/cuda/cache.cuh), run by the host emulation, beside plain indexing."""

import ctypes
from functools import partial

import caches
import pytest
import torch
from caches import inputs

POINTER, INT = ctypes.c_void_p, ctypes.c_int64
BITS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16


class Rows(ctypes.Structure):
    _fields_ = [("from", POINTER), ("to", POINTER), ("from_stride", INT * 3), ("to_stride", INT * 3), ("dim", INT)]


class Call(ctypes.Structure):
    """Mirrors struct Call of cache_simt.cpp."""

    _fields_ = [("key", Rows), ("value", Rows), ("slots", POINTER)] + [
        (name, INT) for name in ("slots_batch", "slots_token", "capacity", "heads", "batch", "tokens", "bytes", "width")
    ]


@pytest.fixture(scope="module")
def emulator(load_emulator):
    return load_emulator("cache_simt")


def rows(cache, new):
    strides = [(INT * 3)(*tensor.stride()[:3]) for tensor in (new, cache)]
    return Rows(new.data_ptr(), cache.data_ptr(), *strides, new.shape[3])


def write(emulator, width, keys, values, slots, key, value):
    """width: elements that an access is to have."""
    bits = BITS[keys.element_size()]
    call = Call(rows(keys, key), rows(values, value), slots.data_ptr(), *slots.stride(), keys.shape[2], keys.shape[1],
                *slots.shape, keys.element_size())  # fmt: skip
    emulator.run(
        "cache_run", ctypes.byref(call),
        inputs={"key": key.view(bits).numpy(), "value": value.view(bits).numpy(), "slots": slots.numpy()},
        outputs={"keys": keys.view(bits).numpy(), "values": values.view(bits).numpy()},
    )  # fmt: skip
    assert call.width == width


def check(emulator, width, *given):
    caches.check(partial(write, emulator, width), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(128, 128), (64, 24), (20, 20), (1, 3)])
def test_sizes(emulator, dim, value_dim, dtype):
    wide = 16 // dtype.itemsize
    width = 1 if dim % wide or value_dim % wide else wide
    check(emulator, width, *inputs(2, 3, 9, 5, dim, dtype, value_dim))
    check(emulator, width, *inputs(1, 9, 4, 1, dim, dtype, value_dim))


def test_strides(emulator):
    keys, values, slots, key, value = inputs(4, 2, 9, 3, 16, torch.bfloat16)
    check(emulator, 8, keys[1:3], values[1:3], slots[1:3], key[1:3], value[1:3])
    check(emulator, 8, keys[:, :, 1:], values[:, :, 1:], slots[:1].clamp(max=7).expand(4, -1), key, value)
    joint = torch.randn(4, 3, 2 * 2 * 16 + 1).bfloat16()[..., 1:].view(4, 3, 2, 2, 16).permute(2, 0, 3, 1, 4)
    check(emulator, 1, keys, values, slots.T.contiguous().T, joint[0], joint[1])


def test_more_heads_than_a_block_has_threads_for(emulator):
    check(emulator, 8, *inputs(1, 40, 3, 2, 128, torch.float16))


def test_a_slot_outside_of_the_cache_is_dropped(emulator):
    keys, values, slots, key, value = inputs(1, 2, 5, 3, 8, torch.float32)
    before = keys.clone()
    slots[0] = torch.tensor([-1, 5, 2])
    write(emulator, 4, keys, values, slots, key, value)
    before[:, :, 2] = key[:, :, 2]
    assert torch.equal(keys, before)
