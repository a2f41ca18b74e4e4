"""Linear layers that read their weights at the speed of memory while rows are few, as in a decode step: `ops.linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ras_fast.ops.linear import beats_torch, linear_by_kernel
from ras_fast.patching.report import Report
from ras_fast.patching.trace import reproduce
from ras_fast.patching.undo import Undo, forward_slot


class FastLinear:
    """Stands in for the `forward` of one `torch.nn.Linear`: `ops.linear` where that is faster, else the original."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        parameters = self.linear._parameters  # what nn.Module.__getattr__ finds as well, several times slower
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if torch.compiler.is_compiling() or not takes(x, weight):
            return type(self.linear).forward(self.linear, x)
        return linear_by_kernel(x, weight, bias)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the ops take these and are faster, apart from what the original would refuse as well."""
    # A parameter of another type is quantised or distributed, and multiplies in a way of its own.
    if type(weight) is not nn.Parameter or type(x) is not Tensor or not beats_torch(x) or x.dtype != weight.dtype:
        return False
    if not 0 < x.dim() <= 3 or x.stride(-1) != 1 or torch.is_autocast_enabled(x.device.type):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def speed_up_linears(root: nn.Module, layers: nn.ModuleList, undo: Undo, report: Report) -> None:
    """Every `torch.nn.Linear` of the decoder layers, and the one that gives the logits; not classes derived from it."""
    modules = [*layers.modules(), root.get_output_embeddings()]
    names = {id(module): name for name, module in root.named_modules()}
    for module in {id(module): module for module in modules if type(module) is nn.Linear}.values():
        slot, fast = forward_slot(module), FastLinear(module)
        why = "has a forward of its own on the instance already" if slot is None else _differs(fast)
        if why is None:
            undo.set(module, slot, fast)
            report.linears += 1
        else:
            report.unfused[names[id(module)]] = why


def some_rows(weight: Tensor) -> Tensor:
    """Two random rows [2, K] for a weight [N, K]."""
    return torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)


@torch.no_grad()
def _differs(fast: FastLinear) -> str | None:
    """How it does something else than the original, on random rows."""
    weight = fast.linear.weight
    if weight.is_meta:
        return "has its weights offloaded"
    rows = some_rows(weight)
    return reproduce(fast, (rows,), {}, nn.Linear.forward(fast.linear, rows))[1]
