"""Which layers and norms can be fused: recognised by the order of a traced layer's calls, and then proved.

A layer is recognised by the order in which it calls its children (n: norm, b: anything else, attention first, then MLP):

    nbnb     pre-norm, as Llama: h += attention(norm(h)); h += mlp(norm(h))
    nbnnbn   sandwich norms, as Gemma: h += norm(attention(norm(h))); h += norm(mlp(norm(h)))
    nbb      parallel, as Cohere: h += attention(n) + mlp(n), n = norm(h)

and then checked: the fused norm and layer are compared with the original ones before they are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ras_fast.patching.layers import FusedCrossLayer, FusedLayer, FusedNorm, SteeredLayer, first, gates
from ras_fast.patching.trace import Call, LayerTrace, difference, reproduce, with_states
from ras_fast.patching.undo import forward_slot

PATTERNS = ("nbnb", "nbnnbn", "nbb")
SMALL = 64.0  # hidden states are divided by it where a layer is proved


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
    args, kwargs = with_states(record.args, record.kwargs, lambda states: states / SMALL)
    with torch.no_grad():
        output = first(type(layer.layer).forward(layer.layer, *args, **kwargs))
        got, why = reproduce(layer, args, kwargs, output)
        if why is None and layer.end is not None:
            why = difference(layer.end(got), type(layer.end.norm).forward(layer.end.norm, output))
    return why
