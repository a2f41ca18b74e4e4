"""Attention with region mass beside its peers: `python bench/bench_attention.py [--quick | --full | --shape ...]`.

One image of 576 tokens (or half the keys, if that is less) is the region. Every candidate of a shape gets the same tensors in
the same run, in turn. The floor is the fastest SDPA backend without statistics; "over floor" is ras_fast's time over it, and
"mass costs" its time over its own without mass. A decode step over a range of keys, as in a captured step, stands beside SDPA
under a mask that says the same. Prefill counts 2·B·H·N²·D operations (causal), decode the bytes of keys and
values; on a GPU everything is timed as a CUDA graph. "extra MB" is what a call allocates at its peak, its output included.
"""

from __future__ import annotations

import argparse

import baselines
import harness
import torch

from ras_fast import ops
from ras_fast.ops import attention_plan

HEADS = 32, 8  # of queries, and of keys and values
DIMS = (64, 80, 128, 256)
# (batch, query rows, keys, head dimension, rows whose mass is wanted)
QUICK = [(1, 1024, 1024, 128, 64), (1, 1, 2048, 128, 1)]
PREFILL = [(1, n, n, d, rows) for n in (640, 1024, 4096, 16384) for d in DIMS for rows in (1, 64, n)]
DECODE = [(batch, 1, keys, d, 1) for batch in (1, 8, 64) for keys in (1024, 4096, 32768) for d in DIMS]
FULL = sorted(PREFILL + DECODE, key=lambda shape: shape[3] != 128)  # should time run out, the others are what is missing
DEFAULT = [shape for shape in FULL if shape[3] == 128]
CPU = [(1, n, n, d, rows) for n in (640, 1024, 2048) for d in (64, 128) for rows in (64, n)]
CPU += [(batch, 1, keys, 128, 1) for batch in (1, 8) for keys in (1024, 2048, 4096, 32768 // batch)]


def make(heads: tuple[int, int], batch: int, length_q: int, length_k: int, dim: int, dtype: torch.dtype, device: str):
    """q, k, v as transformers hands them over, the region map of one image, and its span."""
    query = torch.randn(batch, length_q, heads[0], dim, device=device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, heads[1], length_k, dim, device=device).to(dtype) for _ in range(2))
    start, size = min(35, length_k // 8), min(576, length_k // 2)
    ids = torch.full((batch, length_k), -1, dtype=torch.int32, device=device)
    ids[:, start : start + size] = 0
    return query, key, value, ids, [(start, start + size)]


def candidates(query, key, value, ids, spans, rows: int) -> dict:
    calls = {
        "ras_fast": lambda: ops.region_attention(query, key, value, ids, 1, mass_rows=rows),
        "no mass": lambda: ops.region_attention(query, key, value),
    }
    if query.shape[2] == 1:
        start = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
        end = torch.full_like(start, key.shape[2])
        calls["range, no mass"] = lambda: ops.region_attention(query, key, value, kv_start=start, kv_end=end)
        calls["sdpa under a mask, no mass"] = baselines.attention_masked(query, key, value)
    if query.is_cuda:
        masks = (query.shape[-1] ** -0.5, True, None, None, 0, 0.0, None, None)
        fused = torch.ops.ras_fast.region_attention_triton
        calls["triton fused"] = lambda: fused(query, key, value, ids, 1, *masks, rows)
        calls["triton no mass"] = lambda: fused(query, key, value, None, 0, *masks, 0)
        if query.shape[2] > 1 and not attention_plan.hopper_refuses(query, key, value, attention_plan.Case()):
            hopper = torch.ops.ras_fast.hopper_prefill
            calls["hopper"] = lambda: hopper(query, key, value, ids, 1, *masks, rows)
            calls["hopper no mass"] = lambda: hopper(query, key, value, None, 0, *masks, 0)
    return calls | baselines.attention_peers(query, key, value, spans, rows)


def usable(calls: dict) -> dict:
    """The candidates that run here. A peer that computes something else than we do is no peer: an error."""
    (out, _, mass), found = calls["ras_fast"](), {}
    for name, call in calls.items():
        try:
            result = call()
        except Exception as error:  # a peer's own, of whatever type: said, and left out
            if name in ("ras_fast", "no mass"):
                raise
            harness.left_out(name, error)
            continue
        if "no mass" not in name and not (_agree(result[-1], mass, 2e-2) and _agree(result[0], out, 5e-2)):
            raise AssertionError(f"{name} gives other results than ras_fast")
        found[name] = call
    return found


def _agree(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((got.float() - expected.float()).abs().max() <= tolerance)  # a NaN does not agree


def measure(
    shape: tuple[int, ...], heads: tuple[int, int], seconds: float, graph: bool, limits: dict[str, float], without: list[str]
) -> dict[str, object]:
    batch, length_q, length_k, dim, rows = shape
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    query, key, value, ids, spans = make(heads, batch, length_q, length_k, dim, dtype, device)
    every = candidates(query, key, value, ids, spans, rows)
    calls = usable({name: call for name, call in every.items() if name not in without})
    floor = baselines.attention_floor(query, key, value)
    times = harness.compare(calls | floor, seconds=seconds, graph=graph, ours=("ras_fast", "no mass"))
    best = min(floor.keys() & times, key=times.get)
    row = {"B": batch, "Lq": length_q, "Lk": length_k, "D": dim, "rows": rows, "graph": graph}
    seen = length_k / 2 if length_q > 1 else length_k  # causal
    row["GFLOP"] = 4 * batch * heads[0] * length_q * seen * dim / 1e9
    row["MB"] = (2 * query.numel() + key.numel() + value.numel()) * dtype.itemsize / 1e6
    if length_q > 1:
        row["GFLOP/s"] = row["GFLOP"] / times["ras_fast"]
        row["share"] = row["GFLOP/s"] / limits["matmul GFLOP/s"]
    else:
        row["GB/s"] = row["MB"] / times["ras_fast"] / 1e3
        row["share"] = row["GB/s"] / limits["copy GB/s"]
    row |= {"floor": best, "over floor": times["ras_fast"] / times[best], "mass costs": times["ras_fast"] / times["no mass"]}
    row["extra MB"] = harness.extra_megabytes(calls["ras_fast"])
    if "eager weights" in calls:
        row["eager extra MB"] = harness.extra_megabytes(calls["eager weights"])
    return row | {f"{name} µs": seconds * 1e6 for name, seconds in times.items()}


def show(row: dict[str, object]) -> None:
    print(" · ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row.items() if value is not None), flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the two shapes of the headline figures")
    parser.add_argument("--full", action="store_true", help="every head dimension, not only 128")
    dims = "B,Lq,Lk,D,rows"
    parser.add_argument("--shape", type=harness.numbers(dims), nargs="+", metavar=dims, help="of your own; nothing is written")
    parser.add_argument("--heads", type=harness.numbers("Hq,Hkv"), default=HEADS, metavar="Hq,Hkv", help="with --shape: 32,8")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="candidates to leave out")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on a shape")
    args = parser.parse_args()
    if args.heads != HEADS and not args.shape:
        parser.error("--heads needs --shape: results are of one number of heads")
    if any(length_q not in (1, length_k) for _, length_q, length_k, _, _ in args.shape or ()):
        parser.error("Lq of a --shape needs to be 1 or Lk: peers agree on no other place for fewer rows among the keys")
    gpu = torch.cuda.is_available()
    shapes = args.shape or (QUICK if args.quick else FULL if args.full else DEFAULT if gpu else dict.fromkeys(CPU))
    limits = harness.ceilings()
    rows, failed, path = [], 0, None
    for shape in shapes:
        torch._dynamo.reset()
        try:
            rows.append(measure(shape, args.heads, args.seconds, gpu, limits, args.without))
        except (RuntimeError, AssertionError) as error:  # the other shapes are still worth having
            failed += 1
            print(f"{shape} FAILED: {error}", flush=True)
        else:
            show(rows[-1])
            if not args.shape:
                path = harness.save("attention_quick" if args.quick else "attention", rows, limits)
        if gpu:
            torch.cuda.empty_cache()
    print("\n" + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    if path:
        print(f"written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
