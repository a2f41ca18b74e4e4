"""Layers that keep a state of fixed size instead of keys and values: gated delta nets, Mamba, short convolutions.

Attention tells the branches of a row apart by a mask. A recurrence reads its tokens one after the other, so that each branch
needs a state of its own, and each stretch of tokens that goes on from one needs a call of its own. The rest of the layer still
computes the batch in one piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from ras_fast.patching.cache_values import CACHE_NAMES
from ras_fast.patching.undo import Undo, forward_slot

if TYPE_CHECKING:
    from ras_fast.engine.kv_cache import KVPool

LAYERS = {"linear_attention", "conv"}  # what transformers calls layers of this kind
BRANCHES = 2  # states of a row
_CACHE_NAMES = {*CACHE_NAMES, "cache_params"}  # the last one is what these layers call it before transformers 5.24

States = dict[tuple[str, int], Tensor]  # of one branch of one row, by transformers' name and number


class Segment(NamedTuple):
    """A stretch of a batch: these tokens of these rows, which go on from a state of their own in each row.

    branches: one, or as many as there are tokens: then each token goes on from another branch.
    """

    rows: slice
    branches: slice
    tokens: slice = slice(None)


def whole(branch: int) -> Segment:
    """All tokens of all rows, which go on from this branch."""
    return Segment(slice(None), slice(branch, branch + 1))


class StateLayer(LinearAttentionLayer):
    """The states [rows, BRANCHES, ...] of one layer, allocated once. Its model updates in place those that `aim` names."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self._all: States = {}
        self._aimed: tuple[slice, Segment] | None = None

    def aim(self, rows: slice, segment: Segment) -> None:
        """The next call is of a segment of a batch that stands for ``rows``."""
        self._aimed = rows, segment
        for (name, number), states in self._all.items():
            part = states[rows][segment.rows, segment.branches]
            getattr(self, name)[number] = part.view(-1, *part.shape[2:])
            self.has_previous_state[number] = True  # all zeros is the state before the first token

    def lazy_initialization(
        self, conv_states=None, recurrent_states=None, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> None:
        if conv_states is not None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self._allocate("conv_states", state_idx, conv_states[0, ..., :1].expand(*conv_states.shape[1:-1], size))
        if recurrent_states is not None:
            self._allocate("recurrent_states", state_idx, recurrent_states[0])

    def _allocate(self, name: str, number: int, like: Tensor) -> None:
        with torch.inference_mode(False):  # the states may be written again outside of it
            self._all[name, number] = like.new_zeros((self.rows, BRANCHES, *like.shape))
        getattr(self, f"is_{name}_initialized")[number] = True
        if name == "conv_states":
            self.conv_kernel_size[number] = like.shape[-1]
        self.dtype, self.device = like.dtype, like.device
        if self._aimed is not None:
            self.aim(*self._aimed)

    def read(self, row: int, branch: int) -> States:
        """A copy of one state."""
        return {key: states[row, branch].clone() for key, states in self._all.items()}

    def write(self, row: int, branch: int, given: States) -> None:
        """Puts what `read` gave in the place of a state; nothing: that before the first token."""
        for key, state in given.items():
            if key not in self._all:
                self._allocate(*key, state)
        for key, states in self._all.items():
            states[row, branch] = given.get(key, 0)

    def keep_rows(self, rows: list[int]) -> None:
        """Moves these rows, in ascending order, to the front, in place."""
        for states in self._all.values():
            for i, row in enumerate(rows):
                if i != row:
                    states[i] = states[row]

    def copy_to(self, other: StateLayer) -> None:
        """Copies everything into the new layer of a larger pool."""
        for key, states in self._all.items():
            other._allocate(*key, states[0, 0])
            other._all[key].copy_(states)

    def reset(self) -> None:
        for states in self._all.values():
            states.zero_()


def find(layers: nn.ModuleList, stateful: list[bool]) -> dict[int, nn.Module]:
    """The recurrence of each layer that has one: the child that takes a cache. Raises ValueError unless that is one child."""
    found = {}
    for index, layer in enumerate(layers):
        if stateful[index]:
            taking = [child for child in layer.children() if _takes_cache(child)]
            if len(taking) != 1:
                raise ValueError(f"layer {index}, a {type(layer).__name__}, has {len(taking)} children that take a cache")
            found[index] = taking[0]
    return found


def _takes_cache(module: nn.Module) -> bool:
    return not _CACHE_NAMES.isdisjoint(inspect.signature(type(module).forward).parameters)


@contextmanager
def in_segments(recurrences: Mapping[int, nn.Module], pool: KVPool) -> Iterator[None]:
    """Inside the block each recurrence that is called with this pool computes its batch segment by segment, as the pool is
    aimed; tokens in none of them get zeros. Forwards of other threads, over other caches, are what they always are."""
    undo = Undo()
    try:
        for index, module in recurrences.items():
            slot = forward_slot(module) or "forward"
            undo.set(module, slot, partial(_forward, getattr(module, slot), pool, index))
        yield
    finally:
        undo.restore()


def _forward(
    forward: Callable,
    pool: KVPool,
    index: int,
    hidden_states: Tensor,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    if not any(given is pool for given in (*args, *kwargs.values())):
        return forward(hidden_states, *args, attention_mask=attention_mask, **kwargs)
    output = torch.zeros_like(hidden_states)
    for segment in pool.view.segments:
        pool.layers[index].aim(pool.view.rows, segment)
        x = hidden_states[segment.rows, segment.tokens]
        own = x.reshape(x.shape[0] * (segment.branches.stop - segment.branches.start), -1, x.shape[-1])
        mask = None if attention_mask is None else attention_mask[segment.rows, segment.tokens]
        output[segment.rows, segment.tokens] = forward(own, *args, attention_mask=mask, **kwargs).view(x.shape)
    return output
