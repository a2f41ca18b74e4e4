"""Linear layers that read their weights at the speed of memory while rows are few, as in a decode step: `ops.linear`, and
`ops.linears` for those that are called with the same rows one after the other."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

from ras_fast.backend import forced_backend
from ras_fast.ops.linear import KERNEL_DTYPES, few_rows, is_slow, linear_by_kernel, linears_by_kernel
from ras_fast.patching.ahead import Ahead
from ras_fast.patching.report import Report
from ras_fast.patching.structure import find_head
from ras_fast.patching.trace import reproduce
from ras_fast.patching.undo import StandIn, Undo, forward_slot

ELSEWHERE = object()  # a parameter that is something else now, such as a parametrised or pruned one


class FastLinear(StandIn):
    """Stands in for the `forward` of one `torch.nn.Linear`: `ops.linear` where that is faster, else the original.

    followers: those that are called with the same rows next, as of keys and values after that of queries. They are computed
        together with it, and each then returns what is there already; called with another tensor, it computes its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.few = linear, Few(linear.weight)
        self.followers: tuple[FastLinear, ...] = ()
        self._ahead = Ahead()

    def __call__(self, input: Tensor) -> Tensor:
        if self._ahead.held is not None:
            result = self._ahead.take(input)
            if result is not None:
                return result
        if type(input) is Tensor and input.numel() <= self.few.most:
            own = self.linear._parameters  # what nn.Module.__getattr__ finds as well, several times slower
            weight, bias = own.get("weight"), own.get("bias", ELSEWHERE)
            if takes(input, self.few, weight, bias):
                try:
                    return self._product(input, weight, bias)
                except RuntimeError:  # of what the kernel refuses: the original takes it, or says in its words why not
                    pass
        return type(self.linear).forward(self.linear, input)

    def _product(self, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        followers = self.followers  # read once: another thread may change them
        if not followers or x.is_inference():  # which does not count what is written to it
            return linear_by_kernel(x, weight, bias)
        weights, biases = [weight], [bias]
        for follower in followers:
            if follower._ahead.held is not None:
                self.followers = ()  # nobody asked for that: they are not called with the same rows after all
                return linear_by_kernel(x, weight, bias)
            if not follower._joins(x, weights, biases):
                return linear_by_kernel(x, weight, bias)
        try:
            result, *others = linears_by_kernel(x, weights, biases)
        except RuntimeError:  # of what one of them is, as on another device
            self.followers = ()
            return linear_by_kernel(x, weight, bias)
        for follower, other in zip(followers, others, strict=True):
            follower._ahead.keep(x, other)
        return result

    def _joins(self, x: Tensor, weights: list[nn.Parameter], biases: list[nn.Parameter | None]) -> bool:
        """Adds its own to those of one that `takes` x, unless its original is to run, or a hook before its forward may change
        its weight."""
        own = self.linear._parameters
        weight, bias = own.get("weight"), own.get("bias", ELSEWHERE)
        if not are_parameters(weight, bias) or (torch.is_grad_enabled() and needs_grad(weight, bias)):
            return False
        if self.linear._forward_pre_hooks or every_module._global_forward_pre_hooks or not self.few.admits(x, weight):
            return False
        weights.append(weight)
        biases.append(bias)
        return True


class Few:
    """How many rows are few, for products with a weight as it is now.

    elements: of x, up to which an op is faster; 0 where there is none. most: the most that these were so far. That is asked
        before anything else, so that a prompt pays nearly nothing.
    """

    def __init__(self, weight: Tensor) -> None:
        self.most = 0
        self._learn(weight)

    def _learn(self, weight: Tensor) -> None:
        self.device, self.dtype, self._on_cpu = weight.device.type, weight.dtype, weight.is_cpu
        inputs = weight.shape[1] if weight.dim() == 2 else 0  # of a share, as others hold one between forwards
        self.elements = few_rows(self.device, weight.dtype, weight.numel()) * inputs
        self.most = max(self.most, self.elements)  # or a weight that is cast back would not be looked at again

    def admits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the rows of x are few, of a weight that may have been moved or cast meanwhile, and no other backend is
        forced."""
        if x.dtype is not self.dtype or x.is_cpu is not self._on_cpu:
            if x.dtype is not weight.dtype or x.is_cpu is not weight.is_cpu:
                return False
            self._learn(weight)
        return 0 < x.numel() <= self.elements and forced_backend() in ("auto", "torch", self.device)  # Triton has no kernel


def takes(x: Tensor, few: Few, weight: Any, other: Any = None) -> bool:
    """Whether an op is faster for these, and nothing else is asked for than their product.

    other: the bias, or the weight of a second product; None where there is none.
    A decode step asks this of every product, between much else: it is kept short.
    """
    if torch.compiler.is_compiling() or not are_parameters(weight, other) or x.is_nested or x.layout is not torch.strided:
        return False
    if not few.admits(x, weight) or torch.is_autocast_enabled(few.device) or forward_ad._current_level >= 0:
        return False  # in this order: `admits` learns where the weight lies now
    return not (torch.is_grad_enabled() and (x.requires_grad or needs_grad(weight, other)))


def are_parameters(weight: Any, other: Any) -> bool:
    """Whether these are parameters, or the other None: what is quantised or distributed multiplies in a way of its own."""
    return type(weight) is nn.Parameter and (other is None or type(other) is nn.Parameter)


def needs_grad(weight: nn.Parameter, other: nn.Parameter | None) -> bool:
    return weight.requires_grad or (other is not None and other.requires_grad)


def speed_up_linears(
    root: nn.Module, layers: nn.ModuleList, calls: list[tuple[nn.Linear, Tensor]], undo: Undo, report: Report
) -> None:
    """Every `torch.nn.Linear` of the decoder layers, and the one that gives the logits; not classes derived from it. Where
    torch is slow however many the rows, those of the vision tower and all others, too.

    calls: those of the decoder layers' linear layers in a forward, with the rows of each.
    """
    modules = [*filter(_is_plain, (*layers.modules(), find_head(root))), *filter(_is_slow, filter(_is_plain, root.modules()))]
    names = {id(module): name for name, module in root.named_modules()}
    fast_ones = {}
    for module in {id(module): module for module in modules}.values():
        slot, fast = forward_slot(module), FastLinear(module)
        why = "has a forward of its own on the instance already" if slot is None else _differs(fast)
        if why is None:
            undo.set(module, slot, fast)
            report.linears += 1
            fast_ones[id(module)] = fast
        else:
            report.unfused[names[id(module)]] = why
    _join(calls, fast_ones)


def _join(calls: list[tuple[nn.Linear, Tensor]], fast_ones: dict[int, FastLinear]) -> None:
    """Has those of the fast ones, by id of their module, that are called with the same rows one after the other computed
    together."""
    times = Counter(id(module) for module, _ in calls)
    for _, neighbours in groupby(calls, key=lambda call: id(call[1])):
        alike = [fast_ones[id(module)] for module, _ in neighbours if id(module) in fast_ones and times[id(module)] == 1]
        if alike:
            alike[0].followers = tuple(alike[1:])


def _is_plain(module: nn.Module | None) -> bool:
    weight = module._parameters.get("weight") if type(module) is nn.Linear else None
    return type(weight) is nn.Parameter and weight.dtype in KERNEL_DTYPES


def _is_slow(linear: nn.Linear) -> bool:
    return is_slow(linear.weight.device.type, linear.weight.dtype)


def some_rows(weight: Tensor) -> Tensor:
    """Two random rows [2, K] for a weight [N, K]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, weight.shape[1], generator=generator, device="cpu").to(weight.device, weight.dtype)


@torch.no_grad()
def _differs(fast: FastLinear) -> str | None:
    """How it does something else than the original, on random rows."""
    weight = fast.linear.weight
    if weight.is_meta:
        return "has its weights offloaded"
    rows = some_rows(weight)
    expected, bias = nn.Linear.forward(fast.linear, rows), fast.linear.bias
    if takes(rows, fast.few, weight, bias):  # not through `fast`, which would hide that the kernel refuses
        return reproduce(linear_by_kernel, (rows, weight, bias), {}, expected)[1]
    return reproduce(fast, (rows,), {}, expected)[1]
