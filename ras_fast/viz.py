"""Pictures: where attention falls on an image, which layer tells harm from its like.

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


def as_array(values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)


def _per_patch(scores: Tensor | np.ndarray) -> np.ndarray:
    """[h, w] float32, finite and not negative."""
    scores = as_array(scores)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores is of shape {scores.shape}; it must be [h, w], not empty")
    if not np.isfinite(scores).all() or scores.min() < 0:
        raise ValueError(f"scores is in {scores.min()}..{scores.max()}; every score must be finite and at least 0")
    return scores
