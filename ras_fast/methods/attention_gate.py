"""A risk from how heads look at images: features of region masses, and a logistic gate over them.

Shapes: B sequences, M query rows, R images, n heads, three features a head. A head is a (layer, head) pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ras_fast.checks import is_integer
from ras_fast.ops._registry import outside_autocast
from ras_fast.profile import RasProfile

Head = tuple[int, int]
Looks = tuple[Tensor, Tensor, Tensor]  # of rows: how many [B]; for each head the sum and the maximum of their attention [B, n]
RISKS = ("moras", "moras+attention")
FEATURES = 3  # of a head


def features(mass: Mapping[int, Tensor], heads: Sequence[Head], rows: Tensor) -> Tensor:
    """Three features per head, [B, 3n] fp32, of its attention to all images together: the mean and the maximum over the
    prompt's rows, and the value of the last row, from which the answer is read.

    mass: [B, Hq, M, R] for each layer that has a head in `heads`, as `Patch.collect` leaves them.
    rows: [B, M] bool, the text rows after a prompt's last image (`rows_after_images`). Without any the features are NaN.
    """
    return features_so_far(mass, heads, rows, None)[0]


def features_so_far(
    mass: Mapping[int, Tensor], heads: Sequence[Head], rows: Tensor, before: Looks | None
) -> tuple[Tensor, Looks]:
    """`features` of a prompt that comes in pieces, as far as it has come, and what they are computed from with the next piece.

    before: of the pieces before this one; it counts for sequences of which this one holds rows after the last image alone.
    """
    looked = torch.stack([mass[layer][:, head].sum(-1) for layer, head in heads], 1)  # [B, n, M]
    position = torch.arange(rows.shape[1], device=rows.device)
    end = torch.where(rows, position, 0).amax(-1)[:, None, None].expand(-1, len(heads), -1)
    others = ~rows[:, None]
    count, total, highest = rows.sum(-1), looked.masked_fill(others, 0).sum(-1), looked.masked_fill(others, -torch.inf).amax(-1)
    if before is not None:
        goes_on = rows.all(-1)
        count = count + torch.where(goes_on, before[0], 0)
        total = total + torch.where(goes_on[:, None], before[1], 0)
        highest = torch.where(goes_on[:, None], highest.maximum(before[2]), highest)
    found = torch.stack([total / count[:, None], highest, looked.gather(-1, end).squeeze(-1)], -1)
    return torch.where(rows.any(-1)[:, None, None], found, torch.nan).flatten(1), (count, total, highest)


def rows_after_images(ids: Tensor, past: int | Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which rows of a forward come after all images of their sequence, and which sequences have images.

    ids: [B, L] int32, a region map's. past: positions before this forward's `length` ones.
    Returns ([B, length] bool, [B] bool). In a sequence without images all rows count, padding too.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(ids >= 0, position, -1).amax(1) if ids.shape[1] else ids.new_full((ids.shape[0],), -1)
    own = torch.arange(length, device=ids.device) + past
    return own > last[:, None], last >= 0


class AttentionGate:
    """r = σ(w·features + b), or with S: r = σ(u S + w·features + b), and without images r = σ(u S + b₀).

    heads: the n (layer, head) pairs. weights: [3n]. bias: [1]. similarity_weight: [1], u, and similarity_bias: [1], b₀; None
        without S. b₀ is b + w·(mean features): a prompt without images counts as one that looks at them as most do.

    Raises ValueError when these do not fit together, and where the risk does not rise with S.
    """

    def __init__(self, profile: RasProfile, device):
        self.heads = _heads(profile.config.get("heads"))
        wanted = {"attention_weights": FEATURES * len(self.heads), "attention_bias": 1}
        if profile.method != "attention":
            wanted |= {"similarity_weight": 1, "similarity_bias": 1}
        tensors = {name: profile.tensors.get(name) for name in wanted}
        for name, size in wanted.items():
            if tensors[name] is None or tensors[name].shape != (size,):
                got = None if tensors[name] is None else tuple(tensors[name].shape)
                raise ValueError(f"{name} has shape {got}; it needs to be ({size},) for {len(self.heads)} heads")
        if profile.method != "attention" and not tensors["similarity_weight"].item() > 0:
            got = tensors["similarity_weight"].item()
            raise ValueError(f"similarity_weight is {got}; it needs to be positive: the risk rises with S")
        placed = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
        self.weights, self.bias = placed["attention_weights"], placed["attention_bias"]
        self.similarity_weight, self.similarity_bias = placed.get("similarity_weight"), placed.get("similarity_bias")

    @property
    def layers(self) -> list[int]:
        """The layers whose mass is needed, in order."""
        return sorted({layer for layer, _ in self.heads})

    def logit(self, features: Tensor) -> Tensor:
        """[B] of features [B, 3n]. Not finite where a feature is not."""
        return _weighted(features.float(), self.weights) + self.bias

    def joint_logit(self, features: Tensor, has_images: Tensor, similarity: Tensor) -> Tensor:
        """[B] of features [B, 3n], which sequences have images [B] bool, and S [B]. Not finite where what it reads is not."""
        looked = torch.where(has_images, self.logit(features), self.similarity_bias)
        return looked + similarity.float() * self.similarity_weight


@outside_autocast
def _weighted(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights


def _heads(pairs: object) -> list[Head]:
    if not isinstance(pairs, list) or not pairs or not all(_is_head(pair) for pair in pairs):
        raise ValueError(f"config 'heads' is {pairs!r}; it needs to be a list of at least one [layer, head]")
    return [(layer, head) for layer, head in pairs]


def _is_head(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_integer, pair))
