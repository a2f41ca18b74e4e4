"""One table of what the benchmarks with `--quick` have measured: `python bench/headline.py [DEVICE]`; `make bench` does both.

A row is a call of ours beside the fastest of its peers, timed alternately in one process. "share" is its bandwidth over a plain
copy's, where memory bounds it, or its rate over a matrix product's, both of the same run. An answer stands beside MoRAS by
hooks, and beside the fastest undefended one, whose time over its own is then the share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import aims
import harness

Row = dict[str, object]
OURS = ("ras_fast", "no mass", "range, no mass", "steer no row", "steer all", "in place", "hopper", "hopper no mass",
        "triton fused", "triton no mass", "one by one", "sandwich", "sandwich, two calls")  # fmt: skip
NO_PEERS = (*OURS, "sandwich, compile", "clone", "empty")  # the last three compute something else, or nothing


def norm(row: Row) -> Iterator[tuple[str, str]]:
    """(what is called, the candidate) of each line that a row of this benchmark is worth."""
    shape = f"{row['dtype']} [{row['T']}, {row['d']}]"
    yield f"residual + RMSNorm, {shape}", "ras_fast"
    yield "the same, every row steered", "steer all"
    yield "the same, in place", "in place"


def rotary(row: Row) -> Iterator[tuple[str, str]]:
    yield f"rotary embedding, {row['dtype']}, {row['Hq']} + {row['Hkv']} heads [{row['T']}, {row['D']}]", "ras_fast"


def linear(row: Row) -> Iterator[tuple[str, str]]:
    layer = "gated linear" if row["gated"] else "linear"
    yield f"{layer} layer, {row['dtype']} [{row['N']}, {row['K']}], rows: {row['T']}", "ras_fast"


def attention(row: Row) -> Iterator[tuple[str, str]]:
    shape = f"{row['Lk']} keys, D {row['D']}, batch {row['B']}"
    kind = "decode with masses" if row["Lq"] == 1 else f"attention, masses of {row['rows']} rows"
    yield f"{kind}, {shape}", "ras_fast"


KERNELS = {"norm": norm, "rotary": rotary, "linear": linear, "attention": attention}


def kernel_lines(folder: Path, name: str, calls: Callable[[Row], Iterator[tuple[str, str]]]) -> Iterator[Row]:
    for row in aims.rows(folder / f"{name}_quick.json"):
        peers = {key[:-3]: time for key, time in row.items() if key.endswith(" µs") and key[:-3] not in NO_PEERS}
        peer, unit = min(peers, key=peers.get), "GFLOP/s" if "GFLOP/s" in row else "GB/s"
        how = ", in a graph" if row.get("graph") else ""
        for call, candidate in calls(row):
            own = row[f"{candidate} µs"]
            scale = row["ras_fast µs"] / own
            yield {
                "call": f"{call}{how}",
                "ras_fast": _time(own),
                "strongest peer": f"{_time(peers[peer])} {peer}",
                "faster": f"{peers[peer] / own:.2f} ×",
                "achieved": f"{row[unit] * scale:.3g} {unit}",
                "share": row["share"] * scale,
            }


def answer_lines(folder: Path) -> Iterator[Row]:
    for row in aims.rows(folder / "engine_quick.json"):
        for call, what in ((f"{row['case']}, MoRAS", "seconds"), ("until its first token is shown", "first_token")):
            times = {name: figures[what] * 1e6 for name, figures in row["contenders"].items()}
            undefended = min(time for name, time in times.items() if name.startswith("undefended"))
            own, hooks = times["MoRAS, engine"], times["MoRAS by hooks"]
            yield {
                "call": call,
                "ras_fast": _time(own),
                "strongest peer": f"{_time(hooks)} by hooks",
                "faster": f"{hooks / own:.2f} ×",
                "achieved": f"{_time(undefended)} undefended",
                "share": undefended / own,
            }


def _time(micros: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if micros >= size:
            return f"{micros / size:.3g} {unit}"
    return f"{micros:.3g} µs"


def table(folder: Path) -> str:
    """Raises SystemExit where nothing has been measured."""
    lines = [line for name, calls in KERNELS.items() for line in kernel_lines(folder, name, calls)] + [*answer_lines(folder)]
    if not lines:
        raise SystemExit(f"{folder} has no figures of benchmarks with --quick: `make bench` takes them")
    return harness.table(lines)


if __name__ == "__main__":
    print(table(harness.results_folder(__doc__)))
