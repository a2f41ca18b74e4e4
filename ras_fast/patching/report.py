"""What `patch` tells about what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

NO_INTERFACE = "do not go through transformers' attention interface"


@dataclass
class Report:
    """What `patch` did.

    fused_norms: residual adds that are fused with the norm after or before them, out of `norms` such adds.
    other_norms: those that no sum precedes, as of queries and keys, which are one kernel instead of several operations.
    rotations, tower_rotations: attention modules whose rotary embedding is one kernel, of the text model and outside of it.
    tower_attentions, tower_gelus: those outside of the text model which are this package's where that is faster.
    linears: linear layers that run by `ops.linear` where that is faster, as in a decode step.
    mlps: gated MLPs whose two projections and activation are one kernel in a decode step.
    unfused: what stayed as it was, by module name, and why.
    regions: None where image statistics are on, else why they are not.
    blind: where they are on, the decoder layers without: those that do not go through transformers' attention interface.
    """

    model: str
    layers: int
    fused_layers: int = 0
    fused_norms: int = 0
    norms: int = 0
    other_norms: int = 0
    rotations: int = 0
    tower_rotations: int = 0
    tower_attentions: int = 0
    tower_gelus: int = 0
    linears: int = 0
    mlps: int = 0
    unfused: dict[str, str] = field(default_factory=dict)
    regions: str | None = None
    blind: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.fused_layers} of {self.layers} decoder layers fused, "
            f"{self.fused_norms} of {self.norms} residual adds with their norm, {self.other_norms} other norms, "
            f"{self.rotations} rotary embeddings and {self.tower_rotations} in vision towers, "
            f"{self.tower_attentions} attentions and {self.tower_gelus} GELUs there, {self.linears} linear layers, "
            f"{self.mlps} gated MLPs",
            f"image statistics: {self._statistics()}",
        ]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.unfused.items())])

    def _statistics(self) -> str:
        if self.regions is not None:
            return f"off, {self.regions}"
        return f"on, but for the layers {', '.join(map(str, self.blind))}, which {NO_INTERFACE}" if self.blind else "on"
