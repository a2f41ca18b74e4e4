"""Attention of prompts in which the tokens of an image see each other, with region mass: `python bench/bench_image_masks.py`.

Each query sees one run of keys: an image's tokens up to the end of their image, text up to itself, or all that of a prefix.
ras_fast is given these bounds; the peers take them as a mask [N, N], which transformers hands to SDPA. "indicator values" is
SDPA under that mask with a column of values for each image; what gives no masses is the floor. PaliGemma 2 caps its scores,
which SDPA cannot do. Operations count the keys that a query sees.
"""

from __future__ import annotations

import baselines
import harness
import torch
from torch import Tensor

from ras_fast import ops

# Heads, key-value heads, head dimension, softcap, tokens of each image, text tokens before each and after the last; whether
# all see each other.
SHAPES = {
    "Gemma 3 4B, an image": (8, 4, 256, None, [256], 10, 40, False),
    "four images": (8, 4, 256, None, [256] * 4, 10, 40, False),
    "sixteen images": (8, 4, 256, None, [256] * 16, 10, 40, False),
    "PaliGemma 2 3B, 448 pixels": (8, 4, 256, 50.0, [1024], 0, 48, True),
}
SELECTED_ROWS = 64


def make(shape: tuple, dtype: torch.dtype, device: str):
    """q, k, v as transformers hands them over, the images' ids and spans, and each query's first key behind those it sees."""
    heads, kv_heads, dim, _, images, before, after, prefix = shape
    length = sum(images) + before * len(images) + after
    states = (torch.randn(1, length, count, dim, device=device).to(dtype) for count in (heads, kv_heads, kv_heads))
    query, key, value = (tensor.transpose(1, 2) for tensor in states)
    end = torch.full((length,), length, device=device) if prefix else torch.arange(1, length + 1, device=device)
    ids, spans, at = torch.full((1, length), -1, dtype=torch.int32, device=device), [], 0
    for region, tokens in enumerate(images):
        spans.append((at + before, at + before + tokens))
        at = spans[-1][1]
        ids[:, slice(*spans[-1])] = region
        end[slice(*spans[-1])] = length if prefix else at
    return query, key, value, ids, spans, end.int()[None]


def candidates(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, spans: list, end: Tensor, softcap: float | None) -> dict:
    """{name: (call, rows whose masses it gives)}."""
    length, keywords = query.shape[2], {"is_causal": False, "kv_end": end, "softcap": softcap}

    def ours(rows: int):
        return ops.region_attention(query, key, value, ids if rows else None, rows and len(spans), mass_rows=rows, **keywords)

    mask = torch.arange(length, device=end.device) < end[0, :, None]
    calls = {"no mass": (lambda: ours(0), 0)}
    if softcap is None:
        calls["SDPA"] = (baselines.attention_masked(query, key, value, mask), 0)
    for rows in (SELECTED_ROWS, length):
        calls[f"ras_fast, {'all' if rows == length else rows} rows"] = (lambda rows=rows: ours(rows), rows)
    eager = baselines.attention_eager(query, key, value, spans, length, mask, softcap)
    indicators = None if softcap else baselines.attention_indicators(query, key, value, spans, length, mask)
    peers = {"eager weights": eager, "indicator values": indicators}
    return calls | {name: (call, length) for name, call in peers.items() if call is not None}


def check(calls: dict) -> dict:
    """The calls that run here. One that gives other results than ours is no peer: an error."""
    found, all_rows = {}, calls["ras_fast, all rows"][0]()
    for name, (call, rows) in calls.items():
        try:
            result = call()
        except RuntimeError as error:  # a peer's own
            harness.left_out(name, error)
            continue
        out, mass = (result[0], result[-1]) if isinstance(result, tuple) else (result, None)
        same = (out - all_rows[0]).abs().max() < 5e-2
        if rows:
            same &= (mass.float() - all_rows[2][:, :, -rows:]).abs().max() < 2e-2
        if not same:
            raise AssertionError(f"{name} gives other results than ras_fast")
        found[name] = call
    return found


def cases(device: str):
    for name, shape in SHAPES.items():
        query, key, value, ids, spans, end = make(shape, torch.bfloat16, device)
        gflop = 4 * query.shape[1] * query.shape[3] * int(end.sum()) / 1e9
        calls = check(candidates(query, key, value, ids, spans, end, shape[3]))
        yield {"prompt": name, "N": query.shape[2]}, gflop, calls


def main() -> None:
    harness.bound_by_products(__doc__, "image_masks", "ras_fast, all rows", cases, graph=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
