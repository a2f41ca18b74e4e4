"""The linear kernel on a GPU: against float64, beside any other rows, in graphs, next to kernels that it overlaps with."""

import pytest
import torch
from torch.nn import functional as F

import ras_fast
from ras_fast import ops
from ras_fast.engine.graphs import capture
from ras_fast.ops.linear import ACTIVATIONS

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def rand(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def inputs(rows, width, outputs, dtype):
    return rand(rows, width, dtype=dtype), rand(outputs, width, dtype=dtype, scale=width**-0.5), rand(outputs, dtype=dtype)


def check(x, weight, bias):
    got, exact = torch.ops.ras_fast.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    error, own = (got.double() - exact).abs().max(), (F.linear(x, weight, bias).double() - exact).abs().max()
    assert got.is_contiguous()
    assert error <= 2 * own + 1e-3
    return got


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 37])
@pytest.mark.parametrize(("width", "outputs"), [(8, 1), (520, 40), (4096, 4096), (11008, 4096), (4096, 11008), (127, 33)])
def test_against_float64(width, outputs, rows, dtype):
    check(*inputs(rows, width, outputs, dtype))


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 37])
@pytest.mark.parametrize(("width", "outputs"), [(8, 1), (520, 40), (4096, 11008), (127, 33)])
def test_gated(width, outputs, rows, activation, dtype):
    x, gate, _ = inputs(rows, width, outputs, dtype)
    up = rand(outputs, width, dtype=dtype, scale=width**-0.5)
    got = torch.ops.ras_fast.linear_glu(x, gate, up, activation)
    exact = ACTIVATIONS[activation](F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    own = ACTIVATIONS[activation](F.linear(x, gate)) * F.linear(x, up)
    assert (got.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + 1e-2


@DTYPES
@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(("width", "sizes"), [(4096, (4096, 1024, 1024)), (2048, (6144, 2048, 16, 16, 40)), (127, (33, 16))])
def test_several_weights_in_one_launch(width, sizes, rows, dtype):
    x = rand(rows, width, dtype=dtype)
    weights, biases = [list(each) for each in zip(*(inputs(1, width, size, dtype)[1:] for size in sizes), strict=True)]
    biases[1] = None
    wanted = [ops.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    got = ops.linears(x, weights, biases)
    assert all(torch.equal(each, alone) for each, alone in zip(got, wanted, strict=True))


@DTYPES
def test_strides(dtype):
    x, (_, weight, bias) = rand(6, 5, 136, dtype=dtype), inputs(1, 128, 24, dtype)
    for view in (x[:, 0, :128], x[:, -2:, 8:], x[:1, :1, :128].expand(3, 4, -1), x[:, :, 1:129]):
        check(view, weight, bias)
    check(x[..., :128], rand(24, 136, dtype=dtype)[:, :128], bias)


@DTYPES
def test_a_row_is_the_same_beside_any_others(dtype):
    """Of every instance: blocks of 16 and 32 outputs and of 8 and 16 rows, gated ones, and rows of odd width."""
    for width, outputs in ((4096, 1024), (4096, 4096), (4096, 11008), (1023, 1024)):
        x, weight, _ = inputs(16, width, outputs, dtype)
        for product in (ops.linear, lambda x, weight: torch.ops.ras_fast.linear_glu(x, weight, weight, "silu")):
            wanted = product(x, weight)
            for rows in (1, 3, 8, 11):
                assert torch.equal(product(x[:rows], weight), wanted[:rows])
                assert torch.equal(product(x[-rows:], weight), wanted[-rows:])


def test_other_calls_are_torchs():
    x, weight, bias = inputs(17, 64, 32, torch.bfloat16)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    x, weight, bias = inputs(2, 64, 32, torch.float32)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))


def test_in_a_graph_behind_what_writes_its_inputs():
    """On Hopper the kernel starts before the one that makes its rows has ended, or has even written its weight."""
    x, weight, _ = inputs(2, 4096, 4096, torch.bfloat16)

    def call():
        states = x
        for _ in range(4):
            states = ops.linear(states, weight)
        return states, ops.linear(x + 1, weight * 2)

    replay = capture(call)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        weight.copy_(torch.randn_like(weight) * 4096**-0.5)
        got = replay()
        torch.cuda.synchronize()
        for one, other in zip(got, call(), strict=True):
            assert torch.equal(one, other)
        check(x, weight, torch.zeros_like(weight[0]))
