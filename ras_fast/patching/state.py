"""What a patched model carries between its forwards: which statistics are wanted, and those that were taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ras_fast.patching.tracking import RegionTracker
from ras_fast.patching.undo import StandIn
from ras_fast.registration import EXPLICIT, NAME


@dataclass
class Statistics:
    """Results of the last forward under `Patch.collect`, by decoder layer.

    mass: [B, H, M, R] float32, for each of the last M query rows the attention that falls on each image.
    scores: [B, H, Lk] float32, attention that each key receives from the last rows; `RegionMap.heat_maps` draws it.
    """

    mass: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)


def gather_heads(statistic: Tensor, group: Any = None) -> Tensor:
    """A statistic of this rank's heads [B, H / ranks, ...] as one of all heads [B, H, ...].

    For tensor parallelism, where each rank sees its own heads; every rank of `group` (None: all) has to call it.
    """
    parts = [torch.empty_like(statistic) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, statistic.contiguous(), group)
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Collection:
    """What `Patch.collect` asked for; None stands for all rows or layers."""

    rows: int | None
    scores: bool
    reduce: str
    layers: frozenset[int] | None


@dataclass
class Monitor:
    """A method that reads the mass of some layers while the forward runs, beside whatever is collected.

    receive: called with a layer and its mass [B, Hq, Lq, R] float32, before the layer goes on.
    active: False switches the reading off.
    """

    layers: frozenset[int]
    receive: Callable[[int, Tensor], None]
    active: bool = True


@dataclass(frozen=True)
class Request:
    """What one attention call has to compute: `rows` of mass and `score_rows` of key scores (None: all of them)."""

    rows: int | None
    score_rows: int | None = 0
    reduce: str = "mean"
    attentions: bool = False
    collection: Collection | None = None
    monitor: Monitor | None = None


@dataclass
class ModelState:
    """Shared by all attention modules of a patched model."""

    tracker: RegionTracker
    layers: dict[int, AttentionState] = field(default_factory=dict)
    collection: Collection | None = None
    monitor: Monitor | None = None
    statistics: Statistics = field(default_factory=Statistics)
    biases: dict[int, Tensor] = field(default_factory=dict)  # by layer, [Hq] for every image or [Hq, R]

    @contextmanager
    def collecting(self, collection: Collection) -> Iterator[Statistics]:
        """Forwards inside the block fill the statistics that it yields."""
        previous, outer = self.collection, self.statistics
        self.statistics, self.collection = Statistics(), collection
        try:
            yield self.statistics
        finally:
            self.collection = previous
            if previous is not None:
                self.statistics = outer

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Hook of the text model. Raises RuntimeError where statistics or a bias would silently come to nothing."""
        if self.collection is not None or self.monitor is not None or self.biases:
            name = module.config._attn_implementation
            if name not in (NAME, EXPLICIT):
                raise RuntimeError(
                    f"statistics or a region bias are in force, but the attention was changed to {name!r} after the model was "
                    f"patched: set it to {NAME!r}, or unpatch the model and patch it again"
                )
        self.tracker.before_text(module, args, kwargs)
        kept = kwargs.get("logits_to_keep")
        # Gemma 4 runs its later layers for these positions alone, but where None stands for their causal mask, which it knows
        # of "sdpa" alone; of one position it hides nothing.
        return (args, kwargs | {"logits_to_keep": 0}) if isinstance(kept, int) and kept > 1 else None


@dataclass
class AttentionState(StandIn):
    """The link from one attention module to its model's state.

    heads: Hq, known once it has been proved.
    sees_images: whether images are among its keys; False for the self-attention of a model that cross-attends to them.
    """

    model: ModelState
    layer: int
    heads: int = 0
    sees_images: bool = True

    def alone(self, memo: dict[int, Any]) -> None:
        """Without a link: it would go on by a map of its own, which no forward sets."""

    def __getstate__(self) -> dict[str, Any]:
        """Without its attention, or the pickle of one would hold those of all layers."""
        return {name: value for name, value in super().__getstate__().items() if name != "owner"}

    def request(self, attentions: bool) -> Request | None:
        """What the layer's attention call has to compute, or None where the plain call will do.

        attentions: the call's own `output_attentions`; some families do not pass it on, so the forward's counts as well.
        """
        tracker, collection, monitor = self.model.tracker, self.model.collection, self.model.monitor
        attentions = attentions or (tracker.attentions_asked and tracker.forward.attentions)
        if not attentions and collection is None and monitor is None and not self.model.biases:
            return None
        if collection is not None and collection.layers is not None and self.layer not in collection.layers:
            collection = None
        if monitor is not None and not (monitor.active and self.layer in monitor.layers):
            monitor = None
        every_row = attentions or monitor is not None
        if collection is None:
            wanted = every_row or self.layer in self.model.biases
            return Request(None if every_row else 0, attentions=attentions, monitor=monitor) if wanted else None
        rows, score_rows = None if every_row else collection.rows, collection.rows if collection.scores else 0
        return Request(rows, score_rows, collection.reduce, attentions, collection, monitor)

    def regions(self, batch: int, length: int) -> tuple[Tensor, int]:
        """(region ids [batch, length] of the keys, R)."""
        ids, num_regions = self.model.tracker.keys(batch, length)
        return (ids if self.sees_images else torch.full_like(ids, -1)), num_regions

    def bias(self, num_regions: int, device: torch.device) -> Tensor | None:
        """[Hq, R] float32 to add to the scores of each image's keys, or None."""
        bias = self.model.biases.get(self.layer)
        if bias is None or not num_regions:
            return None
        self.model.biases[self.layer] = bias = bias.to(device)
        if bias.dim() == 1:
            return bias[:, None].expand(-1, num_regions).contiguous()
        return functional.pad(bias, (0, num_regions - bias.shape[1])).contiguous()  # a negative pad cuts

    def deliver(self, request: Request, mass: Tensor, scores: Tensor | None) -> Tensor | None:
        """Stores what was collected; returns what the attention call returns as this layer's attentions."""
        collection = request.collection
        if collection is not None:
            if self.model.tracker.interrupted:
                raise RuntimeError(
                    "another thread's forward began while this one takes statistics under Patch.collect, which holds those of "
                    "one forward: use output_attentions=True, or run one thread after the other"
                )
            rows = mass.shape[2] if collection.rows is None else min(collection.rows, mass.shape[2])
            self.model.statistics.mass[self.layer] = mass[:, :, mass.shape[2] - rows :]
            if scores is not None:
                self.model.statistics.scores[self.layer] = scores
        if request.monitor is not None:
            request.monitor.receive(self.layer, mass)
        return mass if request.attentions else None
