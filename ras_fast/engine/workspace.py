"""What a generator keeps between its calls: pools of keys and values, the buffers of a step, and its captured graphs.

A captured CUDA graph reads and writes fixed addresses. So everything that a step is fed lies in a workspace, which the next
batch of its size takes over with its graphs, cleared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ras_fast.engine.kv_cache import CROSS, KVPool
from ras_fast.model_checks import TooLong

KEPT = 4  # workspaces of a generator: of batches of so many sizes
BUCKET = 128  # slots that sizes are rounded up to; also keeps the masks aligned as the attention kernels want them


@dataclass
class Feed:
    """What a branch feeds the model next: ids [B, T] and the place of each in its prompt, −1 for what only fills up."""

    ids: Tensor
    places: Tensor


class Workspace:
    """The memory of a batch. Slots, places and positions are explained in batch.py.

    kinds, image_keys: see `KVPool`.
    rows: queries.
    origin, capacity: slots before the prefix, and slots in all. The last slot takes what nobody will read.
    shared: [B, 1], how many tokens of the prefix the scratch branch continues.
    offset: [2, B, 1], for either branch what is added to a token's place to get its position.
    sees: [2, B, image_keys] bool, for either branch which keys of its images a row's tokens cross-attend to.
    region_ids: [B, capacity] int32, the image that the token in each slot belongs to, or −1; of a model with cross-attention
        [B, at least image_keys], the image of each of these keys.
    region_origin: how many entries of ``region_ids`` come before those of the prefix.
    num_regions: the most images that a row has had.
    graphs: captured steps, by region count and by kind and width of their branches.
    """

    def __init__(
        self, kinds: Sequence[str], rows: int, origin: int, capacity: int, device: torch.device, image_keys: int = 0
    ):
        self.rows, self.origin, self.capacity = rows, origin, capacity
        self.pool = KVPool(kinds, rows, capacity, image_keys)
        self.num_regions, self.region_origin = 0, 0 if CROSS in kinds else origin
        with torch.inference_mode(False):  # a later call may be outside of it
            self.shared = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.offset = torch.zeros(2, rows, 1, dtype=torch.long, device=device)
            self.sees = torch.zeros(2, rows, image_keys, dtype=torch.bool, device=device)
            self.region_ids = torch.full((rows, max(capacity, image_keys)), -1, dtype=torch.int32, device=device)
        self.graphs: dict[tuple, Callable[[], Tensor]] = {}
        self._feeds: dict[tuple, Feed] = {}
        self._rows: dict[str, Tensor] = {}

    def feed(self, kind: int, ids: Tensor, places: Tensor) -> Feed:
        """The fixed buffers of a branch's next feed, with these values in them."""
        key = (kind, *ids.shape)
        if key not in self._feeds:
            with torch.inference_mode(False):
                self._feeds[key] = Feed(torch.empty_like(ids), torch.empty_like(places))
        feed = self._feeds[key]
        feed.ids.copy_(ids)
        feed.places.copy_(places)
        return feed

    def settled(self, name: str, value: Tensor) -> Tensor:
        """The fixed buffer for what a method keeps under this name, one entry per row, with `value` copied into it."""
        if name not in self._rows:
            with torch.inference_mode(False):
                self._rows[name] = torch.empty_like(value)
        return self._rows[name].copy_(value)

    def keep_rows(self, rows: list[int]) -> None:
        """Moves these rows, in ascending order, to the front."""
        self.pool.keep_rows(rows)
        for tensor in (self.shared, self.region_ids):
            tensor[: len(rows)] = tensor[rows]
        for tensor in (self.offset, self.sees):
            tensor[:, : len(rows)] = tensor[:, rows]

    def grown(self, slots: int) -> Workspace:
        """A copy with `slots` more slots before the others."""
        origin, capacity, pool = self.origin + slots, self.capacity + slots, self.pool.grown(slots)
        new = Workspace(pool.kinds, self.rows, origin, capacity, self.offset.device, pool.image_keys)
        new.pool, new.num_regions = pool, self.num_regions
        new.region_ids[:, new.region_origin - self.region_origin :][:, : self.region_ids.shape[1]] = self.region_ids
        new.shared.copy_(self.shared)
        new.offset.copy_(self.offset)
        new.sees.copy_(self.sees)
        return new

    def clear(self) -> None:
        """Zeroes everything, so that nothing of these queries is left for the next ones to read."""
        self.pool.reset()
        feeds = (tensor for feed in self._feeds.values() for tensor in (feed.ids, feed.places))
        for tensor in (self.shared, self.offset, self.sees, *feeds, *self._rows.values()):
            tensor.zero_()
        self.region_ids.fill_(-1)


class Workspaces:
    """A generator's workspaces; at most ``KEPT`` of them, the least recently used goes first.

    chunk: as many slots are too many; None: none are.
    """

    def __init__(self, model, kinds: Sequence[str], chunk: int | None = None):
        self._model, self._kinds, self._chunk = model, kinds, chunk
        self._kept: OrderedDict[tuple, Workspace] = OrderedDict()

    @contextmanager
    def lend(self, rows: int, scratch: int, rest: int, image_keys: int) -> Iterator[Workspace]:
        """A zeroed workspace for so many rows, with at least ``scratch`` slots before the prefix and ``rest`` usable slots from
        there on, and ``image_keys`` to cross-attend to. It is kept afterwards, unless its user raised an exception.

        Raises TooLong where a model that attends in chunks would need so many that it does."""
        key = rows, scratch, rest, _ = rows, _bucket(scratch), _bucket(rest + 1), image_keys
        self.check(scratch + rest)
        space = self._kept.pop(key, None)
        if space is None:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            space = Workspace(self._kinds, rows, scratch, scratch + rest, self._model.device, image_keys)
        yield space
        space.clear()
        self._kept[key] = space

    def check(self, slots: int) -> None:
        """Raises TooLong for as many slots as a chunk: of a workspace, lent or grown, or of a prompt and its answer alone."""
        if self._chunk is not None and slots >= self._chunk:
            raise TooLong(
                f"a prompt, its answer and what is written beside them may take {slots} places; from {self._chunk} on "
                f"{type(self._model).__name__} attends in chunks or scales queries by their place, which the engine does not "
                "know: ask for fewer tokens, or use ras_fast.sequential"
            )

    def clear(self) -> None:
        """Frees all of them."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


def _bucket(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET
