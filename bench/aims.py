"""The aims for an H200 beside what was measured: `python bench/aims.py [DEVICE]` reads bench/results/<device>/*.json.

Each line shows an aim's worst case over the shapes it speaks of, and where that is. Exit status: 1 if one is missed.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import harness

NOISE = 1.02  # what two runs of one kernel differ by
NORM_LATENCY = 1.0  # µs of a short norm beside an empty kernel: a cold load, two reductions, a store (docs/kernels.md)
NORM_PEERS = ("eager", "compile", "liger", "flashinfer", "quack")
MASS_PEERS = ("eager weights", "flash + recompute", "indicator values", "split by region", "flex")

Row = dict[str, object]


@dataclass(frozen=True)
class Aim:
    """`value` of every row of `file` for which `where` holds is to be at most (or, with `least`, at least) `bound`."""

    text: str
    file: str
    where: Callable[[Row], object]
    value: Callable[[Row], float | None]
    bound: float
    least: bool = False

    def meets(self, value: float) -> bool:
        return (operator.ge if self.least else operator.le)(value, self.bound)


def over(row: Row, ours: str, *others: str, unit: str = "µs") -> float | None:
    """Our time over the best of the others'; None where either was not measured."""
    own, *times = (row.get(f"{name} {unit}") for name in (ours, *others))
    measured = [time for time in times if time]
    return own / min(measured) if own and measured else None


def over_norm_model(row: Row) -> float:
    copied = row["MB"] / row["limits"]["copy GB/s"] * 1e3
    return row["ras_fast µs"] / (row["empty µs"] + NORM_LATENCY + copied)


def over_itself(row: Row) -> float | None:
    """Of the fused kernel that runs: Hopper's own where it can, else Triton's."""
    hopper = over(row, "hopper", "hopper no mass")
    return over(row, "triton fused", "triton no mass") if hopper is None else hopper


def large(row: Row) -> bool:
    return row.get("graph", False) and row["T"] >= 4096


def decode(row: Row) -> bool:
    return row["Lq"] == 1


def selected(row: Row) -> bool:
    return row["Lq"] >= 1024 and row["rows"] <= 64


def all_rows(row: Row) -> bool:
    return row["Lq"] == row["rows"] > 1


def answer(row: Row) -> bool:
    return row["case"] == "benign, 128 answer tokens"


AIMS = [
    Aim("norm: share of copy, T, d ≥ 4096", "norm", lambda r: large(r) and r["d"] >= 4096, lambda r: r["share"], 0.9,
        least=True),
    Aim("norm: over the best peer, any size", "norm", lambda r: True, lambda r: over(r, "ras_fast", *NORM_PEERS), NOISE),
    Aim("norm: over empty kernel + bytes, T ≤ 64", "norm", lambda r: r.get("graph") and r["T"] <= 64, over_norm_model, 1.1),
    Aim("norm: steering all rows, T ≥ 4096", "norm", large, lambda r: over(r, "steer all", "ras_fast"), 1.02),
    Aim("norm: steering no row, T ≥ 4096", "norm", large, lambda r: over(r, "steer no row", "ras_fast"), 1.02),
    Aim("selected rows: over best SDPA, N ≥ 1k", "attention", selected, lambda r: r["over floor"], 1.03),
    Aim("all rows: fused over itself without mass", "attention", all_rows, over_itself, 1.05),
    Aim("all rows: over the best that gives masses", "attention", all_rows, lambda r: over(r, "ras_fast", *MASS_PEERS), 1.0),
    Aim("decode: over itself without mass", "attention", decode, lambda r: r["mass costs"], 1.02),
    Aim("decode: share of copy, batch ≥ 8", "attention", lambda r: decode(r) and r["B"] >= 8, lambda r: r["share"], 0.85,
        least=True),
    Aim("decode: over SDPA without statistics", "attention", decode, lambda r: r["over floor"], 1.0),
    Aim("decode: a range over SDPA under a mask", "attention", decode,
        lambda r: over(r, "range, no mass", "sdpa under a mask, no mass"), 1.0),
    Aim("Hopper prefill: best SDPA over it, 4k–16k", "attention",
        lambda r: all_rows(r) and r["Lq"] >= 4096 and r["D"] in (64, 128), lambda r: over(r, r["floor"], "hopper"), 0.95,
        least=True),
    Aim("engine: over undefended, graphs, 128 tokens", "engine", answer,
        lambda r: over(r, "MoRAS, engine", "undefended, graphs", unit="s"), 1.1),
    Aim("engine: MoRAS by hooks over it, 128 tokens", "engine", answer,
        lambda r: over(r, "MoRAS by hooks", "MoRAS, engine", unit="s"), 5.0, least=True),
    Aim("engine: AutoSteer, gate off, over undefended", "engine", answer,
        lambda r: over(r, "AutoSteer, engine, gate off", "undefended, graphs", unit="s"), 1.01),
    Aim("engine: AutoSteer, gate on, over undefended", "engine", answer,
        lambda r: over(r, "AutoSteer, engine, gate on", "undefended, graphs", unit="s"), 1.03),
    Aim("AutoSteer: a plain decode step, gate off, %", "autosteer", lambda r: True, lambda r: r["off, %"], 1.0),
    Aim("AutoSteer: gate on, beyond M h, %", "autosteer", lambda r: True, lambda r: r["on beyond M h, %"], 3.0),
]  # fmt: skip


def rows(path: Path) -> Iterator[Row]:
    """The rows of a result file, each with the limits of its run; none where there is no file."""
    if path.is_file():
        run = json.loads(path.read_text())
        yield from (row | {"limits": run["ceilings"]} for row in run["rows"])


def place(row: Row) -> str:
    names = ("case", "dtype", "B", "Lq", "Lk", "T", "d", "D", "rows", "graph")
    return " ".join(f"{name} {row[name]}" for name in names if name in row)


def judge(aim: Aim, folder: Path) -> tuple[str, str, str]:
    """(verdict, worst value, where)."""
    fitting = [row for row in rows(folder / f"{aim.file}.json") if aim.where(row)]
    found = [(value, row) for row in fitting if (value := aim.value(row)) is not None]
    if not found:
        return "not measured", "", ""
    value, row = (min if aim.least else max)(found, key=lambda pair: pair[0])
    met = sum(aim.meets(value) for value, _ in found)
    return ("PASS" if met == len(found) else "miss"), f"{value:.3f}", f"{met} of {len(found)} meet it; worst: {place(row)}"


def table(folder: Path) -> tuple[str, bool]:
    """(the table, whether an aim is missed)."""
    judged = [(aim, *judge(aim, folder)) for aim in AIMS]
    lines = [f"{aim.text:44} {'≥' if aim.least else '≤'} {aim.bound:<5} {value:>7}  {verdict:12} {where}"
             for aim, verdict, value, where in judged]  # fmt: skip
    return "\n".join(lines), any(verdict == "miss" for _, verdict, _, _ in judged)


def main() -> int:
    text, missed = table(harness.results_folder(__doc__))
    print(text)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
