"""Values that belong to the sequences of a KV cache.

A map of the images, a gate, a counter of steps: what one forward decides and later ones need is kept on the cache object
under a name (`keep`, `kept`), where it ends with the cache, is copied with it and follows its rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values")  # a forward's KV cache, for transformers from 5.24 on and for those before
_KEPT = "_ras_fast_kept"  # attribute of a KV cache: {name: value}


class PerSequence(Protocol):
    """What can be kept on a cache: a value with an entry for each batch row, which follows what happens to the cache."""

    def select(self, rows: Tensor) -> PerSequence:
        """The entries of `rows` [B'] int64, in that order."""

    def repeat_interleave(self, repeats: int) -> PerSequence:
        """Each entry `repeats` times in a row."""

    def crop(self, length: int) -> PerSequence:
        """After the cache was cut to its first `length` positions."""


@dataclass(frozen=True)
class Rows:
    """A tensor [B, ...] with one entry per sequence, whatever the sequence's length: a gate, for instance."""

    tensor: Tensor

    def select(self, rows: Tensor) -> Rows:
        return Rows(self.tensor.index_select(0, rows.to(self.tensor.device)))

    def repeat_interleave(self, repeats: int) -> Rows:
        return Rows(self.tensor.repeat_interleave(repeats, 0))

    def crop(self, length: int) -> Rows:
        return self


def cache_name(module: nn.Module) -> str:
    """The name of the KV cache among the arguments of a model's forward.

    Raises ValueError where there is none that is known: what is kept between the steps of an answer could not be found again.
    """
    parameters = inspect.signature(type(module).forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    kind = type(module).__name__
    raise ValueError(f"{kind}.forward takes no KV cache by the name {' or '.join(CACHE_NAMES)}, and cannot be defended")


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The KV cache among a forward's keyword arguments; None without one. The blocks of continuous batching, which go by the
    same name, are none: they have no rows."""
    for name in CACHE_NAMES:
        if hasattr(kwargs.get(name), "get_seq_length"):
            return kwargs[name]
    return None


def lacks_rows(kwargs: dict[str, Any]) -> bool:
    """Whether a forward is given a cache that has no rows: in continuous batching all sequences are one."""
    return given_cache(kwargs) is None and any(kwargs.get(name) is not None for name in CACHE_NAMES)


def returned_cache(output: Any) -> Any:
    """The KV cache in a forward's output; None without one."""
    new, old = CACHE_NAMES
    return getattr(output, new) if hasattr(output, new) else getattr(output, old, None)  # where both are, the old one warns


def keep(cache: Any, name: str, value: PerSequence | None) -> None:
    """Stores a value on a KV cache under `name` and makes it follow `reorder_cache`, `batch_*` and `crop`; `reset` drops it."""
    if _KEPT not in cache.__dict__:
        cache.__class__ = _following(type(cache))
    # A new dict, so that a shallow copy of the cache keeps what it had.
    cache.__dict__[_KEPT] = cache.__dict__.get(_KEPT, {}) | {name: value}


def kept(cache: Any, name: str) -> Any:
    """What was kept under `name`; None where there is nothing, or no cache."""
    values = getattr(cache, _KEPT, None)
    return None if values is None else values.get(name)


def kept_rows(cache: Any) -> dict[str, Rows]:
    """The kept values that are `Rows`, by name."""
    values = getattr(cache, _KEPT, {})
    return {name: value for name, value in values.items() if isinstance(value, Rows)}


def _revive(kind: type) -> Any:
    following = _following(kind)
    return following.__new__(following)


@functools.cache
def _following(kind: type) -> type:
    """The cache class whose rows the kept values follow. A subclass, because a wrapper on the instance would be a reference
    cycle that keeps a cache's memory until the garbage collector runs, and would not survive a deepcopy."""

    def follow(self: Any, change: Callable[[PerSequence], PerSequence]) -> None:
        values = self.__dict__[_KEPT]
        self.__dict__[_KEPT] = {name: None if value is None else change(value) for name, value in values.items()}

    class Following(kind):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            follow(self, lambda value: value.select(beam_idx))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            follow(self, lambda value: value.select(rows))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            follow(self, lambda value: value.repeat_interleave(repeats))

        def crop(self, *args: int, **kwargs: int) -> None:
            super().crop(*args, **kwargs)
            length = int(self.get_seq_length())
            follow(self, lambda value: value.crop(length))

        def reset(self) -> None:
            super().reset()
            self.__dict__[_KEPT] = {}

        def __reduce_ex__(self, protocol: Any) -> tuple:
            """By the cache's own class, which a pickle can name."""
            _, _, *state = super().__reduce_ex__(protocol)
            return _revive, (kind,), *state

    Following.__name__, Following.__qualname__, Following.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Following
