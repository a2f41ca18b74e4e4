"""gated_linear: every backend against float64, and what happens to rows that are off, NaN, or strided."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element, a prime, one short of and one past a vector, more than one block of outputs and of columns.
WIDTHS = [1, 7, 31, 33, 513, 768]
GATES = [0.0, 0.8, -1.5, 0.0, 0.1, 2.0, 0.3]  # five rows that are on: one block of four and a rest


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def factors(d, rank, dtype):
    """(weight, right)."""
    if rank is None:
        return rand(d, d, dtype=dtype, scale=d**-0.5), None
    return rand(d, rank, dtype=dtype, scale=rank**-0.5), rand(rank, d, dtype=dtype, scale=d**-0.5)


def exact(x, weight, gate, right):
    moved = x.double() if right is None else linear(x.double(), right.double())
    return x.double() + gate.double().view(*x.shape[:-1], 1) * linear(moved, weight.double())


def torchs_own(x, weight, gate, right):
    moved = x if right is None else linear(x, right)
    return x + gate.view(*x.shape[:-1], 1).to(x.dtype) * linear(moved, weight)


def skip_if_interpreted(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("tl.dot on bfloat16 is wrong in Triton's interpreter")


@BACKENDS
@pytest.mark.parametrize("rank", [None, 1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_against_float64(backend, d, dtype, rank):
    skip_if_interpreted(backend, dtype)
    x, (weight, right), gate = rand(len(GATES), d, dtype=dtype), factors(d, rank, dtype), torch.tensor(GATES)
    got, wanted = ops.gated_linear(x, weight, gate, right=right), exact(x, weight, gate, right)
    assert got.dtype == dtype
    assert got.is_contiguous()
    error = (got.double() - wanted).abs().max()
    own = (torchs_own(x, weight, gate, right).double() - wanted).abs().max()
    assert error <= 2 * own + 2 * torch.finfo(dtype).eps * wanted.abs().max()


@BACKENDS
@pytest.mark.parametrize("rank", [None, 3])
def test_rows_that_are_off_are_bit_identical_whatever_m_holds(backend, rank):
    x, (weight, right) = rand(6, 70), factors(70, rank, torch.float32)
    weight[3] = torch.nan
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    gate = torch.tensor([0.0, -0.0, 0.0, 1.0, 0.0, 0.0])
    got = ops.gated_linear(x, weight, gate, right=right)
    off = gate == 0
    assert torch.equal(got[off].view(torch.int32), x[off].view(torch.int32))
    assert got[3, 3].isnan()
    assert torch.isfinite(got[3, :3]).all()


@BACKENDS
def test_no_row_on_does_not_read_m(backend):
    x = rand(3, 64)
    got = ops.gated_linear(x, torch.full((64, 64), torch.nan), torch.zeros(3))
    assert torch.equal(got, x)
    assert got.data_ptr() != x.data_ptr()


@BACKENDS
@pytest.mark.parametrize("gate", [float("nan"), float("inf")])
def test_a_gate_that_is_not_finite_poisons_its_own_row(backend, gate):
    x, (weight, _) = rand(3, 40), factors(40, None, torch.float32)
    got = ops.gated_linear(x, weight, torch.tensor([0.5, gate, 0.0]))
    assert not torch.isfinite(got[1]).any()
    wanted = exact(x, weight, torch.tensor([0.5, 0, 0]), None)[[0, 2]]
    torch.testing.assert_close(got[[0, 2]].double(), wanted, atol=1e-5, rtol=1e-5)


@BACKENDS
def test_a_nan_in_a_row_stays_there(backend):
    x, (weight, _) = rand(4, 40), factors(40, None, torch.float32)
    x[1, 7] = torch.nan
    got = ops.gated_linear(x, weight, torch.ones(4))
    assert got.isnan().any(-1).tolist() == [False, True, False, False]


@BACKENDS
def test_strides_and_leading_dimensions(backend):
    wide = rand(4, 3, 2, 130)
    weight = rand(70, 140, scale=0.1)[:, 70:]
    gate = torch.tensor([0.5, 0.0, 1.0, -1.0, 0.0, 0.7, 0.2, 0.0])
    for x in (wide[:, 1, :, :70], wide.permute(2, 0, 1, 3)[:, :, 2, 60:], wide[:, :2, 1, 5:75]):
        got = ops.gated_linear(x, weight, gate)
        assert got.shape == x.shape
        torch.testing.assert_close(got.double(), exact(x, weight, gate, None), atol=1e-5, rtol=1e-5)
        left, right = rand(70, 9)[:, 2:7], rand(5, 80)[:, 7:77]
        got = ops.gated_linear(x, left, gate, right=right)
        torch.testing.assert_close(got.double(), exact(x, left, gate, right), atol=1e-4, rtol=1e-5)
    one = ops.gated_linear(wide[0, 0, 0, :70], weight, gate[:1])
    torch.testing.assert_close(one.double(), exact(wide[0, 0, :1, :70], weight, gate[:1], None)[0], atol=1e-5, rtol=1e-5)


@BACKENDS
def test_empty_batch(backend):
    assert ops.gated_linear(rand(0, 5, 8), rand(8, 8), torch.zeros(0)).shape == (0, 5, 8)


@BACKENDS
def test_the_inner_product_of_two_factors_may_be_large(backend):
    """Beyond float16, as long as the sum is not."""
    x, right = 300 * torch.randn(20, 33).half(), 20 * torch.randn(5, 33).half()
    weight, gate = torch.randn(33, 5).half(), torch.full((20,), 1e-4)
    assert (x.float() @ right.float().T).abs().max() > 65504
    expected = x.double() + 1e-4 * (x.double() @ right.double().T @ weight.double().T)
    torch.testing.assert_close(ops.gated_linear(x, weight, gate, right=right).double(), expected, atol=2, rtol=1e-3)


@BACKENDS
def test_ties_round_to_even(backend):
    x, weight = torch.tensor([[1.0], [1 + 2**-10]]).half(), torch.tensor([[2.0**-11]]).half()
    assert torch.equal(ops.gated_linear(x, weight, torch.tensor([1.0, 1.0])), torch.tensor([[1.0], [1 + 2**-9]]).half())


@BACKENDS
def test_many_rows(backend):
    """More rows than a tile, and more work than a thread's share."""
    for rank in (None, 7):
        x, (weight, right) = rand(70, 300), factors(300, rank, torch.float32)
        gate = (torch.rand(70) > 0.4).float()
        got, wanted = ops.gated_linear(x, weight, gate, right=right), exact(x, weight, gate, right)
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9), d=st.integers(1, 90), rank=st.none() | st.integers(1, 40), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_cpu_is_the_reference(rows, d, rank, dtype, seed):
    torch.manual_seed(seed)
    x, (weight, right) = rand(rows, d, dtype=dtype), factors(d, rank, dtype)
    gate = torch.randn(rows) * (torch.rand(rows) > 0.4)
    got, wanted = ops.gated_linear(x, weight, gate, right=right), exact(x, weight, gate, right)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, atol=2 * eps + 1e-5, rtol=2 * eps)


