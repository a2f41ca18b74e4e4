"""Several sequences of each query, decoded together over one pool of keys and values.

A row of the pool is a query. Its slots:

    | scratch, backwards: context, then risk | prefix: the images | the answer: rest of its prompt, its tokens |

Both branches attend to the prefix, which is stored once; neither sees the other. So a step that advances both reads the
weights once and the keys and values once. As the scratch grows towards lower slots, what a token sees is one contiguous range
of slots in either branch: from its own slot to the far end of the prefix.

Layers that keep a state instead of keys and values (recurrence.py) have one for each branch of a row. Slots can be gone back
to, a state cannot: copies of it are held after the prefix, where scratch branches start, and after the prompt, where an answer
that is taken back starts again.

Images to which layers cross-attend are in no slots: those layers hold their keys, once for both branches of a row.

Words used in this package: a *slot* is an index into the pool. A *place* is a token's index in its own prompt and answer,
from 0; −1 marks a token that only fills up a batch. A *position* is what rotary embeddings are given: the place plus an
offset, which is not 0 in families that count an image's tokens otherwise (M-RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ras_fast.batching import SIGHT, is_per_token, left_padded
from ras_fast.engine import recurrence
from ras_fast.engine.answer import Sequence
from ras_fast.engine.branch import ANSWER, SCRATCH, Branch
from ras_fast.engine.graphs import HostRead, capture
from ras_fast.engine.kv_cache import KVPool
from ras_fast.engine.recurrence import Segment, States
from ras_fast.engine.runner import Runner
from ras_fast.engine.workspace import Workspace
from ras_fast.patching.cache_values import Rows, keep, kept, kept_rows
from ras_fast.patching.tracking import REGIONS
from ras_fast.regions import RegionMap

TENSOR_BYTES = 512  # of the memory that a tensor takes beside its values


@dataclass
class Prefix:
    """The beginning of a prompt that was computed: keys and values [H, length, D] of each layer that has them, of its tokens or
    its images, with an indexer's keys, the states of the others, the offset of the positions after it, and where its image
    tokens are."""

    length: int
    keys_values: list[tuple[Tensor, ...] | None]
    states: list[States]
    offset: Tensor
    regions: RegionMap | None

    @property
    def nbytes(self) -> int:
        tensors = [self.offset, *(tensor for layer in self.keys_values for tensor in layer or ())]
        tensors += [state for layer in self.states for state in layer.values()]
        tensors += [] if self.regions is None else [self.regions.ids]
        return sum(tensor.nbytes + TENSOR_BYTES for tensor in tensors)


class Batch:
    """The steps of a batch over its workspace.

    rows: queries. prefixes: tokens of each row's prefix.
    """

    def __init__(self, runner: Runner, space: Workspace):
        self.runner, self.space, self.rows = runner, space, space.rows
        self.prefixes = [0] * self.rows
        self._held = [0] * self.rows  # of these, what the scratch goes on from
        self._after_prefix: dict[int, list[States]] = {}  # of each row
        self._after_prompt: dict[int, list[States]] = {}
        self.branches: dict[int, Branch] = {}  # the latest of each kind
        self.regions: dict[int, RegionMap | None] = {}  # of each row's prefix
        self._last: tuple[dict[int, Tensor], ...] = ({}, {})  # by kind and row, the state [d] after what `prefill` has read
        self._maps: tuple[RegionMap, RegionMap] | None = None

    @property
    def pool(self) -> KVPool:
        return self.space.pool

    @property
    def origin(self) -> int:
        return self.space.origin

    @property
    def shared(self) -> Tensor:
        return self.space.shared[: self.rows]

    @property
    def offset(self) -> Tensor:
        return self.space.offset[:, : self.rows]

    @property
    def sees(self) -> Tensor:
        return self.space.sees[:, : self.rows]

    # Filling it

    def prefill(self, row: int, prompts: list[dict[str, Tensor]], lengths: list[int], kind: int) -> None:
        """The first ``lengths`` tokens of prompts that `fit` together, which hold all their images, as the beginnings of the
        branches of ``row`` and the rows after it, in one forward."""
        cuts = [
            {name: own[:, :length] if is_per_token(name, one) else own for name, own in one.items()}
            for one, length in zip(prompts, lengths, strict=True)
        ]
        cut = left_padded(cuts, self.runner.filler)
        own = slice(row, row + len(prompts))
        if kind == SCRATCH:
            self.shared[own] = 0
        slots = self._slots(kind, cut["attention_mask"].cumsum(-1) - 1, own)
        if len(set(lengths)) == 1:
            del cut["attention_mask"]
        keep(self.pool, REGIONS, None)  # that of the batch is not these rows'
        regions = self._read(kind, own, slots, cut, prompts)
        if kind == ANSWER:
            for i, length in enumerate(lengths):
                one = None if regions is None else regions.select(torch.tensor([i]))
                self.regions[row + i] = one if one is None or self.runner.crosses else one.last(length)
                self.prefixes[row + i], self._after_prefix[row + i] = length, self.pool.states(row + i, ANSWER)

    def prompts(self, sequences: list[Sequence], inputs: dict[str, Tensor]) -> Branch:
        """Reads whole prompts, left-padded in ``inputs``, in one forward; returns the branch of the answers, whose first tokens
        are chosen already."""
        slots = self._slots(ANSWER, inputs["attention_mask"].cumsum(-1) - 1)
        regions = self._read(ANSWER, slice(0, self.rows), slots, inputs, [inputs])
        self.regions = {row: None if regions is None else regions.select(torch.tensor([row])) for row in range(self.rows)}
        self._settle()
        return self.begun(ANSWER, sequences)

    def _read(self, kind: int, rows: slice, slots: Tensor, inputs: dict, prompts: list[dict[str, Tensor]]) -> RegionMap | None:
        """Reads ``inputs``, which are ``prompts`` or their beginnings, into slots [b, T] of these rows, in one forward; returns
        where their image tokens are."""
        self._look(kind, rows, prompts)
        self.pool.aim(slots, rows=rows, segments=[recurrence.whole(kind)])
        extras = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
        states, self.offset[kind, rows] = self.runner.prefill(self.pool, inputs["input_ids"], **extras)
        self._last[kind].update(enumerate(states[:, -1].clone(), rows.start))  # a view would keep all states
        regions = kept(self.pool, REGIONS)
        self._show_at(slots, regions, rows)
        return regions

    def begun(self, kind: int, sequences: list[Sequence | None], recorded: int = 0) -> Branch:
        """The branch of sequences whose prompts were read to their last token, and whose first tokens are chosen already.

        sequences: one per row; None where a row has none. recorded: as in `branch`.
        """
        # What it is fed next is not known yet: `take` puts it there.
        feeds = [[] if own is None else [self.runner.filler] for own in sequences]
        made = self.branch(kind, sequences, feeds, [len(own.prompt) if own else 0 for own in sequences], recorded)
        last = self._last[kind]
        blank = torch.zeros_like(next(iter(last.values())))
        states = torch.stack([blank if own is None else last[row] for row, own in enumerate(sequences)])
        made.take(states, self.runner.head(states).float())
        return made

    def extract(self, row: int) -> Prefix:
        """A copy of a row's prefix."""
        length, states = self.prefixes[row], self._after_prefix[row]
        keys_values = self.pool.read(row, self.origin, self.origin + length)
        return Prefix(length, keys_values, states, self.offset[ANSWER, row].clone(), self.regions.get(row))

    def insert(self, row: int, prefix: Prefix, prompt: dict[str, Tensor]) -> None:
        """A prefix of a prompt that was computed before becomes the row's."""
        self.pool.write(row, self.origin, prefix.keys_values)
        self.pool.set_states(row, ANSWER, prefix.states)
        self._after_prefix[row] = prefix.states
        self.offset[ANSWER, row] = prefix.offset
        self.regions[row], self.prefixes[row] = prefix.regions, prefix.length
        places, own = torch.arange(self.prefixes[row], device=self.runner.device)[None], slice(row, row + 1)
        self._look(ANSWER, own, [prompt])
        self._show_at(self._slots(ANSWER, places, own), prefix.regions, own)

    def branch(self, kind: int, sequences, feeds: list[list[int]], read: list[int], recorded: int = 0) -> Branch:
        """A new branch whose next feed is these tokens, a list per row; a row with an empty list takes no part.

        read: how many tokens of each row's prompt the pool holds already.
        recorded: of how many steps the branch keeps states and logits.
        """
        width, device = self.runner.width(max(map(len, feeds))), self.runner.device
        lengths = [len(feed) for feed in feeds]
        fill = [width - length for length in lengths]
        ids = [[self.runner.filler] * n + feed for n, feed in zip(fill, feeds, strict=True)]
        places = [[-1] * n + [*range(k, k + width - n)] for n, k in zip(fill, read, strict=True)]
        feed = self.space.feed(kind, torch.tensor(ids, device=device), torch.tensor(places, device=device))
        ends = [(k + length) * bool(length) for k, length in zip(read, lengths, strict=True)]
        if kind == SCRATCH:
            ends = [max(end - held, 0) for end, held in zip(ends, self._held, strict=True)]
        made = self.branches[kind] = Branch(kind, sequences, feed, lengths, ends, recorded, self.runner.sync_every)
        return made

    def clear_scratch(self, slots: int, read_prefix: list[bool]) -> None:
        """Makes the scratch free for a new branch of at most ``slots`` slots, and says which rows' prefixes it goes on from."""
        if slots > self.origin:
            self._grow(slots - self.origin)
        self._held = [length * reads for length, reads in zip(self.prefixes, read_prefix, strict=True)]
        self.shared[:] = torch.tensor(self._held, device=self.shared.device)[:, None]
        self.offset[SCRATCH] = self.offset[ANSWER] * (self.shared > 0)
        self.sees[SCRATCH] = self.sees[ANSWER] & (self.shared > 0)
        self.space.region_ids[: self.rows, : self.space.region_origin] = -1
        for row, length in enumerate(self._held):
            self.pool.set_states(row, SCRATCH, self._after_prefix[row] if length else None)

    def note_prompts(self) -> None:
        """To be called when the prompts have been read, and nothing else: where `rewind` can go back to."""
        self._after_prompt = {row: self.pool.states(row, ANSWER) for row in range(self.rows)}

    def rewind(self, row: int, prompt: int, length: int) -> int:
        """The row's answer goes on after the first ``length`` tokens of its prompt, of ``prompt`` tokens, and itself. Returns
        how many of these the pool holds."""
        self.pool.clear(row, self.origin + length)
        if not self.runner.recurrences:
            return length
        self.pool.set_states(row, ANSWER, self._after_prompt[row])
        return prompt

    def keep_rows(self, rows: list[int]) -> None:
        """Goes on with these rows only, and without the scratch."""
        self.space.keep_rows(rows)
        self.rows, self._maps = len(rows), None
        self.regions = {i: self.regions.get(row) for i, row in enumerate(rows)}
        self.prefixes = [self.prefixes[row] for row in rows]
        for of_scratch in (self.branches, self._after_prefix, self._after_prompt):
            of_scratch.clear()

    def _grow(self, slots: int) -> None:
        """Goes on in a workspace of its own with so many slots more before the prefix."""
        self.runner.workspaces.check(self.space.capacity + slots)
        self.space, self._maps = self.space.grown(slots), None
        self.branches.pop(SCRATCH, None)
        if ANSWER in self.branches:
            self.branches[ANSWER].move(self.space)

    # Slots

    def _slots(self, kind: int, places: Tensor, rows: slice = slice(None)) -> Tensor:
        """Where tokens at places [b, T] of a branch's prompts lie; the last slot for those that only fill up, and for what a
        row produces beyond its end."""
        slots = self.origin + places if kind == ANSWER else self.origin - 1 - (places - self.shared[rows])
        trash = self.space.capacity - 1
        return slots.clamp(0, trash).masked_fill(places < 0, trash)

    def _range(self, branch: Branch) -> tuple[Tensor, Tensor]:
        """The slots [start, end) that each token of a branch's feed sees, both [B, T]; some slot always."""
        places = branch.feed.places.clamp(min=0)
        if branch.kind == ANSWER:
            return torch.full_like(places, self.origin), self.origin + places + 1
        return self.origin - 1 - (places - self.shared), (self.origin + self.shared).expand_as(places)

    def _distance(self, branch: Branch, slots: Tensor) -> Tensor:
        """How many places slots [K] lie before each token of a branch's feed: [B, T, K]."""
        after = slots - self.origin
        if branch.kind == SCRATCH:
            after = torch.where(after >= 0, after, self.shared - 1 - after)[:, None]
        return branch.feed.places.clamp(min=0)[..., None] - after

    # Stepping

    def step(self, branches: list[Branch], edit=None, captured: bool = True) -> None:
        """One decoding step of every branch: a forward over their feeds, then each chooses its next tokens.

        edit: None, or a function from the states [B, len(branches), d] to those that the tokens are read from.
        captured: False for a step that no graph may stand for, because something reads or steers inside the model only now.
        """
        states = self.forward(branches, captured)
        if edit is not None:
            states = edit(states)
        logits = self.runner.head(states).float()
        for number, branch in enumerate(branches):
            branch.take(states[:, number], logits[:, number])

    def forward(self, branches: list[Branch], captured: bool = False) -> Tensor:
        """The states [B, len(branches), d] from which the branches' next tokens are read."""
        ends = {own.kind: self._ends(own) for own in branches}
        taken = {kind: max(reached, default=0) for kind, reached in ends.items()}
        read = max(self.prefixes) if SCRATCH in taken else 0  # of rows whose answer goes on, it is within their own stretch
        end, taken = self.origin + max(read, taken.get(ANSWER, 0)), taken.get(SCRATCH, 0)
        if end >= self.space.capacity or taken > self.origin:
            raise ValueError(f"the pool holds {self.origin} + {self.space.capacity - 1 - self.origin} tokens and cannot take "
                             f"{taken} + {end - self.origin}")  # fmt: skip
        if captured and self.runner.captures(max(branch.width for branch in branches)):
            states = self._replay(branches)
        else:
            # A step of answers that end alike sees all of a contiguous stretch.
            alike = len(branches) == 1 and branches[0].kind == ANSWER and branches[0].width == 1
            reach = max(end - self.origin, read + taken)
            states = self._compute(branches, end, reach, masked=not alike or len(ends[ANSWER]) > 1)
        self.runner.count(self.rows, sum(branch.width for branch in branches))
        for branch in branches:
            branch.advance(self.space)
        return states

    def _ends(self, branch: Branch) -> set[int]:
        """How far the rows reach that count. Without a scratch those that are done do as well: methods that steer the first
        tokens tell these by the length of the cache, which must not shrink when the longest row ends."""
        return branch.live_ends if self.origin else set(branch.ends)

    def _compute(self, branches: list[Branch], end: int, reach: int, masked: bool) -> Tensor:
        """`forward` for keys before slot ``end`` and tokens before place ``reach``: tensors in, tensors out, no host sync."""
        begin = 0 if any(branch.kind == SCRATCH for branch in branches) else self.origin
        ids = _cat([branch.feed.ids for branch in branches])
        positions = _cat([branch.feed.places.clamp(min=0) + self.offset[branch.kind] for branch in branches])
        mask = self._mask(branches, begin, end, reach) if masked else None
        self._show_regions(begin)
        slots, segments = _cat([self._slots(own.kind, own.feed.places) for own in branches]), self._segments(branches)
        self.pool.aim(slots, (begin, end), slice(0, self.rows), segments)
        states = self.runner(self.pool, ids, positions, mask, **self._image_masks(branches))
        if len(branches) == 1:
            return states[:, -1:]
        return torch.stack([states[:, branches[0].width - 1], states[:, -1]], 1)

    def _mask(self, branches: list[Branch], begin: int, end: int, reach: int):
        starts, ends = (_cat(list(bounds)) - begin for bounds in zip(*map(self._range, branches), strict=True))

        def distance() -> Tensor:
            slots = torch.arange(begin, end, device=self.runner.device)
            return _cat([self._distance(branch, slots) for branch in branches])

        in_order = all(branch.kind == ANSWER for branch in branches)  # a scratch's tokens lie backwards, before their prefix
        return self.runner.masks(starts, ends, end - begin, reach, None if in_order else distance)

    def _image_masks(self, branches: list[Branch]) -> dict[str, Tensor]:
        if not self.sees.shape[-1]:
            return {}
        return self.runner.image_masks(_cat([self.sees[own.kind][:, None].expand(-1, own.width, -1) for own in branches]))

    def _segments(self, branches: list[Branch]) -> list[Segment]:
        """The tokens of the branches' feeds, in the order of their kinds, by the states that they go on from: those of all rows
        together where they are equally many, else those of each row."""
        if not self.runner.recurrences:
            return []
        first, last = branches[0].kind, branches[-1].kind
        if all(branch.width == 1 for branch in branches):
            return [Segment(slice(None), slice(first, last + 1))]
        made, begin = [], 0
        for branch in branches:
            own, end = slice(branch.kind, branch.kind + 1), begin + branch.width
            if min(branch.lengths) == branch.width:
                made.append(Segment(slice(None), own, slice(begin, end)))
            else:
                lengths = enumerate(branch.lengths)
                made += [Segment(slice(row, row + 1), own, slice(end - n, end)) for row, n in lengths if n]
            begin = end
        return made

    def _replay(self, branches: list[Branch]) -> Tensor:
        """The step as one captured CUDA graph over the whole pool: one for each combination of branches and widths. A model
        whose steps the host takes part in goes on without graphs."""
        key = (self.space.num_regions, *((branch.kind, branch.width) for branch in branches))
        step = partial(self._compute, branches, self.space.capacity, self.space.capacity, masked=True)
        if key not in self.space.graphs:
            every = [(row, branch) for row in range(self.rows) for branch in (SCRATCH, ANSWER)]
            before = [self.pool.states(*place) for place in every]
            try:
                self.space.graphs[key] = capture(step, self.runner.device)
            except HostRead as error:
                self.runner.capture_nothing(error)
            for place, states in zip(every, before, strict=True):  # the capture has run the step once
                self.pool.set_states(*place, states)
        return self.space.graphs.get(key, step)()

    def _settle(self) -> None:
        """Moves what methods keep for each row (`Rows`) into the fixed buffers that captured steps read."""
        for name, value in kept_rows(self.pool).items():
            keep(self.pool, name, Rows(self.space.settled(name, value.tensor)))

    # Images

    def _look(self, kind: int, rows: slice, prompts: list[dict[str, Tensor]]) -> None:
        """Notes which images branches cross-attend to from now on: those that the last tokens of their prompts see."""
        if SIGHT in prompts[0]:
            sees = self.runner.keys_of_tiles(torch.cat([one[SIGHT][:, -1] for one in prompts]))
            self.sees[kind, rows, : sees.shape[1]] = sees

    def _show_at(self, slots: Tensor, regions: RegionMap | None, rows: slice) -> None:
        """Notes that the tokens in slots [b, T] of these rows, or the keys that they cross-attend to, belong to these image
        regions."""
        self._maps = None
        if regions is not None:
            if self.runner.crosses:
                slots = torch.arange(regions.ids.shape[1], device=slots.device).expand_as(regions.ids)
            self.space.region_ids[: self.rows][rows].scatter_(1, slots, regions.ids)
            self.space.num_regions = max(self.space.num_regions, regions.num_regions)

    def _show_regions(self, begin: int) -> None:
        """Tells a patched model where the image tokens lie in the slots from ``begin`` on, or which keys are of which image."""
        if self._maps is None:
            ids, count = self.space.region_ids[: self.rows], self.space.num_regions
            parts = ids, ids[:, self.space.region_origin :]
            found = [self.regions.get(row) for row in range(self.rows)]
            grids = [[] if own is None else own.grids[0] for own in found]
            self._maps = tuple(RegionMap(part, count, grids, validate=False) for part in parts)
        keep(self.pool, REGIONS, self._maps[begin > 0])


def _cat(tensors: list[Tensor]) -> Tensor:
    """Tensors [B, T, ...] as one, along T."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
