"""Gated MLPs whose two projections and activation are one kernel while rows are few, as in a decode step: `ops.linear_glu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ras_fast.ops.linear import ACTIVATIONS, glu_by_kernel
from ras_fast.patching.linear import ELSEWHERE, FastLinear, most_elements, some_rows, takes
from ras_fast.patching.report import Report
from ras_fast.patching.structure import has_foreign_hooks
from ras_fast.patching.trace import reproduce
from ras_fast.patching.undo import Undo, forward_slot

_SCALES = (1.0, 1e3)  # of the rows on which an MLP is compared: some clamp what is large


class FusedMLP:
    """Stands in for the `forward` of one MLP, down_proj(act_fn(gate_proj(x)) · up_proj(x)): `ops.linear_glu` where that is
    faster, else the original, as where a module that would not be called has hooks or is more than its product.

    Args:
        mlp: the module.
        act_fn: its activation, which ACTIVATIONS knows as `activation`.
    """

    def __init__(self, mlp: nn.Module, act_fn: nn.Module, activation: str) -> None:
        self.mlp, self.act_fn, self.activation = mlp, act_fn, activation
        self.most = most_elements(mlp.gate_proj.weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mlp = self.mlp
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].numel() <= self.most:
            states = self._states(args[0])
            if states is not None:
                return mlp._modules["down_proj"](states)
        return type(mlp).forward(mlp, *args, **kwargs)

    def _states(self, x: Tensor) -> Tensor | None:
        """act_fn(gate_proj(x)) · up_proj(x) by the op; None where the original is to run."""
        modules = self.mlp._modules
        gate, up = modules["gate_proj"], modules["up_proj"]
        if not (_is_plain(gate) and _is_plain(up) and self._is_left_alone(modules["act_fn"])):
            return None
        weights = gate._parameters.get("weight"), up._parameters.get("weight")
        if not takes(x, *weights):
            return None
        try:
            return glu_by_kernel(x, *weights, self.activation)
        except RuntimeError:  # as in FastLinear
            return None

    def _is_left_alone(self, act_fn: nn.Module) -> bool:
        hooks = has_foreign_hooks(act_fn) or every_module._global_forward_hooks or every_module._global_forward_pre_hooks
        return act_fn is self.act_fn and "forward" not in act_fn.__dict__ and not hooks


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling it is no more than a product with its weight."""
    plain = isinstance(linear.__dict__.get("forward"), FastLinear) and linear._parameters.get("bias", ELSEWHERE) is None
    return plain and not has_foreign_hooks(linear)


def fuse_mlps(layers: nn.ModuleList, undo: Undo, report: Report) -> None:
    """Every MLP of the decoder layers that has such parts and, compared on random rows, does this; after `speed_up_linears`."""
    for module in list(layers.modules()):
        fused, slot = _fused(module), forward_slot(module)
        if fused is not None and slot is not None:
            undo.set(module, slot, fused)
            report.mlps += 1


@torch.no_grad()
def _fused(module: nn.Module) -> FusedMLP | None:
    parts = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if None in parts or not all(map(_is_plain, parts[:2])):
        return None
    gate, _, _, act_fn = parts
    try:
        activation = next(name for name in ACTIVATIONS if _is_activation(act_fn, name, gate.weight.device))
        fused = FusedMLP(module, act_fn, activation)
        for rows in (scale * some_rows(gate.weight) for scale in _SCALES):
            expected = type(module).forward(module, rows)
            if bool(expected.isfinite().all()) and reproduce(fused, (rows,), {}, expected)[1] is not None:
                return None
    except Exception:  # whatever a module raises that wants something else than rows
        return None
    return fused


def _is_activation(act_fn: nn.Module, name: str, device: torch.device) -> bool:
    """In float32: in half precision another one might pass for it."""
    x = torch.linspace(-30, 30, 6001, device=device)
    return torch.allclose(act_fn(x), ACTIVATIONS[name](x), rtol=1e-5, atol=1e-6)
