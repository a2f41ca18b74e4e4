"""Where a transformers model keeps its text model, that its decoder layers, who knows about images, and what hooks it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ras_fast.patching.tracking import token_ids


def transformers_model(model):
    """The transformers model inside what `torch.compile` makes of it, or a PEFT one, whose adapters are modules of it; else the
    model itself."""
    while hasattr(model, "_orig_mod") or hasattr(model, "get_base_model"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.get_base_model()
    return model


def find_decoder(model: Any) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    """(the transformers model, its text model, the text model's decoder layers).

    Raises TypeError where there is no such model, or none with decoder layers.
    """
    from transformers import PreTrainedModel

    modules = model.modules() if isinstance(model, nn.Module) else ()
    root = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if root is None:
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers model, as AutoModel classes give")
    found = next(iter(stacks(root)), None)
    if found is None:
        raise TypeError(f"model is a {type(root).__name__}, in which no text model with decoder `layers` was found")
    return root, *found


def text_dtype(model: Any) -> torch.dtype:
    """That of the text model, and so of the states that logits are made of; a vision tower may be kept in another, by which
    the whole model then goes where it comes first."""
    return find_decoder(model)[1].dtype


def stacks(root: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """The models in it with the text config's layers: one, or an encoder and a decoder."""
    from transformers import PreTrainedModel

    config = root.config.get_text_config(decoder=True)
    models = (module for module in root.modules() if isinstance(module, PreTrainedModel) and module.config is config)
    found = ((model, getattr(model, "layers", None)) for model in models)
    return [(model, layers) for model, layers in found if isinstance(layers, nn.ModuleList) and len(layers)]


def owner(root: nn.Module, text_model: nn.Module) -> nn.Module | None:
    """The multimodal model: the innermost one around the text model whose config names image tokens."""
    return next((m for m in reversed(_down_to(root, text_model)) if hasattr(m, "config") and token_ids(m.config)), None)


def _down_to(root: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The modules from ``root`` to a part of it, each inside of the one before; with both."""
    name = next(name for name, module in root.named_modules() if module is part)
    modules = [root]
    for step in filter(None, name.split(".")):
        modules.append(modules[-1]._modules[step])
    return modules


def find_head(root: nn.Module) -> nn.Module | None:
    """What makes logits of the last states: the model's own head, or else that of a model in it, as Nemotron-H Omni's."""
    models = (module for module in root.modules() if hasattr(module, "get_output_embeddings"))
    return next((head for head in (model.get_output_embeddings() for model in models) if head is not None), None)


def looks_like_norm(module: nn.Module) -> bool:
    """By its name, or because its weight is a vector."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() or (isinstance(weight, Tensor) and weight.dim() == 1)


def is_watched(module: nn.Module, forward: Callable | None = None) -> bool:
    """Whether somebody would notice that the module is not called: by a hook, or by a forward of the instance's own that is not
    `forward`."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    return module.__dict__.get("forward") is not forward or has_foreign_hooks(module)


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks other than those of transformers, which only record outputs."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(only_records, hooks))


def is_heard(root: nn.Module, part: nn.Module) -> bool:
    """Whether hooks of others are given, and may change, what a part of a model gives: its own, or those of the modules around
    it inside of ``root``."""
    hooks = (hook for module in _down_to(root, part)[1:] for hook in module._forward_hooks.values())
    return not all(only_records(hook) or str(getattr(hook, "__module__", "")).startswith("ras_fast.") for hook in hooks)


def only_records(hook: Callable) -> bool:
    """Whether a hook is transformers' own, which it leaves on a module for good to record outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
