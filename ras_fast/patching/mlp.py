"""Gated MLPs whose two projections and activation are one kernel while rows are few, as in a decode step: `ops.linear_glu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ras_fast.memory import reraise_out_of_memory
from ras_fast.ops.linear import ACTIVATIONS, glu_by_kernel
from ras_fast.patching.linear import ELSEWHERE, FastLinear, Few, some_rows, takes
from ras_fast.patching.report import Report
from ras_fast.patching.structure import is_watched
from ras_fast.patching.trace import reproduce
from ras_fast.patching.undo import StandIn, Undo, forward_slot

_SCALES = (1.0, 1e3)  # of the rows on which an MLP is compared: some clamp what is large


class Parts(NamedTuple):
    """Names of an MLP's children: `gate` and `up`, or one linear layer for both, gate first; None: no module, but SiLU."""

    gate: str
    up: str | None
    act_fn: str | None
    down: str

    @property
    def projections(self) -> list[str]:
        """The names of what is multiplied with first."""
        return [self.gate] if self.up is None else [self.gate, self.up]


KNOWN = (
    Parts("gate_proj", "up_proj", "act_fn", "down_proj"),  # Llama and most others
    Parts("gate_proj", "up_proj", "activation_fn", "down_proj"),  # Llama 4
    Parts("gate_up_proj", None, "activation_fn", "down_proj"),  # GLM, Phi-3
    Parts("w1", "w3", None, "w2"),  # LFM2
)


class FusedMLP(StandIn):
    """Stands in for the `forward` of one MLP, down(act_fn(gate(x)) · up(x)): `ops.linear_glu` where that is faster, else the
    original, as where a module that would not be called has hooks or is more than its product.

    Args:
        mlp: the module.
        parts: its children.
        activation: what its `act_fn` is, in the words of ACTIVATIONS.
    """

    def __init__(self, mlp: nn.Module, parts: Parts, activation: str) -> None:
        self.mlp, self.parts, self.activation = mlp, parts, activation
        self.act_fn = None if parts.act_fn is None else mlp._modules[parts.act_fn]
        self.few = Few(mlp._modules[parts.gate].weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mlp = self.mlp
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].numel() <= self.few.most:
            states = self._states(args[0])
            if states is not None:
                return mlp._modules[self.parts.down](states)
        return type(mlp).forward(mlp, *args, **kwargs)

    def _states(self, x: Tensor) -> Tensor | None:
        """act_fn(gate(x)) · up(x) by the op; None where the original is to run."""
        linears = [self.mlp._modules[name] for name in self.parts.projections]
        if not (all(map(_is_plain, linears)) and self._is_left_alone()):
            return None
        weights = [linear._parameters.get("weight", ELSEWHERE) for linear in linears]
        if not takes(x, self.few, *weights):
            return None
        gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
        try:
            return glu_by_kernel(x, gate, up, self.activation)
        except RuntimeError:  # as in FastLinear
            return None

    def _is_left_alone(self) -> bool:
        """Whether nobody would hear that the activation is not called, and it is what it was."""
        if self.act_fn is None:
            return True
        act_fn = self.mlp._modules[self.parts.act_fn]
        return act_fn is self.act_fn and not is_watched(act_fn)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling it is no more than a product with its weight."""
    forward = linear.__dict__.get("forward")
    plain = isinstance(forward, FastLinear) and linear._parameters.get("bias", ELSEWHERE) is None
    return plain and not is_watched(linear, forward)


def fuse_mlps(layers: nn.ModuleList, undo: Undo, report: Report) -> None:
    """Every MLP of the decoder layers that has such parts and, compared on random rows, does this; after `speed_up_linears`."""
    for module in list(layers.modules()):
        fused, slot = _fused(module), forward_slot(module)
        if fused is not None and slot is not None:
            undo.set(module, slot, fused)
            report.mlps += 1


@torch.no_grad()
def _fused(module: nn.Module) -> FusedMLP | None:
    children = module._modules
    parts = next((parts for parts in KNOWN if all(children.get(name) is not None for name in parts if name is not None)), None)
    if parts is None or not all(_is_plain(children[name]) for name in parts.projections):
        return None
    weight = children[parts.gate].weight
    act_fn = ACTIVATIONS["silu"] if parts.act_fn is None else children[parts.act_fn]
    try:
        activation = next(name for name in ACTIVATIONS if _is_activation(act_fn, name, weight.device))
        fused = FusedMLP(module, parts, activation)
        for rows in (scale * some_rows(weight) for scale in _SCALES):
            expected = type(module).forward(module, rows)
            if bool(expected.isfinite().all()) and reproduce(fused, (rows,), {}, expected)[1] is not None:
                return None
    except Exception as error:  # whatever a module raises that wants something else than rows
        reraise_out_of_memory(error)
        return None
    return fused


def _is_activation(act_fn: Callable[[Tensor], Tensor], name: str, device: torch.device) -> bool:
    """In float32: in half precision another one might pass for it."""
    x = torch.linspace(-30, 30, 6001, device=device)
    return torch.allclose(act_fn(x), ACTIVATIONS[name](x), rtol=1e-5, atol=1e-6)
