"""What a model holds - modules, weights, adapters - and whether it is still what it was."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch


def adapters_of(module: torch.nn.Module) -> tuple | None:
    """How the PEFT adapters of a layer act now: (whether they are off, the active ones, their scales, those that are merged
    into its weights). None for a layer without adapters."""
    own = module.__dict__
    if "_active_adapter" not in own:
        return None
    active, scales = own["_active_adapter"], own.get("scaling", {})
    active = (active,) if isinstance(active, str) else tuple(active)
    merged = tuple(own.get("merged_adapters", ()))
    return own.get("_disable_adapters", False), active, tuple(scales.get(name) for name in active), merged


def weights_of(modules: list[torch.nn.Module]) -> tuple[list, tuple]:
    """(objects, which must live for their ids to mean something; a key), of the parameters and adapters of a model's
    `modules_of`. While the key stays the same, so does `fingerprint`, but for values written through `tensor.data`."""
    objects, key = tensors_of(held(modules, "_parameters"))
    return objects, (key, [adapters_of(module) for module in modules if "_active_adapter" in module.__dict__])


def held(modules: list[torch.nn.Module], kind: str) -> list[torch.Tensor]:
    """What these modules themselves hold of a kind: "_parameters" or "_buffers"."""
    return [tensor for module in modules for tensor in module.__dict__[kind].values() if tensor is not None]


def tensors_of(tensors: list[torch.Tensor]) -> tuple[list, tuple]:
    """As `weights_of`, of these tensors."""
    references = [*map(weakref.ref, tensors)]  # to keep old weights alive could take all the memory
    written = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]  # inference tensors do not count it
    return references, ([*map(id, references)], [tensor.data_ptr() for tensor in tensors], written)


def modules_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`model.modules()` by levels, and in a fraction of its time."""
    found, seen = [model], {model}
    for module in found:
        yield module
        for child in module.__dict__["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
