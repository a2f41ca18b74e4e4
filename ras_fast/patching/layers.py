"""Decoder layers whose residual adds are fused with the norms that follow them, also across the layer boundary.

Which layers those are is fusion.py's to find out.

The norm that follows an add is computed together with it, and the result is stored at the norm module. When that module is
then called with the very tensor that the add returned, it returns the stored result; called with any other tensor it computes
the norm. So a layer still returns the true hidden state, hooks on layers and norms see what they saw before, and a layer that
is not fused, or a tensor that someone replaced in between, needs no special case. Fused or not, a layer is steered and read at
its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ras_fast import ops
from ras_fast.patching.ahead import Ahead
from ras_fast.patching.cache_values import CACHE_NAMES
from ras_fast.patching.steering import Probe, Site
from ras_fast.patching.structure import is_watched
from ras_fast.patching.trace import LayerTrace, first, states_of
from ras_fast.patching.undo import StandIn

SCALE = "layer_scalar"  # a layer's buffer [1] that its output is multiplied by, as Gemma 4's
X_SCALES = ("residual_multiplier", "residual_scale")  # a layer's number that what it adds is multiplied by: Granite, MiniCPM 3
LAYER_INPUT = "per_layer_input"  # an argument of a layer, for its own use
# Arguments of a layer that its attention alone makes use of, whether or not the trace brings them.
_FOR_ATTENTION = frozenset(
    ("attention_mask", "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", *CACHE_NAMES)
)


class Sum(NamedTuple):
    """What a layer adds up: (norm(x) · x_scale + residual) · scale, of what there is.

    x, residual: [B, L, d]. inner: the norm of x alone. scale: [1].
    """

    x: Tensor
    residual: Tensor | None = None
    inner: FusedNorm | None = None
    x_scale: float = 1.0
    scale: Tensor | None = None

    def branch(self) -> Tensor:
        """norm(x) · x_scale."""
        x = self.x if self.inner is None else self.inner.norm(self.x)
        return x if self.x_scale == 1 else x * self.x_scale

    def value(self) -> Tensor:
        """All of it, in the dtype of the sum."""
        branch = self.branch()
        hidden = branch if self.residual is None else self.residual + branch
        return hidden if self.scale is None else (hidden * self.scale).to(hidden.dtype)


class FusedNorm(StandIn):
    """Stands in for the `forward` of one norm module; also computes add + norm for the layer before it.

    eps_name: the norm's attribute that holds its eps.
    """

    def __init__(self, norm: nn.Module, kind: str, eps_name: str, weight_offset: float) -> None:
        self.norm, self.kind, self.eps_name, self.weight_offset = norm, kind, eps_name, weight_offset
        self.site: Site | None = None  # steering of the norm's output
        self._ahead = Ahead()  # of the sum that the layer before it returns
        self._by: tuple[int, int] | None = None  # which weight that was computed by, and where it lay

    @property
    def eps(self) -> float:
        return getattr(self.norm, self.eps_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._ahead.take(args[0] if args else None)
        if result is not None and self._by is not None and self._by != _place(self._weight()):
            result = None  # hooks have brought another weight meanwhile, as those that stream layers in do
        if kwargs or len(args) != 1 or (self.norm._modules and self._is_watched_inside()):
            return self._unfused(args, kwargs)
        if self.site is not None:
            self.site.note()
        if result is not None:
            return result
        x = args[0]
        if self.site is not None or self._computes(x):
            return self.compute(Sum(x.contiguous()), self.site)[0]
        return type(self.norm).forward(self.norm, x)

    def _computes(self, x: Tensor) -> bool:
        """Whether the op can stand for the norm: of another dtype, as under autocast, that of the result is the norm's own; and
        a vision tower may be asked for gradients."""
        weight = self.norm.weight
        if x.dtype != weight.dtype or x.shape[-1:] != weight.shape:
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))

    def _is_watched_inside(self) -> bool:
        """Whether it is a wrapper, such as PEFT's, of a norm that somebody would notice is not called."""
        inside = [*self.norm.modules()][1:]
        return any(is_watched(module, module.__dict__.get("forward")) for module in inside)

    def _unfused(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The norm's own forward, where it is called in another way than in the trace, or heard inside."""
        if self.site is not None:
            called = f"called with {len(args)} arguments and {sorted(kwargs)}"
            raise RuntimeError(f"the norm is steered, but {called}, or there are hooks on a norm inside of it")
        return type(self.norm).forward(self.norm, *args, **kwargs)

    def add(self, terms: Sum, site: Site | None = None, probe: Probe | None = None) -> Tensor:
        """The sum, steered by `site` and then read by `probe`; keeps the norm of it for the call that follows."""
        weight = self._weight()
        if self._is_elsewhere(terms.x, weight):
            return add_alone(terms, site, probe)
        if terms.inner is not None or terms.x_scale != 1 or terms.scale is not None:
            terms = self._taken(terms)
        if site is None or self.site is None:
            result, hidden = self.compute(terms, site or self.site, probe)
        else:
            _, hidden = self.compute(terms, site, probe)
            result, _ = self.compute(Sum(hidden), self.site)
        self._ahead.keep(hidden, result)
        # A graph does not see what hooks do to weights.
        self._by = None if torch.compiler.is_compiling() else _place(weight)
        return hidden

    def _weight(self) -> Tensor:
        weight = self.norm._parameters.get("weight")  # past `Module.__getattr__`, which takes its time
        return self.norm.weight if weight is None else weight

    def _taken(self, terms: Sum) -> Sum:
        """The same sum as the op takes it: the rest is computed before."""
        if terms.inner is not None and not self.includes(terms):
            terms = terms._replace(x=terms.inner.norm(terms.x), inner=None)
        if terms.x_scale != 1 and (self.kind != "rms" or terms.residual.dtype != terms.x.dtype):
            terms = Sum(terms.branch(), terms.residual, scale=terms.scale)
        return terms if terms.scale is None or terms.inner is not None else Sum(terms.value())

    def _is_elsewhere(self, x: Tensor, weight: Tensor) -> bool:
        """Whether its weight is on another device, or there for the norm's own call alone: hooks move x, or bring the weight,
        as those of accelerate and of FSDP2 do, which may have come since `patch`."""
        if type(weight) not in (nn.Parameter, Tensor) or weight.is_cpu is not x.is_cpu or weight.get_device() != x.get_device():
            return True
        if weight.numel() != x.shape[-1] or self.norm._forward_pre_hooks or every_module._global_forward_pre_hooks:
            return True
        # Without an address it was freed meanwhile, and to read it would end the process.
        return not torch.compiler.is_compiling() and weight.data_ptr() == 0 and not weight.is_meta

    def includes(self, terms: Sum) -> bool:
        """Whether one kernel computes the norm of the sum's x and this one: they are alike, nobody would notice that the first
        is not called, and its call would run this package's kernel."""
        x, residual, inner = terms.x, terms.residual, terms.inner
        alike = inner.kind == self.kind == "rms" and inner.eps == self.eps and inner.weight_offset == self.weight_offset
        if not alike or inner.site is not None or inner._is_elsewhere(x, inner._weight()):
            return False
        if residual is None or residual.dtype != x.dtype or not inner._computes(x):
            return False
        return not (is_watched(inner.norm, inner) or inner._is_watched_inside())

    def forget(self) -> None:
        """Drops a stored result that was never asked for."""
        self._ahead.take(None)

    def compute(self, terms: Sum, site: Site | None = None, probe: Probe | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), for one that the op takes."""
        x, residual, inner, x_scale, scale = terms
        if residual is not None and x.dtype != residual.dtype:  # under autocast
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        options = _options(x, site, probe)
        if inner is not None:
            options |= {"x_weight": inner.norm.weight, "scale": scale}
        if x_scale != 1:
            options["x_scale"] = x_scale
        adds_nothing = residual is None and site is None
        if adds_nothing or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            y, h, dots = self._launch(x, residual, options)
        else:  # inference tensors do not count their writes, and anything may write to the sum
            with torch.inference_mode(False), torch.no_grad():
                y, h, dots = self._launch(x, residual, options)
        if dots is not None:
            probe.receive(dots.view(*x.shape[:-1], -1))
        return y, h

    def _launch(self, x: Tensor, residual: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.kind == "rms":
            return ops.add_rms_norm(x, residual, self.weight(x), self.eps, weight_offset=self.weight_offset, **options)
        bias = getattr(self.norm, "bias", None)
        return ops.add_layer_norm(x, residual, self.weight(x), bias, self.eps, **options)

    def weight(self, x: Tensor) -> Tensor:
        """[d], for rows x [..., d]."""
        return self.norm.weight


class WeightlessNorm(FusedNorm):
    """Stands in for the `forward` of an RMSNorm without a weight, as of the values in Gemma 4's attention."""

    def __init__(self, norm: nn.Module, eps_name: str) -> None:
        super().__init__(norm, "rms", eps_name, 0.0)
        self._ones: Tensor | None = None

    def weight(self, x: Tensor) -> Tensor:
        ones = self._ones
        if ones is None or (ones.shape, ones.dtype, ones.device) != (x.shape[-1:], x.dtype, x.device):
            ones = x.new_ones(x.shape[-1])
            if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # then a replay alone writes them
                self._ones = ones
        return ones

    def _computes(self, x: Tensor) -> bool:
        return not (torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad))