@pytest.mark.parametrize("rank", [None, 4])
def test_opcheck(rank):
    weight, right = factors(12, rank, torch.float32)
    for x in (rand(3, 12), rand(2, 2, 12)[:, :, :]):
        gate = torch.tensor([0.0, 0.5, 1.0, 0.0])[: x.numel() // 12]
        torch.library.opcheck(torch.ops.ras_fast.gated_linear.default, (x, weight, right, gate))


def test_one_graph():
    x, weight, gate = rand(2, 1, 16), rand(16, 16), torch.tensor([0.0, 1.0])
    compiled = torch.compile(lambda x: ops.gated_linear(x, weight, gate), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ops.gated_linear(x, weight, gate))


X, WEIGHT, GATE = torch.zeros(2, 8), torch.zeros(8, 8), torch.zeros(2)


@pytest.mark.parametrize(
    ("args", "right", "message"),
    [
        ((torch.zeros(()), WEIGHT, GATE), None, "x is of shape"),
        ((X.int(), WEIGHT, GATE), None, "x is of dtype"),
        ((X.T.contiguous().T, WEIGHT, GATE), None, "x is of strides"),
        ((X, WEIGHT[:, :4], GATE), None, r"weight is of shape \(8, 4\); it must be \[d, d\] = \(8, 8\)"),
        ((X, WEIGHT[:4], GATE), None, "weight is of shape"),
        ((X, WEIGHT.half(), GATE), None, "weight is of dtype"),
        ((X, torch.zeros(8, 16)[:, ::2], GATE), None, "weight is of strides"),
        ((X, WEIGHT[:, :3], GATE), torch.zeros(4, 8), r"right is of shape \(4, 8\); it must be \[r, d\]"),
        ((X, WEIGHT[:, :0], GATE), torch.zeros(0, 8), "weight is of shape"),
        ((X, WEIGHT, GATE[:1]), None, r"gate is of shape \(1,\); it must be \[T\] = \(2,\)"),
        ((X, WEIGHT, GATE.double()), None, "gate is of dtype"),
        ((X, WEIGHT, GATE.to("meta")), None, "gate is on device"),
    ],
)
def test_wrong_arguments_are_named(args, right, message):
    with pytest.raises(ValueError, match=message):
        ops.gated_linear(*args, right=right)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="no backward"):
        ops.gated_linear(X.clone().requires_grad_(), WEIGHT, GATE)
