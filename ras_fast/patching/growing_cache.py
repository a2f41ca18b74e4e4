"""KV caches with room for further tokens, where transformers' `DynamicCache` copies itself to a longer one at every step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ras_fast.patching.cache_values import given_cache
from ras_fast.patching.undo import Undo

_ROOM = "_ras_fast_room"  # attribute of the keys and values that an update left: their `Room`, or None where there is none yet
# Bytes of a layer's keys from which it pays. On a GPU two slices cost the host more than a copy, and steps wait for the host.
_WORTH = {"cpu": 1 << 18, "cuda": 1 << 26}
_NEVER = 1 << 62


@dataclass
class Room:
    """Where a layer's keys and values grow.

    keys, values: [B, H, capacity, D] and [B, H, capacity, Dv].
    filled: tokens that were written so far. Only a layer whose tokens end there may write on: the first of two that share it.
    """

    keys: Tensor
    values: Tensor
    filled: int

    @classmethod
    def behind(cls, keys: Tensor, values: Tensor, more: int) -> Room:
        """With a copy of these, and room for `more` tokens and a sixteenth besides."""
        length = keys.shape[2]
        capacity = length + more + length // 16 + 64
        room = cls(*(states.new_empty((*states.shape[:2], capacity, states.shape[3])) for states in (keys, values)), length)
        room.keys[:, :, :length], room.values[:, :, :length] = keys, values
        return room

    def has_place(self, keys: Tensor, values: Tensor, more: int) -> bool:
        """Whether `more` tokens can be written behind these: they still lie in it, whatever was put into their `data`."""
        writable = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        end_here = _end_in(keys, self.keys) == _end_in(values, self.values) == self.filled
        return writable and end_here and self.filled + more <= self.keys.shape[2]

    def append(self, length: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The last `length` tokens, and these behind them."""
        begin, more = self.filled, keys.shape[2]
        for states, new in ((self.keys, keys), (self.values, values)):
            states.data.narrow(2, begin, more).copy_(new)  # what autograd has saved of the tokens before is not written to
        self.filled += more
        return self.keys.narrow(2, begin - length, length + more), self.values.narrow(2, begin - length, length + more)


@functools.cache
def growing(kind: type[DynamicLayer]) -> type[DynamicLayer]:
    """The class of layers that write new tokens behind the old ones, for `DynamicLayer` or `DynamicSlidingWindowLayer`.

    What other methods leave (`crop`, `reorder_cache`, `offload`) is not what an update left, so it goes to a longer tensor once
    more as in transformers, and only the update after that makes room: beams, which reorder at every step, never have any.
    """

    class Growing(kind):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if torch.compiler.is_compiling() or getattr(self, "record_past", False):
                return super().update(key_states, value_states, *args, **kwargs)
            room = None
            if self._was_left_by_update() and _continues(self.keys, key_states) and _continues(self.values, value_states):
                room, more = getattr(self.keys, _ROOM), key_states.shape[2]
                if room is None or not room.has_place(self.keys, self.values, more):
                    room = Room.behind(self.keys, self.values, more)
                result = room.append(self.keys.shape[2], key_states, value_states)
                self._keep(*result, more)
            else:
                result = super().update(key_states, value_states, *args, **kwargs)
            for states in (self.keys, self.values):
                setattr(states, _ROOM, room)
            return result

        def _was_left_by_update(self) -> bool:
            """Whether the keys and the values are those of one update."""
            if not self.is_initialized:
                return False
            room = getattr(self.keys, _ROOM, self)  # itself where there is none
            of_one = room is not self and getattr(self.values, _ROOM, self) is room
            return of_one and self.keys.shape[2] == self.values.shape[2]

        def _keep(self, keys: Tensor, values: Tensor, more: int) -> None:
            """What its class keeps of all that is there, of which `more` tokens are new."""
            self.keys, self.values = keys, values
            if self.is_sliding:
                self.cumulative_length += more
                first = 1 - self.sliding_window
                self.keys, self.values = keys[:, :, first:], values[:, :, first:]

        def __reduce_ex__(self, protocol: Any) -> tuple:
            """Copies and pickles are of the class itself and without room, and need not know this package."""
            _, _, state, *rest = super().__reduce_ex__(protocol)
            plain = {name: _without_room(value) for name, value in state.items()}
            return kind.__new__, (kind,), plain, *rest

    Growing.__name__, Growing.__qualname__, Growing.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Growing


def _without_room(value: Any) -> Any:
    """A tensor that a copy or a pickle can take along without what lies around it: what was in memory before, to be filled."""
    if not isinstance(value, Tensor):
        return value
    fills = value.nbytes == value.untyped_storage().nbytes()
    return value.detach() if fills else value.detach().clone(memory_format=torch.contiguous_format)


def _end_in(states: Tensor, room: Tensor) -> int:
    """Behind which token of a room's tensor these end; -1 where they do not lie in it."""
    alike = states.shape[:2] == room.shape[:2] and states.stride() == room.stride()
    if not alike or states.untyped_storage().data_ptr() != room.untyped_storage().data_ptr():
        return -1
    return states.storage_offset() // room.stride(2) + states.shape[2]


def _continues(states: Tensor, new: Tensor) -> bool:
    """Whether these can be written behind what is there, and nobody wants gradients of it."""
    return (
        new.dtype == states.dtype
        and new.device == states.device
        and not (new.requires_grad or states.requires_grad)
        and new.dim() == 4
        and new.shape[:2] == states.shape[:2]
        and new.shape[3] == states.shape[3]
    )


def grow_in_place(text_model: nn.Module, undo: Undo) -> None:
    """The caches that this model's forwards are given grow in place from now on."""
    undo.hook_before(text_model, _before_text)


def _before_text(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    for layer in getattr(given_cache(kwargs), "layers", ()):
        kind = type(layer)
        if kind in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized and _is_worth_it(layer.keys):
            layer.__class__ = growing(kind)


def _is_worth_it(keys: Tensor | None) -> bool:
    return isinstance(keys, Tensor) and keys.nbytes >= _WORTH.get(keys.device.type, _NEVER)
