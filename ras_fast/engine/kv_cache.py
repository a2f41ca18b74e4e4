"""One pool of keys and values for all the stages of a batch, and a cache bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ras_fast.checks import is_integer
from ras_fast.engine import recurrence
from ras_fast.engine.recurrence import Segment, StateLayer, States
from ras_fast.ops import write_cache_

CROSS = "cross_attention"  # the kind of a layer that attends to images alone, which are not among the tokens
INDEXED = "indexed_attention"  # of one that attends to some keys, which it chooses by others


@dataclass
class View:
    """Where the next forward writes, and what its attention sees. One for all layers of a pool.

    rows: of the pool, b of them, that the forward's batch stands for.
    slots: [b, T] int64, where the keys and values of each token go.
    begin, end: attention sees the slots ``begin`` .. ``end`` − 1; None: the forward's own tokens alone, in their order.
    segments: which tokens go on from which state, in layers that keep one.
    """

    rows: slice
    slots: Tensor
    begin: int | None
    end: int | None
    segments: Sequence[Segment]


class PoolLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, capacity, D], allocated once and written in place."""

    is_compileable = False
    is_sliding = False

    def __init__(self, rows: int, capacity: int, view: View):
        super().__init__()
        self.rows, self.capacity, self.view = rows, capacity, view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Under autocast keys come in float32, in which they were rotated, and values in half precision.
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        # Zeros, not empty: slots that nobody wrote are masked, and 0 · NaN would still be NaN.
        with torch.inference_mode(False):  # the pool may be written again outside of it
            self.keys, self.values = (
                states.new_zeros((self.rows, states.shape[1], self.capacity, states.shape[3]), dtype=dtype)
                for states in (key_states, value_states)
            )
        self.is_initialized = True

    def read(self, row: int, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """A copy of what lies in slots ``begin`` .. ``end`` − 1 of a row: keys and values [H, length, D]. None of a layer that
        attends to another one's (Gemma 4)."""
        if not self.is_initialized:
            return None
        return self.keys[row, :, begin:end].clone(), self.values[row, :, begin:end].clone()

    def write(self, row: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Puts what `read` gave into the slots from ``begin`` on."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        self.keys[row, :, begin : begin + keys.shape[1]] = keys
        self.values[row, :, begin : begin + values.shape[1]] = values

    def clear(self, row: int, begin: int) -> None:
        """Zeroes a row's slots from ``begin`` on: a mask does not hide what is not finite."""
        if self.is_initialized:
            self.keys[row, :, begin:], self.values[row, :, begin:] = 0, 0

    def keep_rows(self, rows: list[int]) -> None:
        """Moves these rows, in ascending order, to the front, in place."""
        if self.is_initialized:
            for i, row in enumerate(rows):
                if i != row:
                    self.keys[i], self.values[i] = self.keys[row], self.values[row]

    def copy_to(self, other: PoolLayer) -> None:
        """Copies everything into a layer of a larger pool, which has its further slots before the others."""
        if self.is_initialized:
            other.lazy_initialization(self.keys, self.values)
            other.keys[:, :, -self.capacity :], other.values[:, :, -self.capacity :] = self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self.view
        keys, values = self.keys[view.rows], self.values[view.rows]
        write_cache_(keys, values, view.slots, key_states.to(keys.dtype), value_states.to(keys.dtype))
        if view.begin is None:
            return key_states, value_states
        return keys[:, :, view.begin : view.end], values[:, :, view.begin : view.end]

    def get_seq_length(self) -> int:
        # A feed that is filled up to its width may be longer than all that it sees; Llama 4 scales queries by this number.
        return max(self._seen() - self.view.slots.shape[1], 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen(), 0

    def _seen(self) -> int:
        """How many slots attention sees."""
        view = self.view
        return view.slots.shape[1] if view.begin is None else view.end - view.begin

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name in the first transformers that are supported


class IndexedLayer(PoolLayer):
    """A layer that attends to those of the keys that its mask shows which an indexer chooses (DeepSeek's sparse attention). The
    indexer has keys [B, capacity, d] of its own, or none, where it goes by what another layer has chosen. The others may be
    another layer's (Mistral Large 4): then it has an indexer's alone."""

    def __init__(self, rows: int, capacity: int, view: View):
        super().__init__(rows, capacity, view)
        self.indexer_keys: Tensor | None = None

    def update_indexer(self, states: Tensor) -> Tensor:
        """Writes an indexer's keys [b, T, d] of the forward's tokens; returns those [b, keys, d] that its queries see."""
        keys, view = self._indexer_keys(states)[self.view.rows], self.view
        keys.scatter_(1, view.slots[..., None].expand_as(states), states.to(keys.dtype))
        return states if view.begin is None else keys[:, view.begin : view.end]

    def _indexer_keys(self, like: Tensor) -> Tensor:
        if self.indexer_keys is None:
            with torch.inference_mode(False):
                self.indexer_keys = like.new_zeros((self.rows, self.capacity, like.shape[-1]))
        return self.indexer_keys

    def read(self, row: int, begin: int, end: int) -> tuple[Tensor, ...] | None:
        """As of any layer, and the indexer's keys [length, d], if it has any; these alone where the layer has no others."""
        given = super().read(row, begin, end)
        return given if self.indexer_keys is None else (*(given or ()), self.indexer_keys[row, begin:end].clone())

    def write(self, row: int, begin: int, *given: Tensor) -> None:
        if len(given) > 1:
            super().write(row, begin, *given[:2])
        for keys in given[2:] if len(given) > 1 else given:
            self._indexer_keys(keys)[row, begin : begin + len(keys)] = keys

    def clear(self, row: int, begin: int) -> None:
        super().clear(row, begin)
        if self.indexer_keys is not None:
            self.indexer_keys[row, begin:] = 0

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        if self.indexer_keys is not None:
            self.indexer_keys[: len(rows)] = self.indexer_keys[rows]

    def copy_to(self, other: IndexedLayer) -> None:
        super().copy_to(other)
        if self.indexer_keys is not None:
            other._indexer_keys(self.indexer_keys)[:, -self.capacity :] = self.indexer_keys

    def reset(self) -> None:
        super().reset()
        if self.indexer_keys is not None:
            self.indexer_keys.zero_()


class CrossLayer(PoolLayer):
    """One layer's keys and values [B, H, capacity, D] of each row's images, to which both of its branches cross-attend.

    A prompt's forward hands over those of its images, and is to find none here: without images it would attend to what it
    found. Steps read ``keys`` and ``values``, which are those of their rows; one without images has zeros, and gets nothing.
    """

    def __init__(self, rows: int, capacity: int, view: View):
        super().__init__(rows, capacity, view)
        self._all, self._lengths = PoolLayer(rows, capacity, view), [0] * rows

    def aim(self) -> None:
        """To be called when the view has changed."""
        self.is_initialized = self._all.is_initialized and self.view.begin is not None
        if self.is_initialized:
            self.keys, self.values = self._all.keys[self.view.rows], self._all.values[self.view.rows]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for row, *of_row in zip(range(self.rows)[self.view.rows], key_states, value_states, strict=True):
            self.write(row, 0, *of_row)
        return key_states, value_states

    def read(self, row: int, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """A copy of those of a row's images, wherever its tokens lie: keys and values [H, length, D]. None without images."""
        length = self._lengths[row]
        return self._all.read(row, 0, length) if length else None

    def write(self, row: int, begin: int, keys: Tensor, values: Tensor) -> None:
        self._all.write(row, 0, keys, values)
        self._lengths[row] = keys.shape[1]

    def clear(self, row: int, begin: int) -> None:
        """Nothing: these slots are not of tokens."""

    def keep_rows(self, rows: list[int]) -> None:
        self._all.keep_rows(rows)
        self._lengths[: len(rows)] = [self._lengths[row] for row in rows]

    def copy_to(self, other: CrossLayer) -> None:
        self._all.copy_to(other._all)
        other._lengths = [*self._lengths]

    def reset(self) -> None:
        self._all.reset()
        self._lengths, self.is_initialized = [0] * self.rows, False

    def get_seq_length(self) -> int:
        return self.capacity if self.is_initialized else 0


class KVPool(Cache):
    """A transformers cache in which a row holds several sequences that share their beginning.

    Which slots belong to which sequence is the caller's to know: `aim` says where the next forward writes and what it sees,
    and a mask hides what lies in between.

    kinds: what each layer is, in transformers' words; those that keep states are `StateLayer`s here.
    image_keys: the most keys that the images of a row have, in layers of cross-attention (`CrossLayer`).
    """

    def __init__(self, kinds: Sequence[str], rows: int, capacity: int, image_keys: int = 0):
        self.kinds, self.rows, self.capacity, self.image_keys = kinds, rows, capacity, image_keys
        self.view = View(slice(0, rows), torch.empty(rows, 0, dtype=torch.long), 0, 0, ())
        super().__init__([self._layer(kind) for kind in kinds])

    def _layer(self, kind: str) -> CacheLayerMixin:
        if kind in recurrence.LAYERS:
            return StateLayer(self.rows)
        if kind == INDEXED:
            return IndexedLayer(self.rows, self.capacity, self.view)
        if kind == CROSS:
            return CrossLayer(self.rows, self.image_keys, self.view)
        return PoolLayer(self.rows, self.capacity, self.view)

    @property
    def is_initialized(self) -> bool:
        """What models ask to tell a prompt's forward, for which the pool is empty whatever it holds."""
        return self.view.begin is not None and super().is_initialized

    def aim(
        self,
        slots: Tensor,
        seen: tuple[int, int] | None = None,
        rows: slice = slice(None),
        segments: Sequence[Segment] = (),
    ) -> None:
        """The next forward is of ``rows``, writes ``slots`` [b, T] and attends to the slots ``seen[0]`` .. ``seen[1]`` − 1, or
        to its own tokens alone.

        segments: which of its tokens go on from which state.

        Raises ValueError when that is not inside the pool.
        """
        begin, end = seen or (None, None)
        if seen is not None and not 0 <= begin <= end <= self.capacity:
            raise ValueError(f"the pool holds {self.capacity} tokens and cannot take slots {begin} to {end}")
        view = self.view
        view.rows, view.slots, view.begin, view.end, view.segments = rows, slots, begin, end, segments
        for layer in self._layers(CrossLayer):
            layer.aim()

    def read(self, row: int, begin: int, end: int) -> list[tuple[Tensor, ...] | None]:
        """A copy of what lies in slots ``begin`` .. ``end`` − 1 of a row, and of what it cross-attends to: keys and values
        [H, length, D] of each layer that may have them, None where it has not, and an indexer's keys [length, d]."""
        return [layer.read(row, begin, end) for layer in self._layers(PoolLayer)]

    def write(self, row: int, begin: int, given: list[tuple[Tensor, ...] | None]) -> None:
        """Puts what `read` gave into the slots from ``begin`` on."""
        for layer, of_layer in zip(self._layers(PoolLayer), given, strict=True):
            if of_layer is not None:
                layer.write(row, begin, *of_layer)

    def clear(self, row: int, begin: int) -> None:
        """Forgets the tokens in a row's slots from ``begin`` on."""
        for layer in self._layers(PoolLayer):
            layer.clear(row, begin)

    def states(self, row: int, branch: int) -> list[States]:
        """A copy of one state of each layer that has any."""
        return [layer.read(row, branch) for layer in self._layers(StateLayer)]

    def set_states(self, row: int, branch: int, given: list[States] | None) -> None:
        """Puts what `states` gave in the place of a branch's; None: what is there before the first token."""
        for i, layer in enumerate(self._layers(StateLayer)):
            layer.write(row, branch, given[i] if given else {})

    def keep_rows(self, rows: list[int]) -> None:
        """Moves these rows, in ascending order, to the front, in place."""
        for layer in self.layers:
            layer.keep_rows(rows)

    def grown(self, slots: int) -> KVPool:
        """A copy with so many slots more before the others."""
        new = KVPool(self.kinds, self.rows, self.capacity + slots, self.image_keys)
        for old, layer in zip(self.layers, new.layers, strict=True):
            old.copy_to(layer)
        return new

    def _layers(self, kind: type) -> list:
        return [layer for layer in self.layers if isinstance(layer, kind)]


ENTRY_BYTES = 512  # of the memory that an entry takes beside its value: a key of 32 bytes, the numbers, places in tables


class ByteBoundedCache:
    """Entries by key, up to ``limit`` bytes in all; the least recently used ones are dropped first. 0: it stores nothing.

    Raises ValueError when ``limit`` is not an integer of at least 0.
    """

    def __init__(self, limit: int):
        if not is_integer(limit) or limit < 0:
            raise ValueError(f"cache_bytes is {limit!r}; it needs to be an integer of at least 0 (off)")
        self.limit, self.nbytes = limit, 0
        self._entries: OrderedDict = OrderedDict()

    def get(self, key: bytes):
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: bytes, value, nbytes: int) -> None:
        """key: short, a hash. nbytes: what the value takes."""
        nbytes += ENTRY_BYTES
        if nbytes > self.limit or key in self._entries:
            return
        self._entries[key] = (value, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self.nbytes -= freed

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)
