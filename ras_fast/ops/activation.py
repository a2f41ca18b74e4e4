"""Activations that torch is slow at (docs/kernels.md, "Activations")."""

from __future__ import annotations

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
    _check.no_grad("gelu_tanh", x)
    if forced_backend() == "triton":  # which has no kernel for it
        _validate(x)
        return _reference(x)
    return call("gelu_tanh", _validate, x)


def _validate(x: Tensor) -> None:
    _check.tensors(x=x)
    _check.floating("x", x)
    if not x.is_contiguous():
        _check.fail("x", f"of strides {tuple(x.stride())}", "contiguous")


def _reference(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


define("gelu_tanh(Tensor x) -> Tensor", fake=_fake, reference=_reference)
