"""Decoder layers whose residual adds are fused with the norms that follow them, also across the layer boundary.

A layer is recognised by the order in which it calls its children (n: norm, b: anything else, attention first, then MLP):

    nbnb     pre-norm, as Llama: h += attention(norm(h)); h += mlp(norm(h))
    nbnnbn   sandwich norms, as Gemma: h += norm(attention(norm(h))); h += norm(mlp(norm(h)))
    nbb      parallel, as Cohere: h += attention(n) + mlp(n), n = norm(h)

and then checked: the fused norm and layer are compared with the original ones on random input before they are kept.

The norm that follows an add is computed together with it, and the result is stored at the norm module. When that module is
then called with the very tensor that the add returned, it returns the stored result; called with any other tensor it computes
the norm. So a layer still returns the true hidden state, hooks on layers and norms see what they saw before, and a layer that
is not fused, or a tensor that someone replaced in between, needs no special case. Fused or not, a layer is steered and read at
its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast import ops
from ras_fast.patching.cache_values import CACHE_NAMES, cache_name, returned_cache
from ras_fast.patching.steering import Probe, Site

PATTERNS = ("nbnb", "nbnnbn", "nbb")
SMALL = 64.0
# Arguments of a layer that its attention alone makes use of, whether or not the trace brings them.
_FOR_ATTENTION = frozenset(
    ("attention_mask", "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", *CACHE_NAMES)
)


class FusedNorm:
    """Stands in for the `forward` of one norm module; also computes add + norm for the layer before it."""

    def __init__(self, norm: nn.Module, kind: str, eps: float, weight_offset: float) -> None:
        self.norm, self.kind, self.eps, self.weight_offset = norm, kind, eps, weight_offset
        self.site: Site | None = None  # steering of the norm's output
        self.between: tuple[nn.Module, ...] = (norm,)  # modules whose hooks see the tensor before this norm does
        self._given: Tensor | None = None
        self._version = 0
        self._result: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, result = self._given, self._result
        self._given = self._result = None
        if kwargs or len(args) != 1:
            return self._unfused(args, kwargs)
        x = args[0]
        if given is x and self._untouched(x):
            return result
        if self.site is not None or x.dtype == self.norm.weight.dtype:
            return self.compute(x.contiguous(), None, self.site)[0]
        return type(self.norm).forward(self.norm, x)  # as under autocast: the dtype of its result is its own

    def _unfused(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The norm's own forward, where it is called in another way than in the trace."""
        if self.site is not None:
            raise RuntimeError(f"the norm is steered, but called with {len(args)} arguments and {sorted(kwargs)}")
        return type(self.norm).forward(self.norm, *args, **kwargs)

    def _untouched(self, x: Tensor) -> bool:
        """Whether `x` certainly has not been written to since the add."""
        if torch.compiler.is_compiling():
            return True
        if not x.is_inference():
            return self._version == x._version
        # Inference tensors do not count their writes, so any hook in between may have written.
        return not any(map(_has_foreign_hooks, self.between))

    def add(self, x: Tensor, residual: Tensor | None, site: Site | None = None, probe: Probe | None = None) -> Tensor:
        """x + residual, steered by `site` and then read by `probe`; keeps the norm of it for the call that follows."""
        if self.norm.weight.is_meta and not x.is_meta:  # offloaded: accelerate's hooks bring it only for the norm's own call
            return add_alone(x, residual, site, probe)
        if site is None or self.site is None:
            result, hidden = self.compute(x, residual, site or self.site, probe)
        else:
            _, hidden = self.compute(x, residual, site, probe)
            result, _ = self.compute(hidden, None, self.site)
        self._given, self._version, self._result = hidden, _version(hidden), result
        return hidden

    def forget(self) -> None:
        """Drops a stored result that was never asked for."""
        self._given = self._result = None

    def compute(
        self, x: Tensor, residual: Tensor | None, site: Site | None = None, probe: Probe | None = None
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        if residual is not None and x.dtype != residual.dtype:  # under autocast
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        options = _options(x, site, probe)
        if self.kind == "rms":
            y, h, dots = ops.add_rms_norm(
                x, residual, self.norm.weight, self.eps, weight_offset=self.weight_offset, **options
            )
        else:
            bias = getattr(self.norm, "bias", None)
            y, h, dots = ops.add_layer_norm(x, residual, self.norm.weight, bias, self.eps, **options)
        if dots is not None:
            probe.receive(dots.view(*x.shape[:-1], -1))
        return y, h


def add_alone(x: Tensor, residual: Tensor | None, site: Site | None, probe: Probe | None) -> Tensor:
    """x + residual [B, L, d], steered by `site` and then read by `probe`, where no fused norm follows.

    By the kernel that steers where one does. The norm that it computes besides goes unused, and still that costs less than to
    gather, scale and add one after the other.
    """
    hidden = x if residual is None else residual + x
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


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks other than those of transformers, which only record outputs."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(only_records, hooks))


def only_records(hook: Callable) -> bool:
    """Whether a hook is transformers' own, which it leaves on a module for good to record outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class SteeredLayer:
    """Stands in for the `forward` of one decoder layer: runs the layer's own, then steers and reads what it gave.

    end: the fused norm that follows; it computes itself together with the steering. None where there is none.
    """

    def __init__(self, layer: nn.Module, index: int, end: FusedNorm | None) -> None:
        self.layer, self.index, self.end = layer, index, end
        self.site: Site | None = None  # steering of the layer's output
        self.probe: Probe | None = None  # reads that output once it is steered

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, and then what is asked for."""
        self._check(args[0] if args else kwargs["hidden_states"])
        output = type(self.layer).forward(self.layer, *args, **kwargs)
        if self.site is None and self.probe is None:
            return output
        hidden = self._add(first(output).contiguous(), None)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """x + residual, steered and read as is asked for."""
        if self.end is None:
            return add_alone(x, residual, self.site, self.probe)
        return self.end.add(x, residual, self.site, self.probe)

    def _check(self, hidden: Tensor) -> None:
        if self.layer.training:
            raise RuntimeError("a patched model is for inference, but it is in training mode: call eval(), or unpatch it")
        if torch.is_grad_enabled() and (hidden.requires_grad or next(self.layer.parameters()).requires_grad):
            raise RuntimeError("a patched model has no backward: run it under torch.no_grad(), or unpatch it")


class FusedLayer(SteeredLayer):
    """Stands in for the `forward` of one decoder layer: its residual adds are fused with the norms after them."""

    def __init__(
        self, layer: nn.Module, index: int, names: dict[str, str | None], middle: FusedNorm | None, end: FusedNorm | None
    ) -> None:
        super().__init__(layer, index, end)
        self.names, self.middle = names, middle
        self.returns_tuple = False
        self._parameters = _named_parameters(type(layer).forward)[1:]
        self._unproved: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self._parameters):
            return super().__call__(*args, **kwargs)
        kwargs.update(zip(self._parameters, args, strict=False))
        if self._unproved and any(kwargs.get(name) is not None for name in self._unproved):
            return super().__call__(**kwargs)
        hidden = kwargs.pop("hidden_states")
        self._check(hidden)
        normed = self._run("input_norm", hidden)
        attended = self._run("attention_norm", self._attend(normed, kwargs))
        if self.middle is None:
            hidden = hidden + attended
        else:
            hidden = self.middle.add(attended, hidden)
            normed = self._run("middle_norm", hidden)
        moved = self._move(normed, kwargs)
        if moved.shape != hidden.shape:  # some MoE blocks flatten
            moved = moved.view(hidden.shape)
        hidden = self._add(self._run("mlp_norm", moved), hidden)
        return (hidden,) if self.returns_tuple else hidden

    def note_unproved(self, record: LayerTrace) -> None:
        """Parameters of the layer that the trace left empty: what the layer does with them was not seen."""
        given = dict(zip(self._parameters, record.args, strict=False)) | record.kwargs
        unproved = (name for name in self._parameters if given.get(name) is None)
        self._unproved = tuple(name for name in unproved if name not in _FOR_ATTENTION)

    def renamed(self, record: LayerTrace) -> list[str]:
        """What the layer handed to its attention by another name than it got it by, as a cache: nothing in the trace, but not
        later."""
        attention = self.layer._modules[self.names["attention"]]
        call = next(call for call in record.calls if call.name == self.names["attention"])
        received = dict(zip(_named_parameters(type(attention).forward)[1:], call.args, strict=False)) | call.kwargs
        given = {*self._parameters[: len(record.args)], *record.kwargs}
        return sorted(name for name, value in received.items() if value is None and name not in given)

    def _attend(self, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return first(self.layer._modules[self.names["attention"]](hidden_states=normed, **kwargs))

    def _move(self, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return first(self.layer._modules[self.names["mlp"]](normed))

    def _run(self, role: str, x: Tensor) -> Tensor:
        """The layer's norm in this role, called as a module, so that its hooks run; x itself where there is none."""
        name = self.names[role]
        return x if name is None else self.layer._modules[name](x)


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
        return self.layer._parameters[self.attention_gate].tanh() * attended

    def _move(self, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        moved = super()._move(normed, kwargs)
        sighted = kwargs.get("full_text_row_masked_out_mask")
        moved = moved if sighted is None else sighted[:, 0] * moved
        return self.layer._parameters[self.mlp_gate].tanh() * moved


def _named_parameters(function: Callable) -> tuple[str, ...]:
    """The names of its parameters, without *args and **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def gates(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's own scalar parameters."""
    return tuple(name for name, parameter in layer.named_parameters(recurse=False) if parameter.numel() == 1)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# Recognition: what a small forward of the unpatched model shows.


@dataclass
class Call:
    """One child's call in the trace."""

    name: str
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def x(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    @property
    def is_unary(self) -> bool:
        """Whether it was called with hidden states and nothing else."""
        return len(self.args) + len(self.kwargs) == 1 and isinstance(self.x, Tensor)

    @property
    def mixes(self) -> bool:
        """Whether it was called with hidden states [B, T, d] and more, as attention is."""
        return not self.is_unary and isinstance(self.x, Tensor) and self.x.dim() == 3


@dataclass
class LayerTrace:
    """One decoder layer's call in the trace."""

    module: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    calls: list[Call] = field(default_factory=list)

    @property
    def called(self) -> bool:
        return self.output is not None

    @property
    def crosses(self) -> bool:
        """Whether it attends to images that are not among the text model's tokens."""
        return any(call.kwargs.get("cross_attention_states") is not None for call in self.calls)


@dataclass
class Rehearsal:
    """Small forwards of the text model.

    outputs: what it gave, each [tokens, d].
    calls: what each call of `Trace.mixers` was given and gave, in their order, each [B, T, d].
    valid: [B, T] bool, where tokens are not padding, of the forwards that have any.
    """

    outputs: list[Tensor] = field(default_factory=list)
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    valid: Tensor | None = None


@dataclass
class Trace:
    """What small forwards of the text model showed.

    final_norm: the call of the text model's child that is called on the last layer's output.
    sample: what the text model was given.
    mixers: the layers' children that are given more than hidden states, attention among them.
    plain, padded: what it gives, and behind left padding and in a step; nothing there for a model that does not.
    """

    layers: list[LayerTrace]
    final_norm: Call | None
    sample: dict[str, Tensor]
    mixers: list[nn.Module]
    plain: Rehearsal
    padded: Rehearsal


def trace(text_model: nn.Module, layers: nn.ModuleList) -> Trace:
    """Runs the text model on a few random tokens and notes what each layer was given, called and returned."""
    records = [LayerTrace(layer) for layer in layers]
    final: list[Call] = []
    handles = []
    try:
        for record in records:
            handles.append(record.module.register_forward_hook(_note_layer(record), with_kwargs=True))
            for name, child in record.module.named_children():
                if isinstance(child, (nn.Dropout, nn.Identity)):  # nothing, in a model that answers
                    continue
                handles.append(child.register_forward_hook(_note_call(record.calls, name), with_kwargs=True))
        for name, child in text_model.named_children():
            if child is not layers:
                handles.append(child.register_forward_hook(_note_call(final, name), with_kwargs=True))
        sample = _sample(text_model, layers)
        plain = _run(text_model, sample)
    finally:
        for handle in handles:
            handle.remove()
    last = next((first(record.output) for record in reversed(records) if record.called), None)
    calls = [(record.module, call) for record in records for call in record.calls if call.mixes]
    mixers = list(dict.fromkeys(getattr(layer, call.name) for layer, call in calls))
    plain.calls = [(call.x, first(call.output)) for _, call in calls]
    padded, notes = Rehearsal(), []
    try:
        with _hooks(mixers, lambda x, output: notes.append((x, output))):
            padded = _run_padded(text_model, sample)
        padded.calls = notes
    except Exception:  # whatever a model raises that has no use for such a mask, or makes no cache
        pass
    return Trace(records, next((call for call in final if call.x is last), None), sample, mixers, plain, padded)


def compare(text_model: nn.Module, traced: Trace) -> str | None:
    """How the text model does something else than in the trace; None where it does the same."""
    again = [(before, run) for before, run in ((traced.plain, _run), (traced.padded, _run_padded)) if before.outputs]
    found = (_compare(text_model, traced, before, run) for before, run in again)
    return next((why for why in found if why is not None), None)


def _compare(text_model: nn.Module, traced: Trace, before: Rehearsal, run: Callable) -> str | None:
    """Attention is given what it was given before, and compared by itself: in half precision the rounding of the layers below,
    which grows from one to the next, would hide what a wrong mask does."""
    outputs: list[Tensor] = []
    given = (x for x, _ in before.calls)
    try:
        with _hooks(traced.mixers, lambda x, output: outputs.append(output), replace=lambda x: next(given)):
            now = run(text_model, traced.sample)
    except Exception as error:  # of a model that does something else with masks than passing them on
        return f"does not run ({type(error).__name__}: {error})"
    if len(outputs) != len(before.calls):
        return f"calls its attention {len(outputs)} times instead of {len(before.calls)}"
    for got, (_, expected) in zip(outputs, before.calls, strict=True):
        error = token_errors(got, expected, before.valid).max()
        if not error <= _tolerance(expected.dtype):
            return f"attends otherwise: a token's attention differs from the original by {error:.1e} relative"
    for got, expected in zip(now.outputs, before.outputs, strict=True):
        error = _most(token_errors(got, expected, before.valid))
        if not error <= _tolerance(expected.dtype):
            return f"differs from the original by {error:.1e} relative, more than {_tolerance(expected.dtype):.1e}"
    return None


def _tolerance(dtype: torch.dtype) -> float:
    """Eight roundings in half precision; in float32 room for TF32."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _most(errors: Tensor) -> Tensor:
    """What three of four tokens stay below: rounding may send a few to another expert."""
    return errors.quantile(0.75)


@contextmanager
def _hooks(
    modules: list[nn.Module], tell: Callable[[Tensor, Tensor], None], replace: Callable[[Tensor], Tensor] | None = None
) -> Iterator[None]:
    """Inside the block these modules are given replace(x) instead of hidden states x; tell(x, output) hears what they gave."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": replace(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tell(args[0] if args else kwargs["hidden_states"], first(output))

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    if replace is not None:
        handles += [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample(text_model: nn.Module, layers: nn.ModuleList) -> dict[str, Tensor]:
    """The ids [2, 7] of random tokens, and what comes with them."""
    parameter, config = next(layers[0].parameters()), text_model.config
    device = "cpu" if parameter.is_meta else parameter.device  # offloaded weights come with hooks that move their inputs
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, config.hidden_size, generator=generator).to(device=device, dtype=text_model.dtype)
    ids = torch.randint(config.vocab_size, (2, 7), generator=generator).to(device)
    return {"input_ids": ids} | _random_images(text_model, states)


@torch.no_grad()
def _run(text_model: nn.Module, sample: dict[str, Tensor]) -> Rehearsal:
    return Rehearsal([text_model(**sample, use_cache=False)[0]])


@torch.no_grad()
def _run_padded(text_model: nn.Module, sample: dict[str, Tensor]) -> Rehearsal:
    """A prompt behind padding, the last tokens as a decode step."""
    ids = sample["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, :3] = 0
    if len(sample) > 1:  # a step of cross-attention wants other masks
        return Rehearsal([text_model(**sample, attention_mask=mask, use_cache=False)[0]], valid=mask.bool())
    prompt = text_model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    cache = {cache_name(text_model): returned_cache(prompt)}
    step = text_model(input_ids=ids[:, -1:], attention_mask=mask, use_cache=True, **cache)
    return Rehearsal([prompt[0], step[0]], valid=mask[:, :-1].bool())


def _random_images(text_model: nn.Module, states: Tensor) -> dict[str, Tensor]:
    """For a text model that reaches images by cross-attention: as many image tokens as text, which some text cannot see."""
    if "cross_attention_states" not in inspect.signature(text_model.forward).parameters:
        return {}
    batch, length, _ = states.shape
    sighted = states.new_ones(batch, 1, length, 1)
    sighted[:, :, :2] = 0
    mask = states.new_zeros(batch, 1, length, length)
    mask[..., 2:, -1] = torch.finfo(mask.dtype).min
    return {
        "cross_attention_states": states.flip(1),
        "cross_attention_mask": mask,
        "full_text_row_masked_out_mask": sighted,
    }


def _note_layer(record: LayerTrace) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        record.args, record.kwargs, record.output = args, kwargs, output

    return hook


def _note_call(calls: list[Call], name: str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(name, args, kwargs, output))

    return hook


def fuse_norm(norm: nn.Module, call: Call) -> FusedNorm | str:
    """The fused form of a norm module that is called like this, proved on random tensors; or why there is none."""
    if not call.is_unary or call.kwargs:
        return "is not called with one positional tensor"
    x = call.x
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or tuple(weight.shape) != tuple(x.shape[-1:]) or not isinstance(eps, float):
        return "is not a norm over the hidden size"
    if forward_slot(norm) is None:
        return "has a forward of its own on the instance already"
    if weight.is_meta:
        return "has its weights offloaded"
    # Off-centre rows tell RMSNorm from LayerNorm, small ones show where eps comes in.
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(4, x.shape[-1], generator=generator) + 1) * torch.tensor([[1.0], [30.0], [0.1], [1e-3]])
    rows = rows.to(device=weight.device, dtype=x.dtype)
    try:
        expected = type(norm).forward(norm, rows)
    except Exception as error:  # whatever a norm of another kind raises on rows without a batch
        return f"does not run ({type(error).__name__}: {error})"
    if not isinstance(expected, Tensor):
        return f"returns a {type(expected).__name__}"
    for kind, offset in (("rms", 0.0), ("rms", 1.0), ("layer", 0.0)):
        candidate = FusedNorm(norm, kind, eps, offset)
        if _norm_agrees(candidate, rows, expected):
            return candidate
    return "is neither RMSNorm, RMSNorm with 1 + weight, nor LayerNorm"


def _norm_agrees(candidate: FusedNorm, x: Tensor, expected: Tensor) -> bool:
    """Whether the original is this formula within rounding, and the fused norm within twice its error against float64."""
    exact = _exact_norm(candidate, x)
    rounding = torch.finfo(x.dtype).eps * exact.abs().max()
    error = (expected - exact).abs().max()
    if expected.dtype != x.dtype or not error <= 4 * rounding:
        return False
    got, _ = candidate.compute(x, None)
    return got.dtype == expected.dtype and bool((got - exact).abs().max() <= 2 * error + rounding)


def _exact_norm(candidate: FusedNorm, x: Tensor) -> Tensor:
    x, weight = x.double(), candidate.norm.weight.double()
    if candidate.kind == "layer":
        bias = getattr(candidate.norm, "bias", None)
        return nn.functional.layer_norm(x, weight.shape, weight, None if bias is None else bias.double(), candidate.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + candidate.eps) * (weight + candidate.weight_offset)


def forward_slot(module: nn.Module) -> str | None:
    """The attribute that holds what `module(...)` runs; None where someone else has replaced it."""
    own = module.__dict__.get("forward")
    if own is None or getattr(own, "__func__", None) is type(module).forward:  # accelerate's hooks leave it when they go
        return "forward"
    return "_old_forward" if "_hf_hook" in module.__dict__ else None  # accelerate's hooks call that in between


def pattern(record: LayerTrace, is_norm: Callable[[nn.Module], bool]) -> str:
    """The order in which a layer calls its children, in the letters of PATTERNS."""
    return "".join("n" if is_norm(getattr(record.module, call.name)) else "b" for call in record.calls)


def roles(record: LayerTrace, shape: str) -> dict[str, str | None]:
    """Which child plays which part in a layer of one of PATTERNS."""
    names = [call.name for call in record.calls]
    parts = {
        "nbnb": ("input_norm", "attention", "middle_norm", "mlp"),
        "nbnnbn": ("input_norm", "attention", "attention_norm", "middle_norm", "mlp", "mlp_norm"),
        "nbb": ("input_norm", "attention", "mlp"),
    }[shape]
    empty = dict.fromkeys(("input_norm", "attention", "attention_norm", "middle_norm", "mlp", "mlp_norm"))
    return empty | dict(zip(parts, names, strict=True))


def fuse_layer(
    record: LayerTrace, index: int, names: dict[str, str | None], middle: FusedNorm | None, end: FusedNorm | None
) -> FusedLayer:
    """The fused form of a layer, not proved yet."""
    kind = FusedCrossLayer if record.crosses and len(gates(record.module)) == 2 else FusedLayer
    fused = kind(record.module, index, names, middle, end)
    fused.note_unproved(record)
    return fused


def prove(fused: FusedLayer, record: LayerTrace) -> str | None:
    """None when the fused layer does what the original did in the trace, else how it differs."""
    if not next(call for call in record.calls if call.name == fused.names["mlp"]).is_unary:
        return "calls its MLP with more than the hidden states"
    fused.returns_tuple = isinstance(record.output, tuple)
    if fused.returns_tuple and len(record.output) > 1:
        return f"returns {len(record.output)} values"
    renamed = fused.renamed(record)
    if renamed:
        return f"hands {', '.join(renamed)} to its attention, by names that it is not given itself"
    return differs(fused, record)


def differs(layer: SteeredLayer, record: LayerTrace) -> str | None:
    """How a layer, or the norm after it, does something else than the original. Compared on the call of the trace, with hidden
    states so small that what the layer adds to them outweighs them: else it may be lost in their rounding."""
    args, kwargs = record.args, dict(record.kwargs)
    if args:
        args = (args[0] / SMALL, *args[1:])
    else:
        kwargs["hidden_states"] = kwargs["hidden_states"] / SMALL
    with torch.no_grad():
        output = first(type(layer.layer).forward(layer.layer, *args, **kwargs))
        got, why = reproduce(layer, args, kwargs, output)
        if why is None and layer.end is not None:
            why = _difference(layer.end(got), type(layer.end.norm).forward(layer.end.norm, output))
    return why


def reproduce(function: Callable, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Tensor | None, str | None]:
    """Runs `function` on a traced call: (its first output, None), or (None, how that differs from the traced one)."""
    try:
        with torch.no_grad():
            got = first(function(*args, **kwargs))
    except Exception as error:  # whatever another family's modules raise, they stay as they were
        return None, f"does not run ({type(error).__name__}: {error})"
    return got, _difference(got, first(output))


def token_errors(got: Tensor, expected: Tensor, valid: Tensor | None = None) -> Tensor:
    """Relative errors [tokens] of states [..., d]: of each token by itself, as the norm of one may be a hundred times that of
    the others. Tokens of next to no norm are compared with a tenth of the median one.

    valid: where tokens count, for states of its shape.
    """
    got, expected = got.double(), expected.double()
    if valid is not None and valid.shape == expected.shape[:-1]:
        got, expected = got[valid], expected[valid]
    norms = expected.norm(dim=-1)
    return ((got - expected).norm(dim=-1) / norms.clamp_min(float(norms.median()) / 10).clamp_min(1e-30)).flatten()


def _difference(got: Tensor, expected: Tensor) -> str | None:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"gives {got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    error, tolerance = _most(token_errors(got, expected)), max(1e-5, 2 * torch.finfo(expected.dtype).eps)
    return None if error <= tolerance else f"differs from the original by {error:.1e} relative, more than {tolerance:.1e}"
