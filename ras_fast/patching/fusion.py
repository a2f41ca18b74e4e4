"""Which layers, norms and rotary embeddings can be fused: recognised in a traced layer's calls, and then proved.

A layer is recognised by the order in which it calls its children (n: norm, b: anything else, attention first, then MLP):

    nbnb     pre-norm, as Llama: h += attention(norm(h)); h += mlp(norm(h))
    nbnnbn   sandwich norms, as Gemma: h += norm(attention(norm(h))); h += norm(mlp(norm(h)))
    bnbn     post-norm, as OLMo 2: h += norm(attention(h)); h += norm(mlp(h))
    nbb      parallel, as Cohere: h += attention(n) + mlp(n), n = norm(h)
    nb       one block a layer, whichever it is, as Nemotron-H: h += block(norm(h))

and two that continue the sandwich, FusedInputLayer and FusedMixtureLayer (layers.py),

and is then checked: fused norms, layers and attention modules are compared with the original ones before they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast.memory import reraise_out_of_memory
from ras_fast.patching.layers import (
    FusedBlock,
    FusedCrossLayer,
    FusedInputLayer,
    FusedLayer,
    FusedMixtureLayer,
    FusedNorm,
    SteeredLayer,
    Sum,
    WeightlessNorm,
    gates,
)
from ras_fast.patching.report import Report
from ras_fast.patching.rotary import FusedRotation, proved_rotation, proved_tower_rotation
from ras_fast.patching.structure import looks_like_norm
from ras_fast.patching.trace import Call, LayerTrace, Trace, compare, difference, first, reproduce, with_states
from ras_fast.patching.undo import Undo, forward_slot

# Which child plays which part, by the order of calls.
PATTERNS = {
    "nbnb": ("input_norm", "attention", "middle_norm", "mlp"),
    "nbnnbn": ("input_norm", "attention", "attention_norm", "middle_norm", "mlp", "mlp_norm"),
    "bnbn": ("attention", "attention_norm", "mlp", "mlp_norm"),
    "nbb": ("input_norm", "attention", "mlp"),
    "nb": ("input_norm", "attention"),
    "nbnnbnbbbn": (
        "input_norm", "attention", "attention_norm", "middle_norm", "mlp", "mlp_norm", "gate", "activation", "projection",
        "projection_norm",
    ),
    "nbnnbnbnbnn": (
        "input_norm", "attention", "attention_norm", "middle_norm", "mlp", "dense_norm", "router", "experts_input_norm",
        "experts", "experts_norm", "mlp_norm",
    ),
}  # fmt: skip
KINDS = {"nb": FusedBlock, "nbnnbnbbbn": FusedInputLayer, "nbnnbnbnbnn": FusedMixtureLayer}
SMALL = 64.0  # hidden states are divided by it where a layer is proved


@dataclass
class Fused:
    """What stands in for decoder layers, by index, and for the final norm (None: nothing)."""

    layers: dict[int, SteeredLayer] = field(default_factory=dict)
    final_norm: FusedNorm | None = None

    @property
    def places(self) -> list[SteeredLayer | FusedNorm]:
        """All that can be steered."""
        return [*self.layers.values(), *([] if self.final_norm is None else [self.final_norm])]

    def forget_skipped(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of the text model. Without images, cross-attention layers are skipped and the norms computed ahead for them are
        never fetched."""
        for layer in self.layers.values():
            if layer.end is not None:
                layer.end.forget()


def fuse(root: nn.Module, text_model: nn.Module, recorded: Trace, undo: Undo, report: Report) -> Fused:
    """Fuses what can be proved, from the trace of the unpatched text model of ``root``, and undoes all of it where that gives
    something else with it. What was done is noted in ``report``."""
    before = undo.mark()
    fused = _Fusion(root, text_model, recorded, undo, report).run()
    why = compare(text_model, recorded)
    if why is None:
        return fused
    undo.restore(before)
    report.fused_layers = report.fused_norms = report.other_norms = report.rotations = report.tower_rotations = 0
    report.unfused = {type(text_model).__name__: f"with fused layers it {why}"}
    return Fused()


