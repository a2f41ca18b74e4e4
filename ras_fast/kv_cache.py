"""Key-value buffers whose rows can be branched, and a cache bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class BufferLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, capacity, D], allocated once and written in place."""

    is_compileable = False
    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.real: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.allocate(key_states.shape[0], key_states, value_states)

    def allocate(self, rows: int, keys: Tensor, values: Tensor) -> None:
        """Buffers for ``rows`` rows of the heads, head sizes and dtype of ``keys`` and ``values``."""
        # Zeros, not empty: slots left of a row are masked, and 0 · NaN would still be NaN.
        self.keys = keys.new_zeros((rows, keys.shape[1], self.capacity, keys.shape[3]))
        self.values = values.new_zeros((rows, values.shape[1], self.capacity, values.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(f"the key-value buffer holds {self.capacity} tokens and cannot take {end}")
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            window = buffer[:, :, self.length : end]
            window.copy_(states if self.real is None else torch.where(self.real, states, window))
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity


class KVBuffer(Cache):
    """A transformers cache of fixed capacity with right-aligned rows: row i occupies slots starts[i] .. length − 1."""

    def __init__(self, layers: int, capacity: int, starts: list[int]):
        super().__init__(layers=[BufferLayer(capacity) for _ in range(layers)])
        self.starts = starts

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @classmethod
    def branch(cls, rows: list[tuple[KVBuffer, int, int]], feeds: list[int], room: int) -> KVBuffer:
        """A new buffer whose row i starts as the first ``kept`` tokens of row ``index`` of ``source``.

        rows: (source, index, kept) per new row. feeds: how many tokens each row is fed next, in one right-aligned
            chunk. room: tokens per row after that chunk.

        A row that is fed less than the others keeps tokens in the chunk's slots; `protect` saves them from the filling.
        """
        totals = [kept + feed for (_, _, kept), feed in zip(rows, feeds, strict=True)]
        total, width = max(totals), max(feeds)
        layers = len(rows[0][0].layers)
        new = cls(layers, total + room, [total - own for own in totals])
        for number, layer in enumerate(new.layers):
            like = rows[0][0].layers[number]
            layer.allocate(len(rows), like.keys, like.values)
            for i, (source, index, kept) in enumerate(rows):
                old, start, begin = source.layers[number], source.starts[index], new.starts[i]
                layer.keys[i, :, begin : begin + kept] = old.keys[index, :, start : start + kept]
                layer.values[i, :, begin : begin + kept] = old.values[index, :, start : start + kept]
            layer.length = total - width
        return new

    def protect(self, real: Tensor | None) -> None:
        """Until called again, `update` writes only where ``real`` [B, width] is True; None: everywhere."""
        for layer in self.layers:
            layer.real = None if real is None else real[:, None, :, None]


class ByteBoundedCache:
    """Least recently used entries go first once the sizes exceed ``limit`` bytes; limit 0 stores nothing."""

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"cache_bytes is {limit}; it needs to be 0 (off) or positive")
        self.limit, self.nbytes = limit, 0
        self._entries: OrderedDict = OrderedDict()

    def get(self, key):
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key, value, nbytes: int) -> None:
        nbytes = max(nbytes, 1)  # an empty context takes room, too: with limit 0 even that must not be kept
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
