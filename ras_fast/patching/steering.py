"""Steering inside the fused residual + norm kernels, driven by tensors that never leave the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ras_fast.ops._check import is_tensor

_SLOT_DTYPES = frozenset((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8))


class Steering:
    """Says for each sequence whether it is steered, by which vector and how far. One object may serve several layers.

    slot: [B] int32, the row of a layer's vectors for each sequence, −1 for none; or [T] int32, one for each of the T = B·L
        rows of the next forward.
    alpha: float32, shaped like `slot`: how far. 0 leaves a row bit-identical to the unsteered model.

    Both are persistent: `set_rows` writes into them in place as long as their size stays, so a captured CUDA graph or a
    compiled decode step reads new values without being made again.
    """

    def __init__(self) -> None:
        self.slot: Tensor | None = None
        self.alpha: Tensor | None = None

    def set_rows(self, slot: Tensor, alpha: Tensor) -> None:
        """Sets `slot`, of a signed integer dtype or uint8, and `alpha` for the forwards to come. No host sync.

        Raises:
            ValueError: a tensor is not one-dimensional, their sizes differ, or `slot` is of another dtype.
        """
        is_tensor("slot", slot, "a tensor [B] or [T]")
        is_tensor("alpha", alpha, "a tensor like slot")
        if slot.dim() != 1 or slot.shape != alpha.shape:
            raise ValueError(f"slot is {tuple(slot.shape)} and alpha {tuple(alpha.shape)}; both must be [B] or [T]")
        if slot.dtype not in _SLOT_DTYPES:
            raise ValueError(f"slot is of dtype {slot.dtype}; it must be int8, int16, int32, int64 or uint8")
        if self.slot is None or self.slot.shape != slot.shape or self.slot.device != slot.device:
            with torch.inference_mode(False):  # a later call may come from outside of it
                self.slot = torch.empty_like(slot, dtype=torch.int32)
                self.alpha = torch.empty_like(alpha, dtype=torch.float32)
        if slot.dtype == torch.int64:  # what is out of range stays out of range
            slot = slot.clamp(-2, torch.iinfo(torch.int32).max)
        self.slot.copy_(slot)
        self.alpha.copy_(alpha.detach())  # else each call would add to one graph, which a deepcopy of the model refuses


@dataclass
class Site:
    """A place where rows are steered: one layer's vectors [S, d], and which positions of a sequence take part.

    name: the layer's index, or "final".
    waiting: threads whose forward has begun, and has not given steered states here yet.
    """

    name: int | str
    steering: Steering
    vectors: Tensor
    mode: str
    last_only: bool
    waiting: set[int] = field(default_factory=set)

    def note(self) -> None:
        """This forward's states are steered here."""
        if torch.compiler.is_compiling():  # a graph, as of this layer alone, knows no threads: it leaves none to wait
            self.waiting = set()
        else:
            self.waiting.discard(get_ident())

    def covers_all(self) -> bool:
        """Whether every position of a forward is steered alike, whatever sequence it is of."""
        return not self.last_only and self.steering.slot is not None and self.steering.slot.numel() == 1

    def keywords(self, x: Tensor) -> dict[str, Any]:
        """Steering keywords of the norm ops for `x` [B, L, d].

        Raises:
            RuntimeError: no rows were set: to leave the answer unsteered by accident would be worse than an error.
            ValueError: the number of rows that were set is neither that of the batch nor that of this forward's tokens.
        """
        slot, alpha = self.steering.slot, self.steering.alpha
        if slot is None or alpha is None:
            raise RuntimeError("steering vectors are set, but not the rows to steer: call steering.set_rows(slot, alpha)")
        batch, length = x.shape[0], x.shape[1:-1].numel()
        if slot.numel() != batch * length:
            if slot.numel() != batch:
                tokens = batch * length
                raise ValueError(f"steering was set for {slot.numel()} rows; it must be for B = {batch} or T = {tokens}")
            slot, alpha = self._spread(slot, length, -1), self._spread(alpha, length, 0)
        return {
            "steer_vectors": self.vectors.to(x.device), "steer_slot": slot.to(x.device), "steer_alpha": alpha.to(x.device),
            "steer_mode": self.mode,
        }  # fmt: skip

    def _spread(self, per_sequence: Tensor, length: int, idle: int) -> Tensor:
        """[B] → [B·L], `idle` at every position but the last where only that one is steered."""
        if not self.last_only:
            return per_sequence.repeat_interleave(length)
        rows = per_sequence.new_full((per_sequence.shape[0], length), idle)
        rows[:, -1] = per_sequence
        return rows.flatten()


@dataclass
class Probe:
    """Directions [P, d] that a decoder layer's output is read along, by the kernel that steers it.

    receive: called in each forward with the dots [B, L, P+1] float32, h·directions and, last, ‖h‖², before the next layer runs.
    active: False switches the reading off.
    """

    directions: Tensor
    receive: Callable[[Tensor], None]
    active: bool = True
