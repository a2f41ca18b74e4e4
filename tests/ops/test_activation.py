"""Approximations of GELU: every backend beside float64, and torch's own."""

import pytest
import torch
import torch.nn.functional as F

from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
THEIRS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
NAMES = pytest.mark.parametrize("name", THEIRS)


def ours(name, x):
    return getattr(ops, name)(x)


@BACKENDS
@NAMES
@DTYPES
@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 16), (2, 7, 33), (300, 1030)], ids=str)
def test_as_accurate_as_torchs(backend, name, shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype)
    y, exact = ours(name, x), THEIRS[name](x.double())
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert y.is_contiguous()
    assert (y - exact).abs().max() <= (THEIRS[name](x) - exact).abs().max() + 1e-6


@BACKENDS
@NAMES
@DTYPES
def test_every_size_of_number(backend, name, dtype):
    """From the smallest to the largest, of either sign, and where the exponential function ends."""
    top = torch.finfo(dtype).max
    x = torch.cat([torch.logspace(-8, 38 if top > 1e30 else 4.8, 4000), torch.linspace(0, 60, 4000), torch.tensor([0.0, top])])
    x = torch.cat([x, -x]).to(dtype)
    y, exact = ours(name, x).double(), THEIRS[name](x.double())
    assert torch.isfinite(y).all()
    assert ((y - exact).abs() <= 1e-6 + torch.finfo(dtype).eps * exact.abs()).all()


@BACKENDS
@NAMES
@DTYPES
def test_what_is_not_finite(backend, name, dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0] * 9, dtype=dtype)
    assert torch.equal(torch.isfinite(ours(name, x)), torch.isfinite(x))
    assert (ours(name, x)[1::4] == torch.inf).all()


@BACKENDS
@NAMES
def test_nothing(backend, name):
    assert ours(name, torch.empty(0, 5)).shape == (0, 5)


@BACKENDS
@NAMES
def test_threads_share_it_out(backend, name):
    x = torch.randn(2**17 + 5).bfloat16()
    whole = ours(name, x)
    assert torch.equal(whole[7:1000], ours(name, x[7:1000]))
    assert torch.equal(whole[-99:], ours(name, x[-99:]))


@NAMES
def test_float64_is_the_references(name):
    x = torch.randn(33, dtype=torch.float64)
    assert torch.equal(ours(name, x), THEIRS[name](x))


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
@NAMES
def test_bad_input(backend, name):
    with pytest.raises(ValueError, match=r"^x is of strides \(1, 4\); it must be contiguous"):
        ours(name, torch.randn(3, 4).T)
    with pytest.raises(ValueError, match=r"^x is of dtype torch.int64; it must be float32"):
        ours(name, torch.arange(3))
    with pytest.raises(RuntimeError, match=f"{name} has no backward"):
        ours(name, torch.randn(3, requires_grad=True))


@NAMES
@DTYPES
def test_compiled_and_checked(name, dtype):
    x, op = torch.randn(2, 19).to(dtype), getattr(ops, name)
    assert torch.equal(torch.compile(op, fullgraph=True, backend="aot_eager")(x), op(x))
    torch.library.opcheck(getattr(torch.ops.ras_fast, name).default, (x,))
