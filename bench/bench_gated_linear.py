"""A gated refusal head beside its peers: `python bench/bench_gated_linear.py [--quick]`.

Eight rows, as in a decode step, of which none, one or all are on. "dense" multiplies every row and the product by the gate: no
host sync, but M is read for nothing. "gathered" selects the rows that are on: it has to ask the device which. "floor" is the
time that M's bytes take at a plain copy's bandwidth (read and written) in the same run; what fits a cache may beat it.
"""

from __future__ import annotations

import argparse

import harness
import torch
from torch.nn.functional import linear

from ras_fast import ops

ROWS = 8
WIDTHS = (1024, 2048, 4096, 5120)
QUICK = (4096,)
RANK = 64


def dense(x, m, gate):
    return x + gate.to(x.dtype)[:, None] * linear(x, m)


def gathered(x, m, gate):
    on = gate.nonzero().flatten()
    moved = gate[on].to(x.dtype)[:, None] * linear(x[on], m)
    return x.index_add(0, on, moved)


def candidates(width: int, on: int, dtype: torch.dtype, device: str) -> dict:
    x, m = (torch.randn(rows, width, device=device).to(dtype) for rows in (ROWS, width))
    left, right = torch.randn(width, RANK, device=device).to(dtype), torch.randn(RANK, width, device=device).to(dtype)
    gate = torch.zeros(ROWS, device=device)
    gate[:on] = 0.1
    return {
        "ras_fast": lambda: ops.gated_linear(x, m, gate),
        f"rank {RANK}": lambda: ops.gated_linear(x, left, gate, right=right),
        "gathered": lambda: gathered(x, m, gate),
        "dense": lambda: dense(x, m, gate),
        "clone": x.clone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the width of the headline figures, bf16")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on a shape")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    copied = harness.copy_bandwidth()
    rows = []
    for dtype in (torch.bfloat16,) if args.quick else (torch.bfloat16, torch.float32):
        for width in QUICK if args.quick else WIDTHS:
            for on in (0, 1, ROWS):
                calls = candidates(width, on, dtype, "cuda" if gpu else "cpu")
                times = harness.compare(calls, seconds=args.seconds)
                row = {"dtype": str(dtype)[6:], "d": width, "rows on": f"{on} of {ROWS}"}
                row |= {f"{name} µs": seconds * 1e6 for name, seconds in times.items()}
                floor = width * width * dtype.itemsize * (on > 0) / copied
                row |= {"floor µs": floor * 1e6}
                rows.append(row)
            path = harness.save("gated_linear_quick" if args.quick else "gated_linear", rows)  # now: the run may be cut short
    print(harness.table(rows))
    print(f"\ncopy bandwidth {copied / 1e9:.1f} GB/s; written to {path}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
