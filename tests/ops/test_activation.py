"""gelu_tanh: every backend beside float64, and torch's own."""

import pytest
import torch
import torch.nn.functional as F

from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def error(y, x):
    return (y.double() - F.gelu(x.double(), approximate="tanh")).abs().max()


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 16), (2, 7, 33), (300, 1030)], ids=str)
def test_as_accurate_as_torchs(backend, shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype)
    y = ops.gelu_tanh(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert y.is_contiguous()
    assert error(y, x) <= error(F.gelu(x, approximate="tanh"), x) + 1e-6


@BACKENDS
@DTYPES
def test_every_size_of_number(backend, dtype):
    """From the smallest to the largest, of either sign, and where the exponential function ends."""
    top = torch.finfo(dtype).max
    x = torch.cat([torch.logspace(-8, 38 if top > 1e30 else 4.8, 4000), torch.linspace(0, 12, 4000), torch.tensor([0.0, top])])
    x = torch.cat([x, -x]).to(dtype)
    y, exact = ops.gelu_tanh(x).double(), F.gelu(x.double(), approximate="tanh")
    assert torch.isfinite(y).all()
    assert ((y - exact).abs() <= 1e-6 + torch.finfo(dtype).eps * exact.abs()).all()


@BACKENDS
@DTYPES
def test_what_is_not_finite(backend, dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0] * 9, dtype=dtype)
    assert torch.equal(torch.isfinite(ops.gelu_tanh(x)), torch.isfinite(x))
    assert (ops.gelu_tanh(x)[1::4] == torch.inf).all()


@BACKENDS
def test_nothing(backend):
    assert ops.gelu_tanh(torch.empty(0, 5)).shape == (0, 5)


@BACKENDS
def test_threads_share_it_out(backend):
    x = torch.randn(2**17 + 5).bfloat16()
    whole = ops.gelu_tanh(x)
    assert torch.equal(whole[7:1000], ops.gelu_tanh(x[7:1000]))
    assert torch.equal(whole[-99:], ops.gelu_tanh(x[-99:]))


def test_float64_is_the_references():
    x = torch.randn(33, dtype=torch.float64)
    assert torch.equal(ops.gelu_tanh(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
def test_bad_input(backend):
    with pytest.raises(ValueError, match=r"^x is of strides \(1, 4\); it must be contiguous"):
        ops.gelu_tanh(torch.randn(3, 4).T)
    with pytest.raises(ValueError, match=r"^x is of dtype torch.int64; it must be float32"):
        ops.gelu_tanh(torch.arange(3))
    with pytest.raises(RuntimeError, match="gelu_tanh has no backward"):
        ops.gelu_tanh(torch.randn(3, requires_grad=True))


@DTYPES
def test_compiled_and_checked(dtype):
    x = torch.randn(2, 19).to(dtype)
    assert torch.equal(torch.compile(ops.gelu_tanh, fullgraph=True, backend="aot_eager")(x), ops.gelu_tanh(x))
    torch.library.opcheck(torch.ops.ras_fast.gelu_tanh.default, (x,))
