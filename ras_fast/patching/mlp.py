"""Gated MLPs whose two projections and activation are one kernel while rows are few, as in a decode step: `ops.linear_glu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ras_fast.ops.linear import ACTIVATIONS, glu_by_kernel
from ras_fast.patching.layers import has_foreign_hooks
from ras_fast.patching.linear import FastLinear, some_rows, takes
from ras_fast.patching.report import Report
from ras_fast.patching.trace import difference, reproduce
from ras_fast.patching.undo import Undo, forward_slot


class FusedMLP:
    """Stands in for the `forward` of one MLP, down_proj(act_fn(gate_proj(x)) · up_proj(x)): `ops.linear_glu` where that is
    faster, else the original, as where a module that would not be called has hooks or is more than its product."""

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        self.mlp, self.activation = mlp, activation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            (x,), modules = args, self.mlp._modules
            gate, up = modules["gate_proj"], modules["up_proj"]
            if _is_plain(gate) and _is_plain(up) and not has_foreign_hooks(modules["act_fn"]):
                gate, up = gate._parameters["weight"], up._parameters["weight"]
                if takes(x, gate) and takes(x, up):
                    return modules["down_proj"](glu_by_kernel(x, gate, up, self.activation))
        return type(self.mlp).forward(self.mlp, *args, **kwargs)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling it is no more than a product with its weight."""
    plain = isinstance(linear.__dict__.get("forward"), FastLinear) and "weight" in linear._parameters
    return plain and linear._parameters["bias"] is None and not has_foreign_hooks(linear)


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
    rows = some_rows(parts[0].weight)
    activation = next((name for name, known in ACTIVATIONS.items() if difference(parts[3](rows), known(rows)) is None), None)
    if activation is None:
        return None
    fused = FusedMLP(module, activation)
    try:
        expected = type(module).forward(module, rows)
    except Exception:  # of a module that wants more than rows
        return None
    return fused if reproduce(fused, (rows,), {}, expected)[1] is None else None
