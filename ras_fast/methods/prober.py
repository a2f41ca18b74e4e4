"""AutoSteer's prober: P(toxic) of a prompt from the state that enters one decoder layer, and how it is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ras_fast.ops._registry import outside_autocast

THRESHOLD = 0.5
WIDTH = 64  # of the prober's hidden layer
VALIDATION = 0.2  # share of the pairs that training does not see
EPOCHS, RATE = 40, 1e-3


def assess(prober: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """t = P(toxic) [B] fp32 of hidden states [B, d], and which could not be computed [B] bool: there t is 1."""
    logits = _prober_logits(hidden, prober)
    # A −inf would not survive the ReLU, so both ends are looked at.
    failed = ~(torch.isfinite(hidden).all(-1) & torch.isfinite(logits).all(-1))
    return logits.softmax(-1)[:, 1].masked_fill(failed, 1.0), failed


@outside_autocast
def _prober_logits(hidden: Tensor, prober: dict[str, Tensor]) -> Tensor:
    inner = F.relu(F.linear(hidden.float(), prober["in.weight"], prober["in.bias"]))
    return F.linear(inner, prober["out.weight"], prober["out.bias"])


def safety_awareness(safe: Tensor, toxic: Tensor) -> float:
    """Safety awareness score: the mean over i < j of cos(Δ_i, Δ_j), where Δ = safe − toxic, both [n, d] with n > 1.

    In O(n·d) time, as Σ_{i≠j} cos = ‖Σ Δ̂‖² − n. A pair without a difference counts as a cosine of 0. Raises ValueError when
    the shapes do not fit.
    """
    if safe.shape != toxic.shape or safe.dim() != 2 or len(safe) < 2:
        raise ValueError(f"safe is {tuple(safe.shape)} and toxic {tuple(toxic.shape)}; both need to be [n, d] with n > 1")
    units = F.normalize(safe.double() - toxic.double(), dim=-1)
    count = len(units)
    return float((units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1)))


def split(groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation pairs, [n] of whose `groups` of equal pairs none is on both sides, nor are
    the two questions of a pair."""
    count = int(groups.max()) + 1
    place = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).argsort()[groups]
    order, held = place.argsort(stable=True), place < max(1, round(VALIDATION * count))
    return order[int(held.sum()) :], order[: int(held.sum())]


def choose_layer(layer, scores: dict[int, float], states, training, validation, seed: int):
    """(the layer, its prober, what is known about it)."""
    telling = [i for i, safe, toxic in zip(scores, states["safe"], states["toxic"], strict=True) if _differ(safe, toxic)]
    if not telling:
        raise ValueError(
            f"layer is {layer!r}, but what enters layers {list(scores)} at a prompt's end is the same for both questions of "
            "every pair; another layer is needed, or pairs whose questions differ"
        )
    candidates = telling if layer == "validation" else [max(telling, key=scores.__getitem__)]
    trained = {}
    for i in candidates:
        n = list(scores).index(i)
        trained[i] = train_prober(states["safe"][n], states["toxic"][n], training, validation, seed=seed)
    chosen = min(trained, key=lambda i: trained[i][1]["loss"])
    return (chosen, *trained[chosen])


def _differ(safe: Tensor, toxic: Tensor) -> bool:
    """Whether states [n, d] are others but for rounding: the rows of a batch need not be summed in the same order."""
    return bool((safe - toxic).norm() > 1e-5 * safe.norm())


def train_prober(
    safe: Tensor, toxic: Tensor, training: Tensor, validation: Tensor, *, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trains the prober, an MLP d → 64 → ReLU → 2, by cross-entropy and AdamW.

    safe, toxic: [n, d] fp32, the states of each pair's two questions.
    training, validation: indices into n. The epoch with the least validation loss is kept.

    Returns the weights by name ("in.weight", "in.bias", "out.weight", "out.bias"), and {"epoch", "loss", "accuracy"} on the
    validation pairs. Inputs are standardised for training; the scaling is then folded into the first layer.

    Raises ValueError when the loss is not finite in any epoch.
    """
    def gather(indices: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([0, 1]).repeat_interleave(len(indices))
        return torch.cat([safe[indices], toxic[indices]]), labels

    x, y = gather(training)
    mean, scale = _standard(x)
    x, (held_x, held_y) = (x - mean) / scale, gather(validation)
    held_x = (held_x - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
        best: dict[str, float] = {"loss": math.inf}
        for epoch in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                logits = net(held_x)
                loss = F.cross_entropy(logits, held_y).item()
            if loss < best["loss"]:
                accuracy = (logits.argmax(-1) == held_y).float().mean().item()
                best = {"epoch": epoch, "loss": loss, "accuracy": accuracy}
                kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if not math.isfinite(best["loss"]):
        raise ValueError("the prober's loss is not finite: the captured states are too large or constant")
    weight = kept["0.weight"] / scale
    bias = kept["0.bias"] - weight @ mean
    return {"in.weight": weight, "in.bias": bias, "out.weight": kept["2.weight"], "out.bias": kept["2.bias"]}, best


def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, scale) [d] of states [n, d]. A value that hardly varies in calibration is scaled by a rounding step of bfloat16,
    and one that does not vary is left out, with an infinite scale: else the next step would count as an event unheard of."""
    mean, spread = x.mean(0), x.std(0)
    return mean, torch.maximum(spread, mean.abs() * 2**-7).clamp_min(1e-6).masked_fill(spread == 0, torch.inf)


def gate_threshold(
    prober: dict[str, Tensor], safe: Tensor, toxic: Tensor, over_refusal: float | None
) -> tuple[float, dict[str, float]]:
    """The gate's threshold for states of validation questions [n, d], and the share of each kind that is above it."""
    safe_risk, toxic_risk = assess(prober, safe)[0], assess(prober, toxic)[0]
    threshold = THRESHOLD
    if over_refusal is not None:
        allowed = int(over_refusal * len(safe_risk))  # the highest risks of safe questions, which the threshold may lie below
        ordered = safe_risk.sort(descending=True).values
        threshold = min(threshold, float(ordered[allowed])) if allowed < len(ordered) else 0.0
    return threshold, {"refused_safe": _above(safe_risk, threshold), "refused_toxic": _above(toxic_risk, threshold)}


def check_gate(layer: int, refused_safe: float, refused_toxic: float) -> None:
    """Raises ValueError for a gate that tells nothing apart: at worst it never opens, and the profile would defend nothing."""
    if refused_toxic <= refused_safe:
        raise ValueError(
            f"the gate, read at layer {layer}, opens for {refused_toxic:.0%} of the held-out unsafe questions and for "
            f"{refused_safe:.0%} of the safe ones, no better than chance; more or clearer pairs are needed, or another layer"
        )


def _above(risk: Tensor, threshold: float) -> float:
    return float((risk > threshold).float().mean())
