"""Drop-in norm modules: the fused ops as `torch.nn.Module`s whose parameters keep the names that checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ras_fast import ops


class RMSNorm(nn.Module):
    """RMSNorm that can do the residual add before it: `norm(x)` returns y, `norm(x, residual)` returns (y, x + residual). A
    call without residual that steers x in mode "add" also returns a pair: (y, the steered x).

    Args:
        hidden_size: d.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma's 1 + w.

    Keyword arguments of `forward` are those of :func:`ras_fast.ops.add_rms_norm` (steering, rounding, probes); with `probes`
    the tuple has the dots as its third element. Raises what that function raises.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight_offset: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype) - weight_offset, requires_grad=False)
        self.eps, self.weight_offset = eps, weight_offset

    def forward(self, x: Tensor, residual: Tensor | None = None, **kwargs) -> Tensor | tuple[Tensor, ...]:
        outputs = ops.add_rms_norm(x, residual, self.weight, self.eps, weight_offset=self.weight_offset, **kwargs)
        return _outputs(x, outputs)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, weight_offset={self.weight_offset}"


class LayerNorm(nn.Module):
    """LayerNorm that can do the residual add before it: :func:`ras_fast.ops.add_layer_norm` as a module.

    Args:
        hidden_size: d.
        eps: added to the variance.
        bias: whether there is one.

    Called as :class:`RMSNorm`.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype), requires_grad=False)
        zeros = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", zeros)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None, **kwargs) -> Tensor | tuple[Tensor, ...]:
        return _outputs(x, ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, **kwargs))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


def _outputs(x: Tensor, outputs: tuple[Tensor, Tensor, Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    y, h, dots = outputs
    if dots is not None:
        return y, h, dots
    return y if h is x else (y, h)
