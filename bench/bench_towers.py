"""Attention of vision towers on a CPU, as transformers calls it, beside SDPA: `python bench/bench_towers.py`.

All patches see each other: 4·H·N²·D operations, beside the rate of a square matrix product of the same run.
"""

from __future__ import annotations

import argparse

import harness
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ras_fast.patching import towers

# Heads, patches, head dimension.
SHAPES = {
    "CLIP-L, 336 pixels": (16, 577, 64),
    "SigLIP-so400m, 384 pixels": (16, 729, 72),
    "Qwen2.5-VL, a window": (16, 64, 80),
    "Qwen2.5-VL, 768 × 768 pixels": (16, 2916, 80),
    "Qwen3-VL 2B, 768 × 768 pixels": (16, 2304, 64),
}


def candidates(heads: int, patches: int, dim: int, dtype: torch.dtype) -> dict:
    tensors = [torch.randn(1, patches, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    module = nn.Module()
    return {
        "ras_fast": lambda: towers.attention(module, *tensors, None, is_causal=False),
        "SDPA": lambda: sdpa_attention_forward(module, *tensors, None, is_causal=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on a shape")
    args = parser.parse_args()
    limits, rows = harness.ceilings(), []
    for dtype in (torch.bfloat16, torch.float16):
        for name, (heads, patches, dim) in SHAPES.items():
            times = harness.compare(candidates(heads, patches, dim, dtype), seconds=args.seconds)
            row = {"dtype": str(dtype)[6:], "tower": name, "H": heads, "N": patches, "D": dim}
            row |= {f"{contender} ms": seconds * 1e3 for contender, seconds in times.items()}
            rate = 4 * heads * patches**2 * dim / 1e9 / times["ras_fast"]
            rows.append(row | {"GFLOP/s": rate, "share": rate / limits["matmul GFLOP/s"]})
        path = harness.save("towers", rows, limits)  # now: the run may be cut short
    print(harness.table(rows))
    print(f"\nmatrix product {limits['matmul GFLOP/s']:.0f} GFLOP/s; written to {path}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
