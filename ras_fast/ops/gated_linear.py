"""A matrix applied to the rows that a gate lets through, added to them (docs/kernels.md, "Gated linear").

Shapes: T rows (the product of x's leading dimensions), d hidden size, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ras_fast.ops import _check
from ras_fast.ops._registry import call, define, triton_kernel


def gated_linear(x: Tensor, weight: Tensor, gate: Tensor, *, right: Tensor | None = None) -> Tensor:
    """x + gate · (M x) for each row: AutoSteer's refusal head (arXiv 2507.13255). M is `weight`, or `weight` @ `right`.

    The gates are read on the device. A row whose gate is 0 is returned bit for bit, whatever M holds, and costs no work; where
    every gate is 0, M is not read. The sum is rounded once. A gate that is NaN or infinite makes its own row not finite, so
    that it is not silently unsteered, and changes no other row. float64 is taken as well, by the reference alone.

    Args:
        x: [..., d], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        weight: M [d, d], or [d, r] with `right`; dtype of `x`, contiguous last dimension. Row i gives output element i, as
            in `torch.nn.Linear`.
        gate: [T] float32.
        right: [r, d] with r > 0, dtype of `x`, contiguous last dimension.

    Returns:
        [..., d], dtype of `x`, contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("gated_linear", x, weight, gate, right)
    return call("gated_linear", _validate, x, weight, right, gate)


def _validate(x: Tensor, weight: Tensor, right: Tensor | None, gate: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        _check.fail("x", f"of shape {tuple(x.shape)}", "[..., d] with d > 0")
    d = x.shape[-1]
    _check.floating("x", x)
    _check.last_dim_contiguous("x", x)
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] == 0:
        _check.fail("weight", f"of shape {tuple(weight.shape)}", f"[d, d], or [d, r] with r > 0 beside right, with d = {d}")
    if right is None:
        _check.shape("weight", weight, (d, d), "[d, d]")
    else:
        _check.shape("right", right, (weight.shape[1], d), "[r, d] with weight [d, r]")
    for name, tensor in (("weight", weight), ("right", right)):
        if tensor is not None:
            _check.dtype(name, tensor, x.dtype)
            _check.last_dim_contiguous(name, tensor)
            _check.device(name, tensor, x.device)
    _check.shape("gate", gate, (x.numel() // d,), "[T]")
    _check.dtype("gate", gate, torch.float32)
    _check.last_dim_contiguous("gate", gate)
    _check.device("gate", gate, x.device)


def _reference(x: Tensor, weight: Tensor, right: Tensor | None, gate: Tensor) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1])
    moved = rows.to(acc) if right is None else F.linear(rows.to(acc), right.to(acc))
    moved = rows.to(acc) + gate.to(acc)[:, None] * F.linear(moved, weight.to(acc))
    # Left out, not multiplied by zero: M x may overflow in a row that is off.
    return torch.where((gate == 0)[:, None], rows, moved.to(x.dtype)).view(x.shape)


def _fake(x: Tensor, weight: Tensor, right: Tensor | None, gate: Tensor) -> Tensor:
    _check.one_device("gated_linear", x, weight, right, gate)
    return x.new_empty(x.shape)


define(
    "gated_linear(Tensor x, Tensor weight, Tensor? right, Tensor gate) -> Tensor",
    fake=_fake,
    reference=_reference,
    triton=triton_kernel("gated_linear", "gated_linear"),
)
