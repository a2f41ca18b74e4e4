"""The CUDA rotary kernel (csrc/cuda/rotary.cuh), run by the host emulation, against Hugging Face's eager code, bit for bit."""

import ctypes

import pytest
import rotations
import torch
from rotations import inputs

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}  # numpy has no bfloat16
POINTER, INT = ctypes.c_void_p, ctypes.c_int64


class Heads(ctypes.Structure):
    _fields_ = [("data", POINTER), ("out", POINTER)] + [
        (name, INT) for name in ("batch_stride", "token_stride", "head_stride", "heads")
    ]


class Table(ctypes.Structure):
    _fields_ = [("data", POINTER), ("batch_stride", INT), ("token_stride", INT)]


class Call(ctypes.Structure):
    """Mirrors struct Call of rotary_simt.cpp."""

    _fields_ = [("query", Heads), ("key", Heads), ("cos", Table), ("sin", Table)] + [
        (name, INT) for name in ("batch", "length", "dim", "rotated", "dtype", "interleaved", "float_tables", "width")
    ]


@pytest.fixture(scope="module")
def rotary(load_emulator):
    return load_emulator("rotary_simt")


def heads_of(x, out):
    return Heads(x.data_ptr(), out.data_ptr(), x.stride(0), x.stride(2), x.stride(1), x.shape[1])


def table_of(table):
    return Table(table.data_ptr(), 0 if len(table) == 1 else table.stride(0), table.stride(1))


def check(emulator, query, key, cos, sin, width):
    """Both kinds of pairs. width: elements that an access is to have."""
    for interleaved in (False, True):
        check_pairs(emulator, query, key, cos, sin, interleaved, width)


def check_pairs(emulator, query, key, cos, sin, interleaved, width):
    dtype = query.dtype
    outputs = [torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), torch.nan, dtype=dtype) for x in (query, key)]
    call = Call(heads_of(query, outputs[0]), heads_of(key, outputs[1]), table_of(cos), table_of(sin), query.shape[0],
                query.shape[2], query.shape[3], cos.shape[-1], DTYPES[dtype], interleaved,
                cos.dtype == torch.float32)  # fmt: skip
    inputs = {"query": query, "key": key, "cos": cos, "sin": sin}
    emulator.run(
        "rotary_run", ctypes.byref(call), inputs={name: x.view(BITS[x.dtype]).numpy() for name, x in inputs.items()},
        outputs={name: x.view(BITS[dtype]).numpy() for name, x in zip(("query out", "key out"), outputs, strict=True)},
    )  # fmt: skip
    assert call.width == width
    rotations.check([output.transpose(1, 2) for output in outputs], query, key, cos, sin, interleaved)


def rand(*shape, dtype):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(2, 2), (14, 10), (16, 16), (80, 32), (128, 128), (256, 64)])
def test_whole_and_partial_rotations(rotary, dim, rotated, dtype):
    wide = 16 // dtype.itemsize
    width = wide if rotated // 2 % wide == 0 and dim % wide == 0 else 1
    check(rotary, *inputs(2, 6, 2, 3, dim, rotated, dtype, tables=2), width)
    check(rotary, *inputs(2, 3, 3, 1, dim, rotated, dtype, tables=1), width)
    check(rotary, *inputs(1, 3, 3, 2, dim, rotated, dtype, table_dtype=torch.float32), width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_start_at_16_bytes(rotary, dtype):
    query, key, cos, sin = inputs(2, 4, 2, 3, 64, 64, dtype, tables=2)
    joint, wide = rand(2, 3, 272, dtype=dtype), 16 // dtype.itemsize
    check(rotary, joint[..., :260].view(2, 3, 4, 65)[..., 1:].transpose(1, 2), key, cos, sin, 1)
    check(rotary, query, joint[..., 1:129].view(2, 3, 2, 64).transpose(1, 2), cos, sin, 1)
    check(rotary, query, key, rand(2, 3, 65, dtype=dtype)[..., :64], sin, 1)
    check(rotary, joint[..., :256].view(2, 3, 4, 64).transpose(1, 2), key, cos, sin, wide)
    check(rotary, query[:1].expand(3, -1, -1, -1), key[1:].expand(3, -1, -1, -1), cos[:1], sin[1:], wide)


def test_more_heads_than_a_block_has_threads_for(rotary):
    check(rotary, *inputs(1, 40, 8, 2, 128, 128, torch.bfloat16, tables=1), 8)


def test_what_is_not_finite_stays_in_its_pair(rotary):
    query, key, cos, sin = inputs(1, 2, 2, 2, 32, 16, torch.bfloat16, tables=1)
    query[0, 0, 1, 3], key[0, 1, 0, 12], key[0, 0, 0, 30] = torch.nan, torch.inf, -torch.nan
    check(rotary, query, key, cos, sin, 8)
