"""What the tests of the rotary embedding share: inputs as a model has them, and eager code as Hugging Face writes it."""

import torch
from transformers.models.llama.modeling_llama import rotate_half


def inputs(batch, heads, kv_heads, length, dim, rotated, dtype, tables=None, device="cpu", table_dtype=None):
    """(query, key, cos, sin): heads before tokens, of memory that has tokens before heads. tables: rows of cos and sin, else
    one for each batch element; table_dtype: theirs, else that of the heads."""
    query, key = (torch.randn(batch, length, n, dim, device=device).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = torch.randn(2, batch if tables is None else tables, length, rotated, device=device).to(table_dtype or dtype)
    return query, key, cos, sin


def rotate_neighbours(x):
    """rotate_half of GLM and Cohere, whose pairs are neighbours."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def eager(x, cos, sin, interleaved):
    turned = rotate_neighbours if interleaved else rotate_half
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([(rotated * cos[:, None] + turned(rotated) * sin[:, None]).to(x.dtype), rest], -1)


def check(got, query, key, cos, sin, interleaved=False):
    """The same bits, in memory [B, L, H, D]."""
    for one, x in zip(got, (query, key), strict=True):
        assert one.dtype == x.dtype
        assert one.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(one, eager(x, cos, sin, interleaved), rtol=0, atol=0, equal_nan=True)
