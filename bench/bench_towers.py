"""Attention of vision towers, as transformers calls it, beside SDPA: `python bench/bench_towers.py`.

Patches of one image or window see each other: 4·H·Σ n²·D operations, beside the rate of a square matrix product of the same
run. SDPA is called once for each, after the device was asked for the sizes, as transformers does it; where patches are padded
to one number, once for all, under a mask. On a GPU ours are SDPA's kernels, too: of interest is the tower of many windows.
"""

from __future__ import annotations

import harness
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ras_fast.patching import towers

# Heads, head dimension, patches of each image or window.
SHAPES = {
    "CLIP-L, 336 pixels": (16, 64, [577]),
    "SigLIP-so400m, 384 pixels": (16, 72, [729]),
    "Qwen2.5-VL, 756 × 756 pixels": (16, 80, [2916]),
    "its windows": (16, 80, 6 * [*6 * [64], 48] + [*6 * [48], 36]),
    "Qwen3-VL 2B, 768 × 768 pixels": (16, 64, [2304]),
}


# The same, of images that are padded to so many patches.
PADDED = {
    "Gemma 4 E2B, 720 × 816 pixels": (12, 64, [2295], 2520),
    "LFM2-VL 450M, three tiles of 480 × 480 pixels": (12, 64, [900] * 3, 1024),
}


def padded(heads: int, dim: int, sizes: list[int], length: int, dtype: torch.dtype, device: str) -> dict:
    tensors = [torch.randn(len(sizes), length, heads, dim, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
    valid = torch.arange(length, device=device) < torch.tensor(sizes, device=device)[:, None]
    mask = valid[:, None, None].expand(-1, 1, length, -1).contiguous()
    calls = {"ras_fast": towers.attention, "SDPA": sdpa_attention_forward}
    return {name: lambda call=call: call(nn.Module(), *tensors, mask, is_causal=False) for name, call in calls.items()}


def candidates(heads: int, dim: int, sizes: list[int], dtype: torch.dtype, device: str) -> dict:
    tensors = [torch.randn(sum(sizes), heads, dim, device=device).to(dtype).transpose(0, 1)[None] for _ in range(3)]
    module, boundaries = nn.Module(), torch.tensor([0, *sizes], device=device).cumsum(0)

    def one_by_one():
        parts = zip(*(tensor.split(boundaries.diff().tolist(), dim=2) for tensor in tensors), strict=True)
        return torch.cat([sdpa_attention_forward(module, *part, None, is_causal=False)[0] for part in parts], dim=1)

    def packed():
        return towers.packed_attention(module, *tensors, None, is_causal=False, cu_seq_lens_q=boundaries)

    if len(sizes) > 1:
        return {"ras_fast": packed, "SDPA": one_by_one}
    calls = {"ras_fast": towers.attention, "SDPA": sdpa_attention_forward}
    return {name: lambda call=call: call(module, *tensors, None, is_causal=False) for name, call in calls.items()}


def cases(device: str):
    for dtype in (torch.bfloat16, torch.float16):
        for name, (heads, dim, sizes, *length) in (SHAPES | PADDED).items():
            calls = (padded if length else candidates)(heads, dim, sizes, *length, dtype, device)
            columns = {"dtype": str(dtype)[6:], "tower": name, "H": heads, "D": dim, "N": sum(sizes), "images": len(sizes)}
            yield columns, 4 * heads * sum(n * n for n in sizes) * dim / 1e9, calls


def main() -> None:
    harness.bound_by_products(__doc__, "towers", "ras_fast", cases)


if __name__ == "__main__":
    with torch.no_grad():
        main()
