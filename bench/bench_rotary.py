"""The rotary embedding beside its peers: `python bench/bench_rotary.py [--quick | --shape Hq,Hkv,D,rotated,T ...]`.

Every candidate of a row gets the same tensors in the same run (Liger, which works in place, copies of its own): queries and
keys as a projection leaves them. In a vision tower ("tower") the tables are in float32, and heads are [T, H, D]. "eager" is
Hugging Face's function, "compile" the same compiled. GB/s counts the bytes that
must move, queries and keys in and out; "share" is that over a plain copy's bandwidth in the same run. On a GPU a row is timed
as eager calls or as a replayed CUDA graph.
"""

from __future__ import annotations

import baselines
import harness
import torch

from ras_fast import ops

# LLaVA-1.5's (7 B), grouped heads, a small model's; GLM-4V's, which pairs neighbours and rotates half of a head.
HEADS = ((32, 32, 128, 128), (32, 8, 128, 128), (16, 16, 64, 64), (32, 2, 128, 64))
TOKENS = (1, 8, 64, 640, 4096)
# Qwen2.5-VL's vision tower.
TOWER = [(16, 16, 80, 80, patches) for patches in (1024, 4096)]
QUICK = [(32, 8, 128, 128, 1), (32, 8, 128, 128, 640), TOWER[0]]


def case(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> tuple[dict, int, dict]:
    """Query heads, key heads, head dimension, rotated dimensions (interleaved where they are fewer) and tokens."""
    query_heads, key_heads, dim, rotated, tokens = shape
    interleaved, tower = rotated < dim, shape in TOWER
    query, key = (torch.randn(1, tokens, n, dim, device=device).to(dtype).transpose(1, 2) for n in (query_heads, key_heads))
    angles = torch.rand(1, tokens, rotated // 2, device=device)
    angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 2)
    given = query, key, *(table.to(torch.float32 if tower else dtype) for table in (angles.cos(), angles.sin()))
    ours = {
        "ras_fast": lambda: ops.rotary_embedding(*given, interleaved=interleaved),
        "clone": lambda: (query.clone(), key.clone()),
    }
    columns = {"Hq": query_heads, "Hkv": key_heads, "D": dim, "rotated": rotated, "T": tokens, "tower": tower}
    return columns, 2 * (query.numel() + key.numel()), ours | baselines.rotary_peers(*given, interleaved, tower)


if __name__ == "__main__":
    with torch.no_grad():
        shapes = [(*heads, tokens) for heads in HEADS for tokens in TOKENS] + TOWER
        harness.bound_by_memory(__doc__, "rotary", "Hq,Hkv,D,rotated,T", shapes, QUICK, case)
