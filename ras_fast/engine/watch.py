"""Notices that a model is no longer the one that graphs were captured of and prefixes were computed by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ras_fast.backend import forced_backend
from ras_fast.patching import Patch
from ras_fast.weights import held, modules_of, tensors_of, weights_of


class Watch:
    """Compares a model between the batches of an engine. What a batch itself attaches to the model, and takes off again, does
    not count, nor what its forwards write into a buffer ("longrope" frequencies). Plain attributes, configs and hooks' own
    states are not looked at (docs/methods.md)."""

    def __init__(self, model):
        self._model = model
        self.forget()

    def changed(self) -> bool:
        """To be called before a batch: whether the model is another one than after the latest `note`."""
        modules = [*modules_of(self._model)]
        buffers = tensors_of(held(modules, "_buffers"))
        self._differs = _state(self._model, modules)[1] != self._noted[1] or buffers[1] != self._buffers[1]
        return self._differs

    def note(self) -> None:
        """To be called after a batch. The first one on a changed model may leave something there for good: transformers' hooks,
        for instance."""
        modules = [*modules_of(self._model)]
        if self._differs:
            self._noted = _state(self._model, modules)
        buffers = tensors_of(held(modules, "_buffers"))
        if self._differs or buffers[1][:2] == self._buffers[1][:2]:  # a graph would not see another tensor in one's place
            self._buffers = buffers

    def forget(self) -> None:
        self._noted, self._buffers, self._differs = ([], ()), ([], ()), True


def _state(model, modules: list[nn.Module]) -> tuple[list, tuple]:
    """What a model computes by, but for its buffers: (objects, which must live for their ids to mean something; a key)."""
    patch, device = Patch.of(model), model.device.type
    objects: list = [*modules] if patch is None else [*modules, *patch.in_force()]
    for module in modules:
        own = module.__dict__
        if "forward" in own:
            objects.append(own["forward"])
        for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"]):
            if hooks:
                objects += hooks.values()
    weights, weights_key = weights_of(modules)
    steering, steering_key = tensors_of([thing for thing in objects if isinstance(thing, Tensor)])
    able = torch.amp.is_autocast_available(device)  # not on meta, where offloaded weights are
    modes = (forced_backend(), able and (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
    return [*objects, *weights, *steering], ([*map(id, objects)], weights_key, steering_key, modes)
