"""Where the image tokens are: region maps, patch grids, boxes → patches, key scores → heat maps.

Shapes: B rows of a batch, L positions, Lk keys, R regions (the most images that any row has), h × w patches of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ras_fast.ops._check import is_integer

Grid = tuple[int, int]
_SPARE = 256  # keys that a padded map has room for, so that decoding seldom reallocates


@dataclass
class RegionMap:
    """Which image, if any, each position of each row belongs to.

    Args:
        ids: [B, L] int32; −1 for no image, else the image's index within its row, 0..R−1. Positions past L are in no image.
        num_regions: R ≥ 0.
        grids: for each row, for each of its images, the patch grid (h, w), or None where it is not known. A grid covers
            the first h·w tokens of its image; further tokens (tiles, newlines) lie in the region but not in the grid.
        validate: check the values of `ids`, which waits for the device.

    Raises:
        ValueError: `ids` has the wrong shape or dtype or holds a value outside −1..R−1, or `grids` does not fit `ids`.
    """

    ids: Tensor
    num_regions: int
    grids: list[list[Grid | None]] | None = None
    validate: InitVar[bool] = True
    _padded: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self, validate: bool) -> None:
        if not isinstance(self.ids, Tensor) or self.ids.dim() != 2:
            got = f"of shape {tuple(self.ids.shape)}" if isinstance(self.ids, Tensor) else type(self.ids).__name__
            raise ValueError(f"ids is {got}; it must be a tensor [B, L]")
        if self.ids.dtype != torch.int32:
            raise ValueError(f"ids is of dtype {self.ids.dtype}; it must be torch.int32")
        if not is_integer(self.num_regions) or self.num_regions < 0:
            raise ValueError(f"num_regions is {self.num_regions!r}; it must be an integer of at least 0")
        if validate and self.ids.numel():
            low, high = torch.stack(torch.aminmax(self.ids)).tolist()
            if low < -1 or high >= self.num_regions:
                raise ValueError(f"ids is in {low}..{high}; it must be in -1..num_regions-1 = -1..{self.num_regions - 1}")
        if self.grids is None:
            self.grids = [[None] * self.num_regions for _ in range(self.ids.shape[0])]
        if len(self.grids) != self.ids.shape[0]:
            raise ValueError(f"grids is of {len(self.grids)} rows; it must be of B = {self.ids.shape[0]}")
        if validate and self.ids.numel():
            for row, (grids, last) in enumerate(zip(self.grids, self.ids.amax(1).tolist(), strict=True)):
                if len(grids) <= last:
                    raise ValueError(f"grids[{row}] is of {len(grids)} images; it must be of the row's {last + 1}")
                for image, grid in enumerate(grids):
                    if grid is not None and not (len(grid) == 2 and all(is_integer(n) and n > 0 for n in grid)):
                        raise ValueError(f"grids[{row}][{image}] is {grid!r}; it must be (h, w) in patches, or None")

    def keys(self, length: int, total: int | None = None) -> Tensor:
        """Region ids [B, length] int32 of the keys that an attention call sees.

        length: the number of keys. total: positions seen so far, of which the keys are the last; None: they are the first.

        A view of one buffer that is grown rarely, so that a decode step allocates nothing.
        """
        start = 0 if total is None else max(total - length, 0)
        held = self.ids if self._padded is None else self._padded
        if held.shape[1] < start + length:
            grown = start + length + _SPARE - self.ids.shape[1]
            held = self._padded = F.pad(self.ids, (0, grown), value=-1)
        return held[:, start : start + length]

    def extend(
        self, ids: Tensor, grids: list[list[Grid | None]], past: int, *, pieces: bool = False, square: bool = True
    ) -> RegionMap:
        """The map after a further forward: the first `past` positions of this map, then those of the forward.

        ids, grids: of the new positions, [B, L] int32, images counted from 0; they are renumbered to follow those before.
        pieces: whether an image may have been split between two forwards: one at the end of this map and one at the beginning
            of `ids` are then the same.
        square: whether such an image is square, if its number of tokens is.
        """
        before = self.keys(past)
        held = (before.amax(1) + 1 if past else before.new_zeros(before.shape[0]))[:, None]
        goes_on = (before[:, -1:] >= 0) & (ids[:, :1] >= 0) if pieces and past else torch.zeros_like(held, dtype=torch.bool)
        joined = torch.cat([before, torch.where(ids >= 0, ids + held - goes_on.int(), ids)], 1)
        sizes = (joined == held - 1).sum(1, keepdim=True)
        facts = torch.cat([held, goes_on, sizes], 1).tolist()
        grids = [
            [*old[: n - 1], _grid_of(old[n - 1], size, square), *new[1:]] if same else old[:n] + new
            for old, new, (n, same, size) in zip(self.grids, grids, facts, strict=True)
        ]
        return RegionMap(joined, max(map(len, grids), default=0), grids, validate=False)

    def crop(self, length: int) -> RegionMap:
        """The map of the first `length` positions."""
        return RegionMap(self.ids[:, :length], self.num_regions, self.grids, validate=False)

    def last(self, length: int) -> RegionMap:
        """The map of the last `length` positions, as of a row without its left padding."""
        first = max(self.ids.shape[1] - length, 0)
        return RegionMap(self.ids[:, first:], self.num_regions, self.grids, validate=False)

    def select(self, rows: Tensor) -> RegionMap:
        """The map of the batch rows `rows` [B'] int64, in that order, as beam search reorders a cache."""
        alike = all(grid == self.grids[0] for grid in self.grids)
        grids = [self.grids[i] for i in ([0] * rows.numel() if alike else rows.tolist())]
        return RegionMap(self.ids.index_select(0, rows.to(self.ids.device)), self.num_regions, grids, validate=False)

    def repeat_interleave(self, repeats: int) -> RegionMap:
        """The map with each batch row repeated `repeats` times, as `num_return_sequences` does."""
        grids = [grid for grid in self.grids for _ in range(repeats)]
        return RegionMap(self.ids.repeat_interleave(repeats, 0), self.num_regions, grids, validate=False)

    def heat_maps(self, scores: Tensor) -> list[list[Tensor]]:
        """One heat map per image: for each batch row a list of tensors [..., h, w] in the dtype of `scores`.

        scores: [B, ..., Lk], for instance from :func:`ras_fast.ops.key_attention`.

        An image whose grid is not known comes as [..., 1, n], its n tokens in order. Raises ValueError when `scores` is not
        of this map's batch size.
        """
        if scores.dim() < 2 or scores.shape[0] != self.ids.shape[0]:
            raise ValueError(f"scores is of shape {tuple(scores.shape)}; it must be [B, ..., Lk] with B = {self.ids.shape[0]}")
        ids = self.keys(scores.shape[-1])
        return [
            [_heat_map(scores[row], ids[row] == image, grid) for image, grid in enumerate(grids)]
            for row, grids in enumerate(self.grids)
        ]


def _grid_of(grid: Grid | None, tokens: int, square: bool) -> Grid | None:
    """Of an image that is whole now; `grid` may be that of a piece."""
    if grid is not None and grid[0] * grid[1] == tokens:
        return grid
    return square_grid(tokens) if square else None


def _heat_map(scores: Tensor, inside: Tensor, grid: Grid | None) -> Tensor:
    values = scores[..., inside]
    if grid is None or grid[0] * grid[1] > values.shape[-1]:
        return values.unsqueeze(-2)
    return values[..., : grid[0] * grid[1]].unflatten(-1, grid)


def image_regions(visual: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Region ids [B, L] int32 from `visual` [B, L] bool, the positions that hold image tokens.

    `lengths` are the token counts of the images, in order, rows one after the other. They tell adjacent images apart; they
    are ignored when they do not add up to the number of visual positions. Without them an image is a run of such positions.
    """
    if visual.dim() != 2 or visual.dtype != torch.bool:
        raise ValueError(f"visual is {visual.dtype} of shape {tuple(visual.shape)}; it must be torch.bool [B, L]")
    if lengths is not None and 0 < sum(lengths) == int(visual.sum()):
        ends = torch.tensor([n for n in lengths if n], device=visual.device).cumsum(0)
        image = torch.bucketize(visual.flatten().cumsum(0), ends).view_as(visual)
        if visual.shape[0] > 1:  # counted from 0 in each row
            image = image - torch.where(visual, image, ends.numel()).amin(1, keepdim=True)
    else:
        image = (visual & ~F.pad(visual, (1, 0))[:, :-1]).cumsum(1) - 1
    return torch.where(visual, image, -1).to(torch.int32)


def join_regions(parts: Sequence[Tensor]) -> Tensor:
    """Region ids [B, L] int32 of regions of several kinds, none inside another, counted in the order in which they begin."""
    if len(parts) == 1 or not parts[0].numel():
        return parts[0]
    before = [F.pad(part.cummax(1).values, (1, 0), value=-1)[:, :-1] for part in parts]
    starts = torch.stack([part > past for part, past in zip(parts, before, strict=True)]).any(0)
    inside = torch.stack([part >= 0 for part in parts]).any(0)
    return torch.where(inside, starts.cumsum(1) - 1, -1).to(torch.int32)


def square_grid(tokens: int) -> Grid | None:
    """(s, s) when `tokens` is a square number."""
    side = math.isqrt(tokens)
    return (side, side) if side and side * side == tokens else None


def boxes_to_patches(boxes: Tensor | Sequence[Sequence[float]], image_size: tuple[int, int], grid: Grid) -> Tensor:
    """Pixel boxes as patches.

    Args:
        boxes: [N, 4], (x0, y0, x1, y1) in pixels of an image of `image_size` (height, width), x1 and y1 exclusive.
        grid: (h, w) patches that the whole image is cut into.

    Returns:
        [N, h, w] bool: the patches that a box overlaps.

    Raises:
        ValueError: a box is not within the image or is empty; a size is not positive.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    if boxes.shape == (0,):  # of an empty list
        boxes = boxes.view(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes is of shape {tuple(boxes.shape)}; it must be [N, 4]")
    if min(*image_size, *grid) < 1:
        raise ValueError(f"image_size is {image_size} and grid is {grid}; both must be positive")
    height, width = image_size
    x0, y0, x1, y1 = boxes.unbind(1)
    inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x0 < x1) & (y0 < y1)
    if not bool(inside.all()):
        bad = boxes[~inside][0].tolist()
        raise ValueError(f"boxes holds {bad}; it must satisfy 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}")
    columns = _overlaps(x0, x1, width, grid[1])
    rows = _overlaps(y0, y1, height, grid[0])
    return rows[:, :, None] & columns[:, None, :]


def _overlaps(low: Tensor, high: Tensor, size: int, cells: int) -> Tensor:
    """[N, cells] bool: which of `cells` equal intervals of 0..size an interval low..high overlaps."""
    edges = torch.arange(cells + 1, dtype=low.dtype, device=low.device) * size / cells
    return (low[:, None] < edges[1:]) & (high[:, None] > edges[:-1])
