"""AutoSteer's refusal head: the matrix M that turns the states after the last norm towards a refusal, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ras_fast.methods.checkpoint import Checkpoint

EPSILON = 0.1  # ε at strength 1, the strength that M is trained at
STRENGTHS = tuple(2.0**k for k in range(-2, 7))
EPOCHS, RATE = 10, 1.6  # learning rate: RATE / d, so that a step changes M h by the same share at any width


def _loss(logits: Callable[[Tensor], Tensor], m: Tensor, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the answer's tokens, states [n, A, d] turned at strength 1."""
    turned = states + EPSILON * F.linear(states, m)
    return F.cross_entropy(logits(turned).flatten(0, 1), targets.repeat(len(states)))


def train_head(
    logits: Callable[[Tensor], Tensor], final: Tensor, targets: Tensor, training: Tensor, validation: Tensor, seed: int,
    saved: Checkpoint, progress: bool,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """M [d, d] fp32 of the epoch with the least validation loss, and {"epoch", "losses"}.

    The states after the last norm do not depend on M, so they are captured once and every epoch is a pass over them.
    """
    device, d = targets.device, final.shape[-1]
    m = torch.eye(d, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([m], lr=RATE / d, weight_decay=0)
    best, losses = m.detach().clone(), []
    resumed = saved.load("head")
    if resumed is not None:
        tensors, facts = resumed
        losses, best = facts["losses"], tensors["best"].to(device)
        m.data.copy_(tensors["m"])
        moments = {name: tensors[name].to(device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[m] = {"step": tensors["step"], **moments}
    held = final[validation].to(device)
    epochs = range(len(losses), EPOCHS)
    for epoch in tqdm(epochs, desc="refusal head", initial=len(losses), total=EPOCHS, disable=not progress):
        # Shuffled by (seed, epoch), so that a resumed training is the uninterrupted one.
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed * EPOCHS + epoch))
        for rows in training[order].split(16):
            loss = _loss(logits, m, final[rows].to(device), targets)
            (m.grad,) = torch.autograd.grad(loss, [m])  # of M alone: the model stays as it is
            optimizer.step()
        with torch.no_grad():
            losses.append(_loss(logits, m, held, targets).item())
        if losses[-1] == min(losses):
            best = m.detach().clone()
        state = optimizer.state[m]
        tensors = {"m": m.detach(), "best": best, **{name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}}
        saved.save("head", tensors, {"losses": losses})
    return best, {"epoch": losses.index(min(losses)), "losses": losses}


def choose_strength(
    logits: Callable[[Tensor], Tensor], final: Tensor, targets: Tensor, m: Tensor, rank: int | None, strength: float | None
) -> tuple[dict[str, Tensor], float, dict[str, float], dict[str, Any]]:
    """(M as it is kept, in two factors if it has a rank; its strength; by strength the share of held-out answers, states
    [n, A, d], that are the refusal; what the rank keeps of it).

    strength: None: the one under which most are, the nearest to 1 among equals.
    Raises ValueError for a head that never refuses.
    """
    strengths = sorted({*STRENGTHS, *([] if strength is None else [float(strength)])})
    rates_of = partial(_sweep, logits, final, targets, strengths)
    factors = {"refusal": m} if rank is None else _truncate(m, rank)
    rates = rates_of(**factors)
    kept = {} if rank is None else {"rank": rank, "energy": _energy(m, rank), "full": rates_of(m)}
    strength = min(strengths, key=lambda s: (-rates[str(s)], abs(math.log(s)))) if strength is None else float(strength)
    if rates[str(strength)] == 0:
        raise ValueError(
            f"at strength {strength} none of the held-out answers is the refusal, token for token; by strength the share is "
            f"{rates}. Another strength, more of the rank, or a refusal in words that the model knows is needed"
        )
    return factors, strength, rates, kept


def _truncate(m: Tensor, rank: int) -> dict[str, Tensor]:
    """M's best approximation of that rank, as "refusal" [d, rank] and "refusal_right" [rank, d]."""
    u, s, v = torch.linalg.svd(m)
    root = s[:rank].sqrt()
    return {"refusal": (u[:, :rank] * root).contiguous(), "refusal_right": (root[:, None] * v[:rank]).contiguous()}


def _energy(m: Tensor, rank: int) -> float:
    """The share of M's squared singular values that this rank keeps."""
    squares = torch.linalg.svdvals(m).square()
    return float(squares[:rank].sum() / squares.sum())


@torch.no_grad()
def _sweep(
    logits: Callable[[Tensor], Tensor], final: Tensor, targets: Tensor, strengths: Sequence[float], refusal: Tensor,
    refusal_right: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """For each strength the share of answers, states [n, A, d], that are the refusal, token for token. Each token is read after
    the refusal's own before it, so this is what greedy decoding would give."""
    moved = F.linear(final, refusal if refusal_right is None else refusal @ refusal_right)
    rates = {}
    for strength in strengths:
        tokens = logits(final + EPSILON * strength * moved).argmax(-1)
        rates[str(strength)] = float((tokens == targets).all(-1).float().mean())
    return rates