def _place(weight: Tensor) -> tuple[int, int]:
    """Which weight it is, and where its values lie."""
    return id(weight), weight.data_ptr()


def add_alone(terms: Sum, site: Site | None = None, probe: Probe | None = None) -> Tensor:
    """The sum, steered by `site` and then read by `probe`, where no fused norm follows.

    By the kernel that norms x, or that steers, where one does. The norm that it computes besides goes unused, and still that
    costs less than to gather, scale and add one after the other.
    """
    if terms.inner is not None and terms.inner.includes(terms):
        _, hidden = terms.inner.compute(terms, site, probe)
        return hidden
    hidden = terms.value()
    options = _options(hidden, site, probe)
    if options:
        _, hidden, dots = ops.add_rms_norm(hidden, None, hidden.new_ones(hidden.shape[-1]), 1.0, **options)
        if dots is not None:
            probe.receive(dots.view(*hidden.shape[:-1], -1))
    return hidden


def _options(x: Tensor, site: Site | None, probe: Probe | None) -> dict[str, Any]:
    """Keywords of the norm ops that steer and read `x` [B, L, d]."""
    options = site.keywords(x) if site is not None else {}
    if probe is not None and probe.active:
        options["probes"] = probe.directions.to(x.device)
    return options


class SteeredLayer(StandIn):
    """Stands in for the `forward` of one decoder layer: runs the layer's own, then steers and reads what it gave.

    end: the fused norm that follows; it computes itself together with the steering. None where there is none.
    crosses: whether it reaches images by cross-attention, and is skipped where there are none.
    """

    crosses = False

    def __init__(self, layer: nn.Module, index: int, end: FusedNorm | None) -> None:
        self.layer, self.index, self.end = layer, index, end
        self.site: Site | None = None  # steering of the layer's output
        self.probe: Probe | None = None  # reads that output once it is steered

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, and then what is asked for."""
        self._check(states_of(args, kwargs))
        output = type(self.layer).forward(self.layer, *args, **kwargs)
        if self.site is None and self.probe is None:
            return output
        hidden = self._add(Sum(first(output).contiguous()))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _add(self, terms: Sum) -> Tensor:
        """The sum, steered and read as is asked for."""
        if self.site is not None:
            self.site.note()
        add = add_alone if self.end is None else self.end.add
        return add(terms, self.site, self.probe)

    def _check(self, hidden: Tensor) -> None:
        if self.layer.training:
            raise RuntimeError("a patched model is for inference, but it is in training mode: call eval(), or unpatch it")
        if torch.is_grad_enabled() and (hidden.requires_grad or next(self.layer.parameters()).requires_grad):
            raise RuntimeError("a patched model has no backward: run it under torch.no_grad(), or unpatch it")


class FusedLayer(SteeredLayer):
    """Stands in for the `forward` of one decoder layer: its residual adds are fused with the norms after them, and with those
    before them.

    names: of the layer's children, by the part that each plays.
    norms: the fused norms by theirs; all but the one that follows the layer.
    """

    LAST_NORM = "mlp_norm"  # the part of the norm before the last add

    def __init__(
        self, layer: nn.Module, index: int, names: dict[str, str], norms: dict[str, FusedNorm], end: FusedNorm | None
    ) -> None:
        super().__init__(layer, index, end)
        self.names, self.norms = names, norms
        self.attention_norm, self.middle, self.last_norm = map(norms.get, ("attention_norm", "middle_norm", self.LAST_NORM))
        self._in_place = tuple((names[part], norm.norm) for part, norm in norms.items())
        self._x_scale_name = next((name for name in X_SCALES if isinstance(getattr(layer, name, None), int | float)), None)
        self.returns_tuple, self.returns_also = False, ()
        self._parameters = named_parameters(type(layer).forward)[1:]
        self._unproved: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self._parameters):
            return super().__call__(*args, **kwargs)
        kwargs.update(zip(self._parameters, args, strict=False))
        if self._unproved and any(kwargs.get(name) is not None for name in self._unproved):
            return super().__call__(**kwargs)
        children = self.layer._modules
        for name, norm in self._in_place:
            if children[name] is not norm:  # somebody has put another one there, as adapters do
                return super().__call__(**kwargs)
        hidden = kwargs.pop("hidden_states")
        self._check(hidden)
        normed = self._run("input_norm", hidden) if "input_norm" in self.names else hidden
        attended = self._attend(normed, kwargs)
        hidden = self._add_up(first(attended), normed, hidden, kwargs)
        return (hidden, *(attended[i] for i in self.returns_also)) if self.returns_tuple else hidden

    def _add_up(self, attended: Tensor, normed: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the layer makes of hidden states, of their norm, and of what its attention made of that, all [B, T, d]."""
        terms = Sum(attended, hidden, self.attention_norm, self.x_scale)
        if self.middle is not None:
            hidden = self.middle.add(terms)
            normed = self._run("middle_norm", hidden)
        else:
            hidden = add_alone(terms)
            normed = normed if self.attention_norm is None else hidden
        moved = self._move(normed, hidden, kwargs)
        if moved.shape != hidden.shape:  # some MoE blocks flatten
            moved = moved.view(hidden.shape)
        return self._close(moved, hidden, kwargs)

    @property
    def fused_adds(self) -> int:
        """How many of its adds are computed with a norm."""
        between = self.middle is not None or self.attention_norm is not None
        return between + (self.end is not None or self.last_norm is not None)

    @property
    def x_scale(self) -> float:
        """What the layer multiplies by before it adds: its own attribute, which may be set anew."""
        return 1.0 if self._x_scale_name is None else getattr(self.layer, self._x_scale_name)

    def note_unproved(self, record: LayerTrace) -> None:
        """Parameters of the layer that the trace left empty: what the layer does with them was not seen."""
        given = dict(zip(self._parameters, record.args, strict=False)) | record.kwargs
        unproved = (name for name in self._parameters if given.get(name) is None)
        self._unproved = tuple(name for name in unproved if name not in _FOR_ATTENTION)

    def note_output(self, record: LayerTrace) -> str | None:
        """Notes what the layer returns: hidden states, alone or before what its attention returned, as the keys that an indexer
        has chosen. Returns why that cannot be told."""
        self.returns_tuple = isinstance(record.output, tuple)
        given = next(call.output for call in record.calls if call.name == self.names["attention"])
        rest = record.output[1:] if self.returns_tuple else ()
        places = [next((i for i, own in enumerate(given) if own is value), None) for value in rest if isinstance(given, tuple)]
        if len(places) < len(rest) or None in places or any(value is None for value in rest):
            return f"returns {1 + len(rest)} values"
        self.returns_also = tuple(places)
        return None

    def renamed(self, record: LayerTrace) -> list[str]:
        """What the layer handed to its attention by another name than it got it by, as a cache: nothing in the trace, but not
        later."""
        attention = self.layer._modules[self.names["attention"]]
        call = next(call for call in record.calls if call.name == self.names["attention"])
        received = dict(zip(named_parameters(type(attention).forward)[1:], call.args, strict=False)) | call.kwargs
        given = {*self._parameters[: len(record.args)], *record.kwargs}
        return sorted(name for name, value in received.items() if value is None and name not in given)

    def _attend(self, normed: Tensor, kwargs: dict[str, Any]) -> Any:
        """What the attention gives: states, alone or before others."""
        return self.layer._modules[self.names["attention"]](hidden_states=normed, **kwargs)

    def _move(self, normed: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return first(self._run("mlp", normed))

    def _close(self, moved: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self._add(Sum(moved, hidden, self.last_norm, self.x_scale, self.layer._buffers.get(SCALE)))

    def _run(self, role: str, *args: Any) -> Any:
        """The layer's child in this role, called as a module, so that its hooks run."""
        return self.layer._modules[self.names[role]](*args)


class FusedBlock(FusedLayer):
    """A layer of one norm and one block, be it attention, a recurrence or an MLP, as Nemotron-H's: h += block(norm(h))."""

    def note_output(self, record: LayerTrace) -> str | None:
        if getattr(self.layer, "residual_in_fp32", False):  # which shows where weights are cast, maybe later
            return "keeps its residual stream in float32"
        return super().note_output(record)

    def note_unproved(self, record: LayerTrace) -> None:
        super().note_unproved(record)
        call = record.calls[-1]
        self._alone, self._kept_back = call.is_unary, frozenset(self._parameters) - call.kwargs.keys()

    @property
    def fused_adds(self) -> int:
        return int(self.end is not None)

    def _add_up(self, attended: Tensor, normed: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self._close(attended, hidden, kwargs)

    def _attend(self, normed: Tensor, kwargs: dict[str, Any]) -> Any:
        """What the block gives, of those of the layer's arguments that it was handed in the trace."""
        if self._alone:
            return self._run("attention", normed)
        return super()._attend(normed, {name: value for name, value in kwargs.items() if name not in self._kept_back})


class FusedCrossLayer(FusedLayer):
    """A layer that reaches images by cross-attention, behind gates and a mask m of the tokens that see any, as Mllama's:

    h += tanh(g₁)·attention(norm(h)); h += tanh(g₂)·m·mlp(norm(h)). It is skipped where there is no image.
    """

    def __init__(self, layer: nn.Module, *args: Any) -> None:
        super().__init__(layer, *args)
        self.attention_gate, self.mlp_gate = gates(layer)

    def renamed(self, record: LayerTrace) -> list[str]:
        return []  # `_attend` gives the names that such an attention has for them

    def _attend(self, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        others = {name: value for name, value in kwargs.items() if name not in self._parameters}
        images = {name: kwargs[name] for name in ("cross_attention_states", *CACHE_NAMES) if name in kwargs}
        attended = super()._attend(normed, {"attention_mask": kwargs.get("cross_attention_mask"), **images, **others})
        return self.layer._parameters[self.attention_gate].tanh() * first(attended)

    def _move(self, normed: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        moved = super()._move(normed, hidden, kwargs)
        sighted = kwargs.get("full_text_row_masked_out_mask")
        moved = moved if sighted is None else sighted[:, 0] * moved
        return self.layer._parameters[self.mlp_gate].tanh() * moved


class FusedInputLayer(FusedLayer):
    """A layer that takes in an input of its own behind the MLP, as Gemma 4 E2B's: h += norm(W₂(act(W₁·h) · input))."""

    LAST_NORM = "projection_norm"

    def _attend(self, normed: Tensor, kwargs: dict[str, Any]) -> Any:
        return super()._attend(normed, {name: value for name, value in kwargs.items() if name != LAYER_INPUT})

    def _close(self, moved: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        hidden = add_alone(Sum(moved, hidden, self.norms["mlp_norm"], self.x_scale))
        gated = self._run("activation", self._run("gate", hidden)) * kwargs[LAYER_INPUT]
        return super()._close(self._run("projection", gated), hidden, kwargs)


class FusedMixtureLayer(FusedLayer):
    """A layer with experts beside its MLP, as Gemma 4 26B-A4B's: h += norm(norm(mlp(norm(h))) + norm(experts(norm(h))))."""

    def _move(self, normed: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        rows = hidden.flatten(0, -2)
        _, weights, chosen = self._run("router", rows)
        routed = self._run("experts", self._run("experts_input_norm", rows), chosen, weights).view(hidden.shape)
        return self._run("dense_norm", super()._move(normed, hidden, kwargs)) + self._run("experts_norm", routed)


def named_parameters(function: Callable) -> tuple[str, ...]:
    """The names of its parameters, without *args and **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def gates(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's own scalar parameters."""
    return tuple(name for name, parameter in layer.named_parameters(recurse=False) if parameter.numel() == 1)
