"""Pictures: where attention falls on an image, how much of it comes from each layer and head, how well a risk separates.

Charts come as matplotlib `Figure`s made without pyplot: nothing global, no display needed; `figure.savefig(path)` writes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ras_fast.evaluation.metrics import Estimate, auroc, roc_curve

COLOURS = "inferno"
OPACITY = 0.75  # of the highest score


def heat_map(
    image: Image.Image,
    scores: Tensor | np.ndarray,
    *,
    box: tuple[int, int, int, int] | None = None,
) -> Image.Image:
    """Scores laid over the picture: the warmer and the less transparent, the nearer to the highest score.

    Args:
        image: the picture, any mode.
        scores: [h, w], one for each patch, as `RegionMap.heat_maps` gives.
        box: (left, top, right, bottom) in pixels, the part of the picture that the patches cover; None: all of it.

    Returns:
        RGB, as large as `image`. Pixels outside `box`, and where the score is 0, are the picture's own.

    Raises:
        ValueError: `scores` is not [h, w], or holds a negative, NaN or infinite value; `box` is not within the picture.
    """
    scores = _per_patch(scores)
    left, top, right, bottom = box or (0, 0, *image.size)
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise ValueError(f"box is {box}; it must be an area within the picture's {image.width} x {image.height} pixels")
    relative = Image.fromarray(scores / max(scores.max(), np.finfo(np.float32).tiny))
    relative = np.asarray(relative.resize((right - left, bottom - top), Image.Resampling.BILINEAR))[..., None]
    colour = matplotlib.colormaps[COLOURS](relative[..., 0])[..., :3] * 255
    picture = np.array(image.convert("RGB"))
    covered = picture[top:bottom, left:right]
    covered[:] = np.round(covered + OPACITY * relative * (colour - covered))
    return Image.fromarray(picture)


def save_heat_map(
    path: str | Path,
    image: Image.Image,
    scores: Tensor | np.ndarray,
    *,
    box: tuple[int, int, int, int] | None = None,
    title: str = "",
) -> None:
    """Writes the picture and its heat map side by side, with a scale of the scores. Arguments as `heat_map`."""
    overlay = heat_map(image, scores, box=box)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    picture, heat = figure.subplots(1, 2)
    picture.imshow(image.convert("RGB"))
    heat.imshow(overlay)
    for axes in (picture, heat):
        axes.set_axis_off()
    scale = matplotlib.colors.Normalize(0, max(float(_per_patch(scores).max()), 1e-12))
    mappable = matplotlib.cm.ScalarMappable(scale, COLOURS)
    figure.colorbar(mappable, ax=heat, shrink=0.85, label="share of attention per patch")
    figure.suptitle(title, fontsize=10, parse_math=False)  # a user's words: $ is a dollar
    figure.savefig(path, dpi=150)


def safety_awareness_chart(scores: dict[int, float], chosen: int | None = None) -> Figure:
    """AutoSteer's safety awareness score of each layer that was looked at, the chosen one in another colour.

    Raises:
        ValueError: there is none, or `chosen` is not among them.
    """
    if not scores or (chosen is not None and chosen not in scores):
        raise ValueError(f"scores is of layers {sorted(scores)}; it must hold at least one, and chosen = {chosen}")
    layers = sorted(scores)
    figure = Figure(figsize=(min(3 + 0.3 * len(layers), 12), 3.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#c0504d" if layer == chosen else "#8da7c9" for layer in layers]
    axes.bar([str(layer) for layer in layers], [scores[layer] for layer in layers], color=colours)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="input of decoder layer", ylabel="mean pairwise cosine", title="safety awareness score")
    return figure


def risk_histogram(risks: dict[str, dict[str, tuple[Sequence[float], Sequence[bool]]]]) -> Figure:
    """Histograms of risks in 0..1: a column for each defence, a row for each kind of query; NaN are left out and counted.

    Args:
        risks: defence -> kind -> (risks, which items are harmful); a defence may lack a kind.

    Raises:
        ValueError: there is none.
    """
    kinds = list(dict.fromkeys(kind for groups in risks.values() for kind in groups))
    if not kinds:
        raise ValueError("risks is empty; it needs values for at least one defence and one kind")
    size = (1.2 + 2.1 * len(risks), 1.2 + 0.8 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(kinds), len(risks), sharex=True, squeeze=False)
    for column, (name, groups) in zip(grid.T, risks.items(), strict=True):
        column[0].set_title(name, fontsize=10)
        column[-1].set(xlabel="risk", xlim=(-0.02, 1.02))
        for axes, kind in zip(column, kinds, strict=True):
            values, harmful = groups.get(kind, ([], []))
            values, harmful = _array(values), np.asarray(harmful, dtype=bool)
            finite = ~np.isnan(values)
            parts = [values[finite & ~harmful], values[finite & harmful]]
            bins = np.linspace(0, 1, 21)
            axes.hist(parts, bins, stacked=True, color=["#8da7c9", "#c0504d"], label=["harmless", "harmful"])
            axes.set_yticks([])
            axes.spines[["top", "right", "left"]].set_visible(False)
            if not finite.all():
                axes.text(0.5, 0.8, f"{(~finite).sum()} NaN", transform=axes.transAxes, ha="center", fontsize=8)
    for axes, kind in zip(grid[:, 0], kinds, strict=True):
        axes.set_ylabel(kind.replace("_", " "), rotation=0, ha="right", va="center", parse_math=False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=2, loc="outside lower right")
    return figure


def roc_chart(curves: dict[str, tuple[Sequence[float], Sequence[bool]]]) -> Figure:
    """ROC curves of several scores, the upper left corner enlarged; the legend gives each AUROC.

    Args:
        curves: name -> (scores [n], which items [n] are harmful).

    Raises:
        ValueError: as `ras_fast.evaluation.metrics.roc_curve`.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    corner = axes.inset_axes((0.4, 0.12, 0.55, 0.55), xlim=(-0.003, 0.1), ylim=(0.9, 1.003))
    for i, (name, (scores, positive)) in enumerate(curves.items()):
        width = 1 + 0.8 * (len(curves) - 1 - i)  # nest where curves coincide
        for place in (axes, corner):
            label = f"{name}: {auroc(scores, positive):.3f}"
            place.plot(*roc_curve(scores, positive), linewidth=width, solid_joinstyle="miter", label=label)
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(xlabel="benign flagged", ylabel="harmful flagged", xlim=(-0.02, 1), ylim=(0, 1.02), aspect="equal")
    corner.tick_params(labelsize=7)
    axes.indicate_inset_zoom(corner)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, title="AUROC", loc="outside right upper")
    return figure


