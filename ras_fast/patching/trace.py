"""What small forwards of a text model show, and whether it still does the same when it is patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast.memory import reraise_out_of_memory
from ras_fast.patching.cache_values import cache_name, returned_cache


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

    outputs: what it gave, each [B, T, d].
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
    linears: the calls of the layers' linear layers, with what each was given.
    plain, padded: what it gives, and behind left padding and, if it makes a cache, in a step; nothing there for a model that
        does not take such a mask.
    run_padded: runs the text model as it was run for `padded`.
    """

    layers: list[LayerTrace]
    final_norm: Call | None
    sample: dict[str, Tensor]
    mixers: list[nn.Module]
    linears: list[tuple[nn.Linear, Tensor]]
    plain: Rehearsal
    padded: Rehearsal
    run_padded: Callable[[nn.Module, dict[str, Tensor]], Rehearsal]


def trace(text_model: nn.Module, layers: nn.ModuleList) -> Trace:
    """Runs the text model on a few random tokens and notes what each layer was given, called and returned."""
    records = [LayerTrace(layer) for layer in layers]
    final: list[Call] = []
    linears: list[tuple[nn.Linear, Tensor]] = []
    with ExitStack() as hooks:
        for module in layers.modules():
            if type(module) is nn.Linear:
                hooks.enter_context(module.register_forward_hook(_note_linear(linears)))
        for record in records:
            hooks.enter_context(record.module.register_forward_hook(_note_layer(record), with_kwargs=True))
            for name, child in record.module.named_children():
                if not isinstance(child, (nn.Dropout, nn.Identity)):  # nothing, in a model that answers
                    hooks.enter_context(child.register_forward_hook(_note_call(record.calls, name), with_kwargs=True))
        for name, child in text_model.named_children():
            if child is not layers:
                hooks.enter_context(child.register_forward_hook(_note_call(final, name), with_kwargs=True))
        sample = _sample(text_model, layers)
        plain = _run(text_model, sample)
    last = next((first(record.output) for record in reversed(records) if record.called), None)
    calls = [(record.module, call) for record in records for call in record.calls if call.mixes]
    mixers = list(dict.fromkeys(getattr(layer, call.name) for layer, call in calls))
    plain.calls = [(call.x, first(call.output)) for _, call in calls]
    padded, run = _rehearsed_padding(text_model, sample, mixers)
    final_norm = next((call for call in final if call.x is last), None)
    return Trace(records, final_norm, sample, mixers, linears, plain, padded, run)


def _rehearsed_padding(text_model: nn.Module, sample: dict[str, Tensor], mixers: list[nn.Module]) -> tuple[Rehearsal, Callable]:
    """What it gives behind padding, and how it was run for that."""
    runs = (_run_padded,) if len(sample) > 1 else (_run_step, _run_padded)  # a step of cross-attention wants other masks
    for run in runs:
        notes: list[tuple[Tensor, Tensor]] = []
        try:
            with _hooks(mixers, lambda x, output, notes=notes: notes.append((x, output))):
                padded = run(text_model, sample)
        except Exception as error:  # whatever a model raises that has no use for such a mask, or makes no cache
            reraise_out_of_memory(error)
            continue
        padded.calls = notes
        return padded, run
    return Rehearsal(), run


def compare(text_model: nn.Module, traced: Trace) -> str | None:
    """How the text model does something else than in the trace; None where it does the same."""
    both = (traced.plain, _run), (traced.padded, traced.run_padded)
    again = [(before, run) for before, run in both if before.outputs]
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
        reraise_out_of_memory(error)
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
        return with_states(args, kwargs, replace)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tell(states_of(args, kwargs), first(output))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(after, with_kwargs=True))
            if replace is not None:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        yield


def first(output: Any) -> Tensor:
    """The hidden states that a layer or an attention returns, alone or before others."""
    return output[0] if isinstance(output, tuple) else output


def states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a call is given, which go first or by their name."""
    return args[0] if args else kwargs["hidden_states"]


def with_states(args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with other hidden states."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def _sample(text_model: nn.Module, layers: nn.ModuleList) -> dict[str, Tensor]:
    """The ids [2, 7] of random tokens, and what comes with them."""
    parameter, config = next(layers[0].parameters()), text_model.config
    device = "cpu" if parameter.is_meta else parameter.device  # offloaded weights come with hooks that move their inputs
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, config.hidden_size, generator=generator, device="cpu").to(device=device, dtype=text_model.dtype)
    ids = torch.randint(config.vocab_size, (2, 7), generator=generator, device="cpu").to(device)
    return {"input_ids": ids} | _random_images(text_model, states)


@torch.no_grad()
def _run(text_model: nn.Module, sample: dict[str, Tensor]) -> Rehearsal:
    return Rehearsal([text_model(**sample, use_cache=False)[0]])


def _padding(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, :3] = 0
    return mask


@torch.no_grad()
def _run_padded(text_model: nn.Module, sample: dict[str, Tensor]) -> Rehearsal:
    """A prompt behind padding."""
    mask = _padding(sample["input_ids"])
    return Rehearsal([text_model(**sample, attention_mask=mask, use_cache=False)[0]], valid=mask.bool())


@torch.no_grad()
def _run_step(text_model: nn.Module, sample: dict[str, Tensor]) -> Rehearsal:
    """The same, the last tokens as a decode step."""
    ids, mask = sample["input_ids"], _padding(sample["input_ids"])
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


def _note_linear(calls: list[tuple[nn.Linear, Tensor]]) -> Callable:
    def hook(module: nn.Linear, args: tuple, output: Any) -> None:
        if args:
            calls.append((module, args[0]))

    return hook


def reproduce(function: Callable, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Tensor | None, str | None]:
    """Runs `function` on a traced call: (its first output, None), or (None, how that differs from the traced one)."""
    try:
        with torch.no_grad():
            got = first(function(*args, **kwargs))
    except Exception as error:  # whatever another family's modules raise, they stay as they were
        reraise_out_of_memory(error)  # which says nothing about the family, and may be over at the next call
        return None, f"does not run ({type(error).__name__}: {error})"
    return got, difference(got, first(output))


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


def difference(got: Tensor, expected: Tensor) -> str | None:
    """How states [..., d] are others than those expected, in dtype, shape, or three of four tokens by more than rounding; None
    where they are the same."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"gives {got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    error, tolerance = _most(token_errors(got, expected)), max(1e-5, 2 * torch.finfo(expected.dtype).eps)
    return None if error <= tolerance else f"differs from the original by {error:.1e} relative, more than {tolerance:.1e}"
