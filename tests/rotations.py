"""What the tests of the rotary embedding share: inputs as a model has them, and Hugging Face's eager code."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def inputs(batch, heads, kv_heads, length, dim, rotated, dtype, tables=None, device="cpu"):
    """(query, key, cos, sin): heads before tokens, of memory that has tokens before heads. tables: rows of cos and sin, else
    one for each batch element."""
    query, key = (torch.randn(batch, length, n, dim, device=device).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = torch.randn(2, batch if tables is None else tables, length, rotated, device=device).to(dtype)
    return query, key, cos, sin


def eager(query, key, cos, sin):
    rotated = cos.shape[-1]
    turned = apply_rotary_pos_emb(query[..., :rotated], key[..., :rotated], cos, sin)
    return [torch.cat([t, x[..., rotated:]], -1) for t, x in zip(turned, (query, key), strict=True)]


def check(got, query, key, cos, sin):
    """The same bits, in memory [B, L, H, D]."""
    for one, wanted in zip(got, eager(query, key, cos, sin), strict=True):
        assert one.dtype == wanted.dtype
        assert one.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(one, wanted, rtol=0, atol=0, equal_nan=True)