def trade_off_chart(points: dict[str, tuple[Estimate, Estimate]]) -> Figure:
    """Attack success against over-refusal, one point per defence; the lower left corner is best.

    Args:
        points: name -> (share of harmless queries refused, share of harmful queries answered), with their intervals.

    The names of defences whose points nearly coincide are written together.
    """
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    for refused, answered in points.values():
        errors = [[[e.value - e.low], [e.high - e.value]] for e in (answered, refused)]
        axes.errorbar(refused.value, answered.value, *errors, fmt="o", markersize=4, linewidth=0.8, color="#3b5b8c", alpha=0.6)
    for (x, y), names in _together(points).items():
        right, up = x < 0.5, y < 0.5
        align = {"ha": "left" if right else "right", "va": "bottom" if up else "top", "textcoords": "offset points"}
        lines = [", ".join(names[i : i + 2]) for i in range(0, len(names), 2)]
        axes.annotate("\n".join(lines), (x, y), (8 if right else -8, 6 if up else -6), fontsize=8, linespacing=1.3, **align)
    axes.set(xlabel="harmless queries refused", ylabel="harmful queries answered", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure


def _together(points: dict[str, tuple[Estimate, Estimate]]) -> dict[tuple[float, float], list[str]]:
    """(x, y) of the first of each group of points no further apart than 0.1 -> the names of the group."""
    groups: dict[tuple[float, float], list[str]] = {}
    for name, (refused, answered) in points.items():
        x, y = refused.value, answered.value
        place = next((p for p in groups if abs(p[0] - x) <= 0.1 and abs(p[1] - y) <= 0.1), (x, y))
        groups.setdefault(place, []).append(name)
    return groups


def _array(values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)


def _per_patch(scores: Tensor | np.ndarray) -> np.ndarray:
    """[h, w] float32, finite and not negative."""
    scores = _array(scores)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores is of shape {scores.shape}; it must be [h, w], not empty")
    if not np.isfinite(scores).all() or scores.min() < 0:
        raise ValueError(f"scores is in {scores.min()}..{scores.max()}; every score must be finite and at least 0")
    return scores
