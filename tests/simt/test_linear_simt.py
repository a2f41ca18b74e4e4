"""The CUDA linear kernel (csrc/cuda/linear.cuh), run by the host emulation, against float64."""

import ctypes
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

INTEGERS = ("group_stride", "row_stride", "up_stride", "rows", "group", "inputs", "parts", "activation", "half",
            "multiprocessors", "blocks", "aligned")  # fmt: skip
PARTS = 4  # of a launch, at most
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2}
DTYPES = [torch.float16, torch.bfloat16]


class Part(ctypes.Structure):
    """Mirrors struct Part of linear_simt.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias", "out")] + [
        (name, ctypes.c_int64) for name in ("weight_stride", "outputs")
    ]


class Call(ctypes.Structure):
    """Mirrors struct Call of linear_simt.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "up")),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("part", Part * PARTS),
    ]


@pytest.fixture(scope="module")
def emulator(load_emulator):
    return load_emulator("linear_simt")


def rand(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def inputs(rows, width, outputs, dtype):
    return rand(rows, width, dtype=dtype), rand(outputs, width, dtype=dtype, scale=width**-0.5), rand(outputs, dtype=dtype)


def run(emulator, x, weight, bias, up=None, activation="none", **options):
    """x [rows, K] or [groups, rows, K]; the rest as `run_parts` has it."""
    return run_parts(emulator, x, [weight], [bias], up, activation, **options)[0]


def run_parts(emulator, x, weights, biases, up=None, activation="none", *, multiprocessors=100, wide=False, aligned=True):
    """wide: whether a block is to have 32 outputs."""
    rows = x.numel() // x.shape[-1]
    outs = [torch.full((rows, len(weight)), torch.nan, dtype=x.dtype) for weight in weights]
    group = x.shape[-2] if x.dim() == 3 else rows
    call = Call(x.data_ptr(), None if up is None else up.data_ptr(), x.stride(0) if x.dim() == 3 else 0, x.stride(-2),
                0 if up is None else up.stride(0), rows, group, x.shape[-1], len(weights), ACTIVATIONS[activation],
                x.dtype == torch.float16, multiprocessors)  # fmt: skip
    given = {"x": x} | ({} if up is None else {"up": up})
    for index, (weight, bias, out) in enumerate(zip(weights, biases, outs, strict=True)):
        call.part[index] = Part(weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), weight.stride(0),
                                len(weight))  # fmt: skip
        given |= {f"weight {index}": weight} | ({} if bias is None else {f"bias {index}": bias})
    emulator.run("linear_run", ctypes.byref(call),
                 outputs={f"out {index}": out.view(torch.int16).numpy() for index, out in enumerate(outs)},
                 inputs={name: tensor.view(torch.int16).numpy() for name, tensor in given.items()})  # fmt: skip
    assert call.aligned == aligned
    assert call.blocks == sum(-(-len(weight) // (32 if wide else 16)) for weight in weights)
    return outs


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
    x, weight, bias = inputs(8, 64, 64, torch.bfloat16)  # of all weights of a launch together
    run_parts(emulator, x, [weight, weight], [bias, None], multiprocessors=2, wide=True)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(33, 16), (1, 40, 17), (16, 16, 16, 5)])
def test_several_weights_in_one_launch(emulator, sizes, dtype):
    """Each gets the bits that it gets alone, whichever instance runs."""
    x = rand(6, 136, dtype=dtype)
    weights, biases = [list(each) for each in zip(*(inputs(1, 136, size, dtype)[1:] for size in sizes), strict=True)]
    biases[1] = None
    alone = [check(emulator, x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    shifted = [torch.cat([weight.new_zeros(len(weight), 1), weight], 1)[:, 1:] for weight in weights]
    for given, options in ((weights, {}), (weights, {"multiprocessors": 0, "wide": True}), (shifted, {"aligned": False}),
                           ([*weights[:-1], shifted[-1]], {"aligned": False})):  # fmt: skip
        got = run_parts(emulator, x, given, biases, **options)
        assert all(torch.equal(each, wanted) for each, wanted in zip(got, alone, strict=True))


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
