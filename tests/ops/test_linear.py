"""linear: every backend against float64, a row beside any others, strides and what is not finite."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ras_fast import ops
from ras_fast.ops.linear import ACTIVATIONS, beats_torch, few_rows

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
MODULE = sys.modules["ras_fast.ops.linear"]  # `ras_fast.ops.linear` is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element, a prime, one short of and one past a vector, more than a thread's share of work.
WIDTHS = [1, 7, 31, 33, 513, 1088]


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def inputs(rows, width, outputs, dtype=torch.float32):
    return rand(rows, width, dtype=dtype), rand(outputs, width, dtype=dtype, scale=width**-0.5), rand(outputs, dtype=dtype)


def check(x, weight, bias):
    got, exact = ops.linear(x, weight, bias), F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert got.is_contiguous()
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(got.double(), exact, atol=2e-5 + 2 * eps * (x.dtype != torch.float32), rtol=eps)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_float64(backend, width, dtype):
    for rows, outputs in ((1, 1), (2, 131), (5, 40), (16, 3), (17, 40)):
        x, weight, bias = inputs(rows, width, outputs, dtype)
        check(x, weight, bias)
        check(x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_beside_any_others(dtype):
    x, weight, bias = inputs(32, 2100, 1000, dtype)
    assert beats_torch(x, weight)
    wanted = ops.linear(x, weight, bias)
    for rows in range(1, len(x)):
        assert torch.equal(ops.linear(x[:rows], weight, bias), wanted[:rows])
        assert torch.equal(ops.linear(x[-rows:], weight, bias), wanted[-rows:])


@BACKENDS
def test_strides_and_leading_dimensions(backend):
    wide, (_, weight, bias) = rand(3, 5, 2, 130), inputs(1, 70, 20)
    for x in (wide[:, 1, :, :70], wide.permute(2, 0, 1, 3)[:, :, 2, 60:], wide[:, -2:, 1, 5:75], wide[0, 0, 0, :70]):
        check(x, weight, bias)
        check(x, rand(20, 140)[:, 70:], bias)
    check(wide[:1, :1, :1, :70].expand(2, 3, 2, 70), weight, bias)


@BACKENDS
def test_nothing_to_do(backend):
    assert ops.linear(rand(0, 5, 8), rand(3, 8)).shape == (0, 5, 3)
    assert ops.linear(rand(2, 8), rand(0, 8)).shape == (2, 0)


@BACKENDS
def test_what_is_not_finite_stays_in_its_row_and_output(backend):
    x, weight, bias = inputs(4, 40, 9)
    x[1, 7], weight[5, 3], bias[2] = torch.nan, torch.inf, torch.inf
    finite = torch.isfinite(ops.linear(x, weight, bias))
    assert finite.all(1).tolist() == [False] * 4
    assert finite.all(0).tolist() == [False] * 9
    assert finite[[0, 2, 3]][:, [0, 1, 3, 4, 6, 7, 8]].all()


@BACKENDS
def test_one_rounding(backend):
    """Sums that no half precision could hold, and a tie to even."""
    x = torch.tensor([[1.0, 2.0**-11, 60000.0, -60000.0]]).half()
    assert ops.linear(x, torch.tensor([[1.0, 1, 4, 4]]).half()).item() == 1.0
    assert ops.linear(x, torch.tensor([[1.0, 1, 0, 0], [1.0, 3, 0, 0]]).half()).tolist() == [[1.0, 1 + 2**-9]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_go_by_at_once(dtype):
    x, weight, bias = inputs(37, 200, 40, dtype)
    got = torch.ops.ras_fast.linear(x, weight, bias)
    assert torch.equal(got, torch.cat([torch.ops.ras_fast.linear(part, weight, bias) for part in x.split(16)]))


def test_many_rows_are_torchs_where_it_is_not_slow(monkeypatch):
    for width, outputs, few in ((64, 32, 2), (512, 512, 8), (1024, 1024, 16), (2048, 1024, 32)):
        x, weight, bias = inputs(few + 1, width, outputs)
        assert few_rows("cpu", torch.float32, weight.numel()) == few
        assert beats_torch(x[1:], weight)
        assert not beats_torch(x, weight)
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(ValueError, match="bias is of shape"):
        ops.linear(x, weight, bias[:5])
    monkeypatch.setattr(MODULE, "SLOW_DTYPES", {torch.bfloat16})
    monkeypatch.setattr(MODULE, "few_rows", few_rows.__wrapped__)
    assert beats_torch(x.bfloat16(), weight)
    assert not beats_torch(x.half(), weight)
    monkeypatch.setattr(MODULE, "forced_backend", lambda: "triton")
    assert not beats_torch(x[1:], weight)


def test_float64_takes_the_reference():
    x, weight, bias = (tensor.double() for tensor in inputs(3, 16, 8))
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 16), width=st.integers(1, 90), outputs=st.integers(0, 40), dtype=st.sampled_from(DTYPES),
    biased=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_on_the_cpu(rows, width, outputs, dtype, biased, seed):
    torch.manual_seed(seed)
    x, weight, bias = inputs(rows, width, outputs, dtype)
    check(x, weight, bias if biased else None)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_are_each_what_it_is_alone(backend, dtype):
    shapes = ((1, 64, (40, 8, 8)), (2, 513, (131, 1)), (2, 33, (5, 0, 4, 3, 7)), (0, 8, (3, 2)), (17, 40, (16, 9)))
    for rows, width, sizes in shapes:
        x = rand(rows, width, dtype=dtype)
        weights, biases = [list(each) for each in zip(*(inputs(1, width, size, dtype)[1:] for size in sizes), strict=True)]
        biases[1] = None
        for added in (biases, None):
            got = ops.linears(x, weights, added)
            expected = [ops.linear(x, *parameters) for parameters in zip(weights, added or [None] * len(sizes), strict=True)]
            assert all(map(torch.equal, got, expected))
            assert all(each.is_contiguous() for each in got)


def test_several_weights_shared_out_over_threads():
    """Borders between them lie within a thread's share, and shares within one of them."""
    x, sizes = rand(3, 700), (301, 1, 500, 2)
    weights, biases = [list(each) for each in zip(*(inputs(1, 700, size)[1:] for size in sizes), strict=True)]
    got = torch.ops.ras_fast.linears(x, weights, biases)
    assert all(map(torch.equal, got, map(torch.ops.ras_fast.linear, [x] * 4, weights, biases)))


