"""Linear layers of a decode step beside their peers: `python bench/bench_linear.py [--quick | --shape N,K,T,gated ...]`.

Few rows against a weight that no cache holds: on the CPU calls go in turn through copies of it, on a GPU the L2 cache is
cold. "torch" is `torch.nn.functional.linear`, "packed" what torch.compile's freezing makes of it on a CPU: oneDNN's product
with a second copy of the weight in a layout of its own. GB/s counts the bytes that must move, weight, input and output;
"share" is that over a plain copy's bandwidth in the same run, which a call that writes next to nothing may exceed. A gated row
is the first half of an MLP, silu(x Gᵀ) · (x Uᵀ). Several N are several weights, as of queries, keys and values, in one launch
and "one by one". On a GPU a row is timed as eager calls or as a replayed CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import baselines
import harness
import torch
from torch import Tensor

from ras_fast import ops

# Outputs and inputs of LLaVA-1.5's layers (7 B) and its head, and of a small model's layers.
SIZES = ((4096, 4096), (11008, 4096), (4096, 11008), (32064, 4096), (1024, 1024), (2816, 1024), (1024, 2816))
TOGETHER = (((4096, 1024, 1024), 4096),)  # queries, keys and values of 32 and 8 heads
ROWS = (1, 2, 8, 16)
GATED = ((11008, 4096), (2816, 1024))
QUICK = [
    *((4096, 4096, rows, False) for rows in ROWS), *((11008, 4096, rows, False) for rows in (2, 8)),
    *((4096, 11008, rows, False) for rows in (2, 16)), (32064, 4096, 2, False),
    *((11008, 4096, rows, True) for rows in (2, 16)), *((*TOGETHER[0], rows, False) for rows in (1, 8)),
]  # fmt: skip
CACHE = 300e6  # more bytes than any cache of a processor


def through_copies(call: Callable[[Tensor], Tensor], weights: list[Tensor]) -> Callable[[], Tensor]:
    following = itertools.cycle(weights)
    return lambda: call(next(following))


def case(shape: tuple[int | tuple[int, ...], int, int, bool], dtype: torch.dtype, device: str) -> tuple[dict, int, dict]:
    """Outputs (of each weight, where there are several), inputs, rows, and whether the layer is gated."""
    outputs, inputs, rows, gated = shape
    sizes = outputs if isinstance(outputs, tuple) else (outputs,) * (2 if gated else 1)
    copies = 1 if device == "cuda" else 1 + int(CACHE / (sum(sizes) * inputs * dtype.itemsize))
    weights = [[torch.randn(size, inputs, device=device, dtype=dtype) for size in sizes] for _ in range(copies)]
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    if gated:
        candidates = {"ras_fast": (lambda both: ops.linear_glu(x, *both), weights)} | baselines.gated_peers(x, weights)
    elif len(sizes) > 1:
        candidates = {
            "ras_fast": (lambda each: ops.linears(x, each), weights),
            "one by one": (lambda each: [ops.linear(x, weight) for weight in each], weights),
            "torch": (lambda each: [torch.nn.functional.linear(x, weight) for weight in each], weights),
        }
    else:
        weights = [weight for (weight,) in weights]
        candidates = {"ras_fast": (lambda weight: ops.linear(x, weight), weights)} | baselines.linear_peers(x, weights)
    columns = {"N": " + ".join(map(str, outputs)) if isinstance(outputs, tuple) else outputs}
    columns |= {"K": inputs, "T": rows, "gated": gated}
    calls = {name: through_copies(call, given) for name, (call, given) in candidates.items()}
    written = sizes[0] if gated else sum(sizes)
    return columns, sum(sizes) * inputs + rows * (written + inputs), calls


if __name__ == "__main__":
    with torch.no_grad():
        layers = [*((size, False) for size in SIZES + TOGETHER), *((size, True) for size in GATED)]
        shapes = [(*size, rows, gated) for size, gated in layers for rows in ROWS]
        harness.bound_by_memory(__doc__, "linear", "N,K,T,gated", shapes, QUICK, case)
