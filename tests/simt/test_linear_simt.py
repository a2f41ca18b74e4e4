"""The CUDA linear kernel (csrc/cuda/linear.cuh), run by the host emulation, against float64."""

import ctypes
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

POINTERS = ("x", "weight", "up", "bias", "out")
INTEGERS = ("group_stride", "row_stride", "weight_stride", "up_stride", "rows", "group", "inputs", "outputs", "activation",
            "half", "multiprocessors", "blocks", "aligned")  # fmt: skip
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2}
DTYPES = [torch.float16, torch.bfloat16]


class Call(ctypes.Structure):
    """Mirrors struct Call of linear_simt.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in INTEGERS]


@pytest.fixture(scope="module")
def emulator(load_emulator):
    return load_emulator("linear_simt")


def rand(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def inputs(rows, width, outputs, dtype):
    return rand(rows, width, dtype=dtype), rand(outputs, width, dtype=dtype, scale=width**-0.5), rand(outputs, dtype=dtype)


def run(emulator, x, weight, bias, up=None, activation="none", *, multiprocessors=100, wide=False, aligned=True):
    """x [rows, K] or [groups, rows, K]; wide: whether a block is to have 32 outputs."""
    rows, outputs = x.numel() // x.shape[-1], len(weight)
    out = torch.full((rows, outputs), torch.nan, dtype=x.dtype)
    group = x.shape[-2] if x.dim() == 3 else rows
    optional = {"up": up, "bias": bias}
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in optional.values()]
    call = Call(x.data_ptr(), weight.data_ptr(), *pointers, out.data_ptr(), x.stride(0) if x.dim() == 3 else 0, x.stride(-2),
                weight.stride(0), 0 if up is None else up.stride(0), rows, group, x.shape[-1], outputs, ACTIVATIONS[activation],
                x.dtype == torch.float16, multiprocessors)  # fmt: skip
    given = {"x": x, "weight": weight} | {name: tensor for name, tensor in optional.items() if tensor is not None}
    emulator.run("linear_run", ctypes.byref(call), outputs={"out": out.view(torch.int16).numpy()},
                 inputs={name: tensor.view(torch.int16).numpy() for name, tensor in given.items()})  # fmt: skip
    assert call.aligned == aligned
    assert call.blocks == -(-outputs // (32 if wide else 16))
    return out


def check(emulator, x, weight, bias, **options):
    got = run(emulator, x, weight, bias, **options)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double()).view(got.shape)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=eps / 2 + 1e-5)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 8, 1), (3, 1096, 33), (16, 520, 16), (19, 264, 17), (4, 65, 20)])
def test_gated(emulator, rows, width, outputs, dtype):
    x, gate, _ = inputs(rows, width, outputs, dtype)
    up = inputs(rows, width + 8, outputs, dtype)[1][:, :width]
    products = [linear(x.double(), weight.double()).to(dtype) for weight in (gate, up)]
    for activation, function in (("silu", silu), ("gelu_tanh", partial(gelu, approximate="tanh"))):
        got = run(emulator, x, gate, None, up, activation, aligned=width % 8 == 0)
        exact, eps = function(products[0].double()) * products[1].double(), torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), exact, atol=2 * eps, rtol=3 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16])
def test_rows(emulator, rows, dtype):
    x, weight, bias = inputs(rows, 1088, 40, dtype)
    check(emulator, x, weight, bias)
    check(emulator, x, weight, None, multiprocessors=0, wide=rows > 4)


@pytest.mark.parametrize("width", [8, 24, 512, 520, 1024, 1544, 2560])
@pytest.mark.parametrize("wide", [False, True])
def test_widths(emulator, width, wide):
    """Fewer columns than one run of the first warp, none for some warps, one, two and more for all."""
    x, weight, bias = inputs(5, width, 17, torch.bfloat16)
    check(emulator, x, weight, bias, multiprocessors=0 if wide else 100, wide=wide)


@pytest.mark.parametrize("outputs", [1, 15, 16, 33])
def test_outputs(emulator, outputs):
    check(emulator, *inputs(2, 264, outputs, torch.float16))
    check(emulator, *inputs(11, 264, outputs, torch.float16), multiprocessors=0, wide=True)


def test_a_block_has_32_outputs_where_blocks_are_enough(emulator):
    """And rows, so that x is much of what is read."""
    for rows, few, enough in ((5, 127, 128), (8, 127, 128), (9, 47, 48)):
        check(emulator, *inputs(rows, 64, few, torch.bfloat16), multiprocessors=2)
        check(emulator, *inputs(rows, 64, enough, torch.bfloat16), multiprocessors=2, wide=True)
    check(emulator, *inputs(4, 64, 128, torch.bfloat16), multiprocessors=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_widths_and_rows_that_do_not_start_at_16_bytes(emulator, dtype):
    x, weight, bias = inputs(5, 130, 20, dtype)
    check(emulator, x[:, :127], weight[:, :127], bias, aligned=False)
    check(emulator, x[:, 1:129], weight[:, :128], bias, aligned=False)
    check(emulator, x[:, :128], weight[:, 2:], bias, aligned=False)
    check(emulator, *inputs(19, 65, 20, dtype), aligned=False)


def test_strides(emulator):
    """Every other row, the last rows of several sequences, rows that repeat."""
    x, weight, bias = rand(6, 5, 136, dtype=torch.bfloat16), *inputs(1, 128, 24, torch.bfloat16)[1:]
    check(emulator, x[:, 0, :128], weight, bias)
    check(emulator, x[:, -2:, 8:], weight, bias)
    check(emulator, x[:1, :1, :128].expand(3, 4, -1), weight, bias)
    check(emulator, x[0, :, :128], rand(24, 136, dtype=torch.bfloat16)[:, :128], bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_beside_any_others(emulator, dtype):
    """Whichever instance runs."""
    wide = {"multiprocessors": 0, "wide": True}
    for width in (1096, 1088 + 24):
        x, weight, bias = inputs(16, width, 33, dtype)
        wanted = check(emulator, x, weight, bias)
        assert torch.equal(run(emulator, x, weight, bias, **wide), wanted)
        for rows in (1, 3, 8, 11):
            assert torch.equal(run(emulator, x[:rows], weight, bias), wanted[:rows])
            own = wide if rows > 4 else {}
            assert torch.equal(run(emulator, x[-rows:], weight, bias, **own), wanted[-rows:])
    shifted = torch.cat([x.new_zeros(16, 1), x], 1)[:, 1:]
    assert torch.equal(run(emulator, shifted, weight, bias, aligned=False), wanted)


def test_more_rows_than_a_block(emulator):
    check(emulator, *inputs(37, 72, 20, torch.bfloat16))
    check(emulator, *inputs(37, 72, 40, torch.bfloat16), multiprocessors=0, wide=True)


def test_what_is_not_finite_stays_in_its_row_and_output(emulator):
    x, weight, bias = inputs(10, 256, 20, torch.bfloat16)
    x[3, 7], weight[5, 9] = torch.nan, torch.inf
    got = run(emulator, x, weight, bias)
    finite = torch.isfinite(got)
    assert not finite[3].any()
    assert not finite[:, 5].any()
    assert finite[:3, :5].all()
    assert finite[4:, 6:].all()
