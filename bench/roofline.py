"""Roofline of the last runs: `python bench/roofline.py [DEVICE]` draws bench/results/<device>/roofline.png.

A point is one shape of bench_norm.py or bench_attention.py: operations a byte against operations a second. The roof is what
a plain copy and a matrix product reached in the same runs. Norms count 10 operations an element. Left of the ridge the
bytes decide, right of it the operations; a point above the slanted roof had its data in the caches.
"""

from __future__ import annotations

import json
from pathlib import Path

import harness
import numpy as np
from matplotlib.figure import Figure

NORM_OPERATIONS = 10  # an element: add, square, sum, scale, weight, and four roundings and conversions
CEILINGS = ("copy GB/s", "matmul GFLOP/s")


def points(folder: Path) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """(ceilings, label -> [(FLOP a byte, GFLOP/s)]). Exits where there are no results, or some without ceilings."""
    found: dict[str, list[tuple[float, float]]] = {}
    limits = dict.fromkeys(CEILINGS, 0.0)
    paths = sorted(path for name in ("norm", "attention") for path in folder.glob(f"{name}*.json"))
    if not paths:
        raise SystemExit(f"{folder} has no norm*.json or attention*.json: run bench_norm.py or bench_attention.py")
    for path in paths:
        run = json.loads(path.read_text())
        missing = [name for name in CEILINGS if name not in run["ceilings"]]
        if missing:
            raise SystemExit(f"{path} has no ceilings {', '.join(missing)}: run its benchmark again")
        limits = {name: max(value, run["ceilings"][name]) for name, value in limits.items()}
        for row in run["rows"]:
            if "d" in row:
                label, flop = f"norm, {row['dtype']}", row["T"] * row["d"] * NORM_OPERATIONS / 1e9
            else:
                label, flop = f"attention, {'decode' if row['Lq'] == 1 else 'prefill'}", row["GFLOP"]
            found.setdefault(label, []).append((flop * 1e3 / row["MB"], flop / row["ras_fast µs"] * 1e6))
    return limits, found


def draw(folder: Path) -> Figure:
    limits, found = points(folder)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    intensity = np.geomspace(1, 2000, 200)
    copy, matmul = (limits[name] for name in CEILINGS)
    axes.plot(intensity, np.minimum(copy * intensity, matmul), color="black")
    axes.annotate(f"copy {copy:.0f} GB/s", (1.2, copy * 1.5), rotation=30)
    axes.annotate(f"matmul {matmul:.0f} GFLOP/s", (300, matmul * 1.12))
    for (label, values), marker in zip(sorted(found.items()), "osD^v", strict=False):
        axes.scatter(*zip(*values, strict=True), label=label, marker=marker, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    folder = harness.results_folder(__doc__)
    path = folder / "roofline.png"
    draw(folder).savefig(path, dpi=150)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
