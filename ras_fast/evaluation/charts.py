"""Charts of an evaluation: how well a risk separates, and what a defence costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ras_fast.evaluation.metrics import Estimate, auroc, roc_curve
from ras_fast.viz import as_array


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
            values, harmful = as_array(values), np.asarray(harmful, dtype=bool)
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