def test_several_weights_of_which_one_is_torchs():
    x, weights = rand(9, 512), [rand(2048, 512), rand(8, 512)]
    assert [beats_torch(x, weight) for weight in weights] == [True, False]
    assert all(map(torch.equal, ops.linears(x, weights), (F.linear(x, weight) for weight in weights)))


def check_glu(x, gate, up, activation):
    got, rows = ops.linear_glu(x, gate, up, activation=activation), x.dtype
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    products = [F.linear(x.double(), weight.double()).to(rows) for weight in (gate, up)]
    exact = ACTIVATIONS[activation](products[0].double()) * products[1].double()
    assert got.shape == exact.shape
    eps = torch.finfo(rows).eps  # a product near a tie may be rounded the other way
    most = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(got.double(), exact, atol=1e-5 + eps * most, rtol=3 * eps)


@BACKENDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_against_float64(backend, dtype, activation):
    for rows, width, outputs in ((1, 1, 1), (2, 513, 131), (5, 64, 40), (16, 33, 3), (19, 40, 9), (0, 8, 8), (2, 8, 0)):
        x, gate, _ = inputs(rows, width, outputs, dtype)
        check_glu(3 * x, gate, inputs(rows, width, outputs, dtype)[1], activation)
    wide = rand(3, 5, 130, dtype=dtype)
    check_glu(wide[:, -2:, 3:73], rand(9, 140, dtype=dtype)[:, :70], rand(9, 75, dtype=dtype)[:, 5:], activation)