class _Fusion:
    """One run of `fuse`.

    names: of the text model's modules, by their ids.
    norms: by id of a norm module, its fused form, which is in place of its forward, or why there is none.
    """

    def __init__(self, root: nn.Module, text_model: nn.Module, recorded: Trace, undo: Undo, report: Report) -> None:
        self.root, self.text_model, self.recorded, self.undo, self.report = root, text_model, recorded, undo, report
        self.names = {id(module): name for name, module in text_model.named_modules()}
        self.norms: dict[int, FusedNorm | str] = {}
        self.fused = Fused()

    def run(self) -> Fused:
        self._fuse_norms()
        self._fuse_other_norms()
        self._fuse_rotations()
        self._fuse_tower_rotations()
        self.fused.final_norm = self._fused_norm(self.text_model, self.recorded.final_norm)
        for index, record in enumerate(self.recorded.layers):
            why = self._fuse_layer(index)
            if why is not None:
                self.report.unfused[self.names[id(record.module)]] = why
        self.report.unfused |= {self.names[module]: why for module, why in self.norms.items() if isinstance(why, str)}
        if any(record.crosses for record in self.recorded.layers):
            self.undo.hook_after(self.text_model, self.fused.forget_skipped)
        return self.fused

    def _fuse_norms(self) -> None:
        calls = [(record.module, call) for record in self.recorded.layers for call in record.calls]
        if self.recorded.final_norm is not None:
            calls.append((self.text_model, self.recorded.final_norm))
        for parent, call in calls:
            module = getattr(parent, call.name)
            if not looks_like_norm(module) or id(module) in self.norms:
                continue
            with torch.no_grad():
                self.norms[id(module)] = candidate = _fuse_norm(module, call)
            if isinstance(candidate, FusedNorm):
                self.undo.set(module, forward_slot(module), candidate)

    def _fuse_other_norms(self) -> None:
        """Those that no sum precedes, as of queries and keys or in the vision tower. torch has one kernel for LayerNorm."""
        device = next(self.root.parameters()).device
        for module in list(self.root.modules()):
            slot = forward_slot(module)
            if id(module) in self.norms or slot is None or isinstance(module, nn.LayerNorm) or not looks_like_norm(module):
                continue
            with torch.no_grad():
                fused = _proved_other_norm(module, device)
            if isinstance(fused, FusedNorm):
                self.undo.set(module, slot, fused)
                self.report.other_norms += 1

    def _fuse_rotations(self) -> None:
        for record in self.recorded.layers:
            for call in (call for call in record.calls if call.mixes):
                attention = getattr(record.module, call.name)
                slot = forward_slot(attention)
                fused = None if slot is None else proved_rotation(attention, call)
                if isinstance(fused, FusedRotation):
                    self.undo.set(attention, slot, fused)
                    self.report.rotations += 1
                elif fused is not None:
                    self.report.unfused[self.names[id(attention)]] = fused

    def _fuse_tower_rotations(self) -> None:
        """Those outside of the text model."""
        for module in list(self.root.modules()):
            slot = None if id(module) in self.names else forward_slot(module)
            if slot is None:
                continue
            with torch.no_grad():
                fused = proved_tower_rotation(module)
            if fused is not None:
                self.undo.set(module, slot, fused)
                self.report.tower_rotations += 1

    def _fused_norm(self, parent: nn.Module, call: Call | None) -> FusedNorm | None:
        """The fused form of the child that was called; None where it has none."""
        norm = None if call is None else self.norms.get(id(getattr(parent, call.name)))
        return norm if isinstance(norm, FusedNorm) else None

    def _fuse_layer(self, index: int) -> str | None:
        """Fuses one layer; returns why not. One that cannot be fused can still be steered and read."""
        record = self.recorded.layers[index]
        shape = "".join("b" if self._fused_norm(record.module, call) is None else "n" for call in record.calls)
        self.report.norms += 1 if shape in ("nbb", "nb") else 2
        if not record.called:
            return "is not called"
        slot = forward_slot(record.module)
        if slot is None:
            return "has a forward of its own on the instance already"
        states = (*self.recorded.sample["input_ids"].shape, self.text_model.config.hidden_size)
        given = tuple(getattr(first(record.output), "shape", ()))
        if given != states:
            return f"gives {given} instead of hidden states {states}"
        end = self._next_norm(index)
        layer, why = self._proved_layer(index, shape, end)
        if why is None:
            self.report.fused_layers += 1
            self.report.fused_norms += layer.fused_adds
        else:
            layer = SteeredLayer(record.module, index, end)
            if not _is_offloaded(record.module) and _differs(layer, record) is not None:
                return why
        layer.crosses = record.crosses
        self.undo.set(record.module, slot, layer)
        self.fused.layers[index] = layer
        return why

    def _next_norm(self, index: int) -> FusedNorm | None:
        """The norm that is applied to a layer's output, where it is fused and on the same device."""
        output = first(self.recorded.layers[index].output)
        if index + 1 < len(self.recorded.layers):
            following = self.recorded.layers[index + 1]
            parent, call = following.module, next(iter(following.calls), None)
        else:
            parent, call = self.text_model, self.recorded.final_norm
        norm = self._fused_norm(parent, call)
        return norm if norm is not None and call.x is output and norm.norm.weight.device == output.device else None

    def _proved_layer(self, index: int, shape: str, end: FusedNorm | None) -> tuple[FusedLayer | None, str | None]:
        """(the fused form of a layer, None), or (None, why there is none)."""
        record = self.recorded.layers[index]
        if shape not in PATTERNS:
            return None, f"calls its children in the order {shape!r}; known are {', '.join(PATTERNS)}"
        names = dict(zip(PATTERNS[shape], (call.name for call in record.calls), strict=True))
        fused = ((part, self.norms.get(id(getattr(record.module, name)))) for part, name in names.items())
        norms = {part: norm for part, norm in fused if isinstance(norm, FusedNorm)}
        crosses = record.crosses and len(gates(record.module)) == 2
        kind = FusedCrossLayer if crosses else KINDS.get(shape, FusedLayer)
        layer = kind(record.module, index, names, norms, end)
        layer.note_unproved(record)
        why = _prove(layer, record)
        return (layer, None) if why is None else (None, why)


