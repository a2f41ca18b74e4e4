"""Turns image statistics on: links a model's attention to what reads it, and proves that its answers stay the same."""

from __future__ import annotations

import gc
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ras_fast.patching.attention import STATE
from ras_fast.patching.report import NO_INTERFACE
from ras_fast.patching.state import AttentionState, Collection, ModelState
from ras_fast.patching.structure import looks_like_norm, owner, stacks
from ras_fast.patching.trace import LayerTrace, Trace, compare, reproduce
from ras_fast.patching.tracking import CrossRegionTracker, RecordFeatures, RegionTracker, token_ids
from ras_fast.patching.undo import Undo
from ras_fast.regions import RegionMap
from ras_fast.registration import EXPLICIT, NAME, register

_linked: WeakSet[nn.Module] = WeakSet()  # text models that were ever linked


def link(root: nn.Module, text_model: nn.Module, recorded: Trace, undo: Undo) -> tuple[ModelState | None, str | None]:
    """(the state that the model's attention is linked to now, None), or (None, why that is impossible).

    Raises ValueError where the model's config object is that of another linked model: both would set and restore its attention.
    """
    multimodal = owner(root, text_model)
    why = _why_not(root, multimodal, recorded)
    if why is not None:
        return None, why
    _refuse_shared_config(text_model)
    register()
    _linked.add(text_model)
    crosses = any(record.crosses for record in recorded.layers)
    state = ModelState((CrossRegionTracker if crosses else RegionTracker)(multimodal))
    before = undo.mark()
    name = _implementation(text_model.config._attn_implementation, recorded)
    for config in {id(c): c for c in (text_model.config, multimodal.config.get_text_config())}.values():
        undo.set(config, "_attn_implementation_internal", name)
    why = _link_layers(state, recorded, undo)
    if why is None:
        _follow_forwards(multimodal, text_model, state, undo)
        why = compare(text_model, recorded)
        why = why and f"the text model under this package's attention {why}"
    if why is not None:
        undo.restore(before)
        return None, why
    return state, None


def _refuse_shared_config(text_model: nn.Module) -> None:
    if _shares_config(text_model):
        gc.collect()  # a model that is gone may still lie in a cycle
        if _shares_config(text_model):
            raise ValueError(
                f"the config object of this {type(text_model).__name__} is that of another patched model: unpatch that first, "
                "build this one from a copy of the config made before that patch, or use ras_fast.patch(model, regions=False)"
            )


def _shares_config(text_model: nn.Module) -> bool:
    """Whether another model that is linked now has its config object."""
    others = (other for other in _linked if other is not text_model and other.config is text_model.config)
    return any(STATE in module.__dict__ for other in others for module in other.modules())


def _why_not(root: nn.Module, multimodal: nn.Module | None, recorded: Trace) -> str | None:
    if multimodal is None or not token_ids(multimodal.config):
        return "the model has no image tokens"
    if len(stacks(root)) > 1:
        return "an encoder and a decoder share the text model's config"
    if not all(record.called for record in recorded.layers):
        return "not every layer is called on plain text"
    return None


def _implementation(before: str, recorded: Trace) -> str:
    """The name under which this package's attention stands in for `before`.

    SDPA leaves masks out that others are given in full. That is faster, and the same where all modules attend to the text, and
    call themselves causal: not PaliGemma's, and not those of layers that attend to images.
    """
    modules = (getattr(record.module, call.name) for record in recorded.layers for call in record.calls)
    plain = all(getattr(module, "is_causal", True) for module in modules) and not any(r.crosses for r in recorded.layers)
    return NAME if plain or before == "sdpa" else EXPLICIT


def _link_layers(state: ModelState, recorded: Trace, undo: Undo) -> str | None:
    """Links each layer's attention to the model's state; returns why image statistics are impossible."""
    for index, record in enumerate(recorded.layers):
        why = _link_layer(state, index, record, undo)
        if why is not None:
            return f"the attention of layer {index} {why}"
    return None if state.layers else f"the layers {NO_INTERFACE}"


def _link_layer(model: ModelState, index: int, record: LayerTrace, undo: Undo) -> str | None:
    """Links a layer's attention, the first child that goes through transformers' attention interface, and proves it on the
    traced call; returns how it fails. A layer without such a child is left out."""
    sees_images = record.crosses or not isinstance(model.tracker, CrossRegionTracker)
    for call in record.calls:
        child = getattr(record.module, call.name)
        if looks_like_norm(child) or not isinstance(call.x, Tensor) or call.x.dim() != 3:
            continue
        before = undo.mark()
        state = model.layers[index] = AttentionState(model, index, sees_images=sees_images)
        undo.set(child, STATE, state)
        model.tracker.forward.regions = RegionMap(call.x.new_zeros(call.x.shape[:2], dtype=torch.int32), 1)
        with model.collecting(Collection(1, False, "mean", frozenset([index]))) as statistics:
            _, why = reproduce(child, call.args, call.kwargs, call.output)
        model.tracker.forward.regions = None
        if why is not None:
            return why
        if index in statistics.mass:
            state.heads = statistics.mass[index].shape[1]
            return None
        undo.restore(before)
        del model.layers[index]
    return None


def _follow_forwards(multimodal: nn.Module, text_model: nn.Module, state: ModelState, undo: Undo) -> None:
    """Hooks that find the image tokens of each forward."""
    tracker = state.tracker
    for modality in ("image", "video"):
        if hasattr(type(multimodal), f"get_{modality}_features"):
            undo.set(multimodal, f"get_{modality}_features", RecordFeatures(multimodal, modality, tracker))
    undo.hook_before(multimodal, tracker.before_model)
    undo.hook_before(text_model, state.before_text)
    for module in (text_model, multimodal):
        undo.hook_after(module, tracker.after, always_call=True)