def test_gated_values_at_the_ends():
    x, one = torch.tensor([[-200.0], [200.0], [torch.nan], [0.0]]), torch.ones(1, 1)
    for activation in ACTIVATIONS:
        got = ops.linear_glu(x, one, one, activation=activation).flatten()
        torch.testing.assert_close(got, torch.tensor([0.0, 40000.0, torch.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize("bias", [None, rand(5)])
def test_opcheck(bias):
    for x in (rand(3, 12), rand(2, 2, 12)):
        torch.library.opcheck(torch.ops.ras_fast.linear.default, (x, rand(5, 12), bias))
        torch.library.opcheck(torch.ops.ras_fast.linears.default, (x, [rand(5, 12), rand(3, 12)], [bias, None]))
        torch.library.opcheck(torch.ops.ras_fast.linear_glu.default, (x, rand(5, 12), rand(5, 12), "silu"))


def test_one_graph():
    x, weight, bias = inputs(2, 16, 8)
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ops.linear(x, weight, bias))
    several = torch.compile(lambda x: ops.linears(x, [weight, weight]), fullgraph=True, backend="eager")
    assert all(map(torch.equal, several(x), ops.linears(x, [weight, weight])))
    gated = torch.compile(lambda x: ops.linear_glu(x, weight, weight), fullgraph=True, backend="eager")
    assert torch.equal(gated(x), ops.linear_glu(x, weight, weight))


X, WEIGHT, BIAS = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(()), WEIGHT), "x is of shape"),
        ((X[:, :0], WEIGHT[:, :0]), r"x is of shape \(2, 0\); it must be \[..., K\] with K > 0"),
        ((X.int(), WEIGHT), "x is of dtype"),
        ((X.T.contiguous().T, WEIGHT), "x is of strides"),
        ((X, WEIGHT[:, :5]), r"weight is of shape \(4, 5\); it must be \[N, K\] with K = 8"),
        ((X, WEIGHT[0]), "weight is of shape"),
        ((X, WEIGHT.half()), "weight is of dtype"),
        ((X, torch.zeros(4, 16)[:, ::2]), "weight is of strides"),
        ((X, WEIGHT.to("meta")), "weight is on device"),
        ((X, WEIGHT, BIAS[:3]), r"bias is of shape \(3,\); it must be \[N\] = \(4,\)"),
        ((X, WEIGHT, BIAS.half()), "bias is of dtype"),
        ((X, WEIGHT, torch.zeros(8)[::2]), "bias is of strides"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, []), r"weights is \[\]; it must be a list of at least one tensor"),
        ((X, WEIGHT[None]), "weights is tensor"),
        ((X, [WEIGHT], [None, None]), r"biases is \[None, None\]; it must be a list of 1 tensors or None"),
        ((X, [WEIGHT, WEIGHT[:, :5]]), r"weights\[1\] is of shape \(4, 5\); it must be \[N, K\] with K = 8"),
        ((X, [WEIGHT, WEIGHT.half()]), r"weights\[1\] is of dtype"),
        ((X, [WEIGHT, 3]), r"weights\[1\] is"),
        ((X, [WEIGHT, WEIGHT], [BIAS, BIAS[:3]]), r"biases\[1\] is of shape \(3,\)"),
        ((X, [WEIGHT, WEIGHT], [BIAS.half(), None]), r"biases\[0\] is of dtype"),
    ],
)
def test_wrong_weights_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ops.linears(*args)


@pytest.mark.parametrize("rows", [2, 40])
def test_wrong_arguments_of_a_gated_layer_are_named(rows):
    x = torch.zeros(rows, 8)
    for args, activation, message in (
        ((x.int(), WEIGHT, WEIGHT), "silu", "x is of dtype"),
        ((x, WEIGHT[:, :5], WEIGHT), "silu", "gate is of shape"),
        ((x, WEIGHT.half(), WEIGHT), "silu", "gate is of dtype"),
        ((x, WEIGHT, WEIGHT[:3]), "silu", r"up is of shape \(3, 8\); it must be \[N, K\] = \(4, 8\)"),
        ((x, WEIGHT, WEIGHT.half()), "silu", "up is of dtype"),
        ((x, WEIGHT, torch.zeros(4, 16)[:, ::2]), "silu", "up is of strides"),
        ((x, WEIGHT, WEIGHT.to("meta")), "silu", "up is on device"),
        ((x, WEIGHT, WEIGHT), "relu", "activation is 'relu'; it must be one of silu, gelu_tanh"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_glu(*args, activation=activation)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="no backward"):
        ops.linear(X.clone().requires_grad_(), WEIGHT)
    with pytest.raises(RuntimeError, match="no backward"):
        ops.linear_glu(X, WEIGHT.clone().requires_grad_(), WEIGHT)
