"""The rotary embedding beside its peers: `python bench/bench_rotary.py [--quick]`.

Every candidate of a row gets the same tensors in the same run (Liger, which works in place, copies of its own): queries and
keys as a projection leaves them. "eager" is Hugging Face's function, "compile" the same compiled. GB/s counts the bytes that
must move, queries and keys in and out; "share" is that over a plain copy's bandwidth in the same run. On a GPU a row is timed
as eager calls or as a replayed CUDA graph.
"""

from __future__ import annotations

import argparse

import baselines
import harness
import torch

from ras_fast import ops

HEADS = ((32, 32, 128), (32, 8, 128), (16, 16, 64))  # LLaVA-1.5's (7 B), grouped heads, a small model's
TOKENS = (1, 8, 64, 640, 4096)
QUICK = [((32, 8, 128), 1), ((32, 8, 128), 640)]


def candidates(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype, device: str) -> dict:
    query_heads, key_heads, dim = heads
    query, key = (torch.randn(1, tokens, n, dim, device=device).to(dtype).transpose(1, 2) for n in (query_heads, key_heads))
    angles = torch.rand(1, tokens, dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = {"ras_fast": lambda: ops.rotary_embedding(query, key, cos, sin), "clone": lambda: (query.clone(), key.clone())}
    return ours | baselines.rotary_peers(query, key, cos, sin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the two shapes of the headline figures, bf16")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on a shape")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    shapes = QUICK if args.quick else [(heads, tokens) for heads in HEADS for tokens in TOKENS]
    limits = harness.ceilings()
    rows = []
    for dtype in (torch.bfloat16,) if args.quick else (torch.bfloat16, torch.float32):
        for heads, tokens in shapes:
            calls = candidates(heads, tokens, dtype, "cuda" if gpu else "cpu")
            for graph in (False, True) if gpu else (False,):
                times = harness.compare(calls, seconds=args.seconds, graph=graph)
                query_heads, key_heads, dim = heads
                row = {"dtype": str(dtype)[6:], "Hq": query_heads, "Hkv": key_heads, "D": dim, "T": tokens}
                row |= {"graph": graph} if gpu else {}
                row |= {f"{name} µs": seconds * 1e6 for name, seconds in times.items()}
                row["GB/s"] = 2 * tokens * (query_heads + key_heads) * dim * dtype.itemsize / times["ras_fast"] / 1e9
                row["share"] = row["GB/s"] / limits["copy GB/s"]
                rows.append(row)
            path = harness.save("rotary_quick" if args.quick else "rotary", rows, limits)  # now: the run may be cut short
    print(harness.table(rows))
    print(f"\ncopy bandwidth {limits['copy GB/s']:.1f} GB/s; written to {path}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