def _fuse_norm(norm: nn.Module, call: Call) -> FusedNorm | str:
    """The fused form of a norm module that is called like this; or why there is none."""
    if not call.is_unary or call.kwargs:
        return "is not called with one positional tensor"
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != tuple(call.x.shape[-1:]):
        return "is not a norm over the hidden size"
    if forward_slot(norm) is None:
        return "has a forward of its own on the instance already"
    return _proved_norm(norm, call.x.dtype, 4)


def _proved_other_norm(norm: nn.Module, device: torch.device) -> FusedNorm | str:
    """The fused form of a norm module with a weight [d] or without parameters; or why there is none."""
    weight, leading = getattr(norm, "weight", None), (2, 2)  # dimensions that tell a norm over channels from one of rows
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return _proved_norm(norm, weight.dtype, *leading)
    if next(norm.parameters(), None) is not None:
        return "has other parameters"
    candidate = WeightlessNorm(norm, _eps_name(norm))
    proofs = [_proved([candidate], _rows(leading, 16, device, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    return next((why for why in proofs if isinstance(why, str)), candidate)


def _proved_norm(norm: nn.Module, dtype: torch.dtype, *leading: int) -> FusedNorm | str:
    """The fused form of a norm module with a weight [d], proved on random rows [*leading, d] of this dtype, four in all; or why
    there is none."""
    if norm.weight.is_meta:
        return "has its weights offloaded"
    forms = (("rms", 0.0), ("rms", 1.0), ("layer", 0.0))
    candidates = [FusedNorm(norm, kind, _eps_name(norm), offset) for kind, offset in forms]
    return _proved(candidates, _rows(leading, len(norm.weight), norm.weight.device, dtype))


def _eps_name(norm: nn.Module) -> str:
    return "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"


def _rows(leading: tuple[int, ...], d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Four random rows: off-centre ones tell RMSNorm from LayerNorm, small ones show where eps comes in."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[1.0], [30.0], [0.1], [1e-3]], device="cpu")
    rows = (torch.randn(4, d, generator=generator, device="cpu") + 1) * scales
    return rows.to(device=device, dtype=dtype).view(*leading, d)


def _proved(candidates: list[FusedNorm], rows: Tensor) -> FusedNorm | str:
    """The first that does on these rows what the norm does that they are for; or why none does."""
    norm = candidates[0].norm
    if not isinstance(getattr(norm, candidates[0].eps_name, None), float):
        return "is not a norm over the hidden size"
    try:
        expected = type(norm).forward(norm, rows)
    except Exception as error:  # whatever a norm of another kind raises on rows without a batch
        reraise_out_of_memory(error)
        return f"does not run ({type(error).__name__}: {error})"
    if not isinstance(expected, Tensor) or expected.shape != rows.shape:
        return f"returns a {type(expected).__name__} of another shape"
    for candidate in candidates:
        try:
            agrees = _norm_agrees(candidate, rows, expected)
        except (RuntimeError, ValueError) as error:  # of what the op does not take
            reraise_out_of_memory(error)
            return f"cannot be fused ({error})"
        if agrees:
            return candidate
    return f"is neither RMSNorm, RMSNorm with 1 + weight, nor LayerNorm to within the rounding of {rows.dtype}"


def _norm_agrees(candidate: FusedNorm, x: Tensor, expected: Tensor) -> bool:
    """Whether the original is this formula within rounding, and the fused norm within twice its error against float64."""
    exact = _exact_norm(candidate, x)
    rounding = torch.finfo(x.dtype).eps * exact.abs().max()
    error = (expected - exact).abs().max()
    if expected.dtype != x.dtype or not error <= 4 * rounding:
        return False
    got, _ = candidate.compute(Sum(x))
    return got.dtype == expected.dtype and bool((got - exact).abs().max() <= 2 * error + rounding)


def _exact_norm(candidate: FusedNorm, x: Tensor) -> Tensor:
    x, weight = x.double(), candidate.weight(x).double()
    if candidate.kind == "layer":
        bias = getattr(candidate.norm, "bias", None)
        return nn.functional.layer_norm(x, weight.shape, weight, None if bias is None else bias.double(), candidate.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + candidate.eps) * (weight + candidate.weight_offset)


def _prove(layer: FusedLayer, record: LayerTrace) -> str | None:
    """None when the fused layer does what the original did in the trace, else how it differs."""
    if not all(call.is_unary for call in record.calls if call.name == layer.names.get("mlp")):
        return "calls its MLP with more than the hidden states"
    if _is_offloaded(layer.layer):
        return "has its weights offloaded"
    why = layer.note_output(record)
    if why is not None:
        return why
    renamed = layer.renamed(record)
    if renamed:
        return f"hands {', '.join(renamed)} to its attention, by names that it is not given itself"
    return _differs(layer, record)


def _is_offloaded(layer: nn.Module) -> bool:
    """Whether weights of the layer's own, as the gates of Mllama's, are there for its own call alone: without it nothing can be
    compared."""
    return any(parameter.is_meta for parameter in layer.parameters(recurse=False))


def _differs(layer: SteeredLayer, record: LayerTrace) -> str | None:
    """How a layer, or the norm after it, does something else than the original. Compared on the call of the trace, with hidden
    states so small that what the layer adds to them outweighs them: else it may be lost in their rounding."""
    args, kwargs = with_states(record.args, record.kwargs, lambda states: states / SMALL)
    with torch.no_grad():
        output = first(type(layer.layer).forward(layer.layer, *args, **kwargs))
        got, why = reproduce(layer, args, kwargs, output)
        if why is None and layer.end is not None:
            why = difference(layer.end(got), type(layer.end.norm).forward(layer.end.norm, output))
    return why
