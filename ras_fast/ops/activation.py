"""Activations that torch is slow at (docs/kernels.md, "Activations")."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ras_fast.backend import forced_backend
from ras_fast.ops import _check
from ras_fast.ops._registry import call, define


def gelu_tanh(x: Tensor) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), the approximation of GELU by a hyperbolic tangent (arXiv 1606.08415).

    Computed in float32 and rounded once. There is a kernel for CPUs; elsewhere this is torch's own.

    Args:
        x: of any shape, float32, float16 or bfloat16; contiguous.

    Returns:
        y: like `x`.

    Raises:
        ValueError: `x` has the wrong dtype or is not contiguous.
        RuntimeError: it requires grad and grad mode is on.
    """
    return _gelu("gelu_tanh", _tanh, x)


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), CLIP's approximation of GELU (arXiv 1606.08415).

    Rounding, arguments, result and errors as of :func:`gelu_tanh`; elsewhere than on CPUs three operations of torch's.
    """
    return _gelu("quick_gelu", _quick, x)


def _gelu(name: str, reference: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    _check.no_grad(name, x)
    if forced_backend() == "triton":  # which has no kernel for it
        _validate(x)
        return reference(x)
    return call(name, _validate, x)


def _validate(x: Tensor) -> None:
    _check.tensors(x=x)
    _check.floating("x", x)
    if not x.is_contiguous():
        _check.fail("x", f"of strides {tuple(x.stride())}", "contiguous")


def _tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick(x: Tensor) -> Tensor:
    wide = x.float() if x.element_size() == 2 else x
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


define("gelu_tanh(Tensor x) -> Tensor", fake=_fake, reference=_tanh)
define("quick_gelu(Tensor x) -> Tensor", fake=_fake, reference=_quick)
