"""What a model, its processor and its prompts have to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ras_fast.patching.tracking import token_ids
from ras_fast.profile import RasProfile
from ras_fast.weights import modules_of


def check_parts(model, processor, profile) -> None:
    """Raises ValueError for what cannot be a model in eval mode, its processor and a profile."""
    if not isinstance(profile, RasProfile):
        raise ValueError(f"profile is a {type(profile).__name__}; it needs to be a RasProfile (RasProfile.from_pretrained)")
    check_model(model, processor)


def check_model(model, processor) -> None:
    """Raises ValueError for what cannot be a model in eval mode and its processor."""
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model is a {type(model).__name__}; it needs to be a transformers model")
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"processor is a {type(processor).__name__}; it needs to be the model's multimodal processor")
    check_mode(model)


def check_mode(model) -> None:
    """Raises ValueError for a model with a part in training mode, whose dropout would make every answer another one."""

    def trains(module: torch.nn.Module) -> bool:
        return module.training and not isinstance(module, torch.nn.Identity)  # PEFT adds some that do nothing, in training mode

    if not any(map(trains, modules_of(model))):
        return
    part = next(name for name, module in model.named_modules() if trains(module))
    raise ValueError(f"model is in training mode{part and f' at {part}'}; it needs to be in eval mode: call model.eval()")


class TooLong(ValueError):
    """A prompt has more tokens than the model has positions."""


def check_length(model, prompt: Sequence[int]) -> None:
    """Raises TooLong for a prompt, as token ids, that takes more positions than the model has."""
    check_positions(model, _least_positions(model, prompt))


def check_positions(model, taken: int) -> None:
    """Raises TooLong for a prompt that takes more positions than the model has, however its RoPE is scaled: what it says of
    such a prompt, and so its risk, means nothing."""
    trained = positions_of(model)
    if taken > trained:
        raise TooLong(f"a prompt has {taken} tokens; {type(model).__name__} has {trained} positions")


def _least_positions(model, prompt: Sequence[int]) -> int:
    """How many positions a prompt takes at least. By M-RoPE an image takes fewer than it has tokens: what counts for sure is
    the words'."""
    if not hasattr(model.base_model, "get_rope_index"):
        return len(prompt)
    visual = {*token_ids(model.config).values()}
    return sum(token not in visual for token in prompt) if visual else 0


def positions_of(model) -> float:
    """How many positions a model is made for; infinity where its config does not say."""
    config = model.config.get_text_config()
    trained, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if not trained:
        return math.inf
    if any(isinstance(part, dict) for part in rope.values()):  # by kind of layer, as Gemma 3's, which counts the scaled ones
        return trained
    # Where the length before scaling is told, the config's own is that or the one after it.
    return max(trained, int((rope.get("original_max_position_embeddings") or trained) * (rope.get("factor") or 1)))
