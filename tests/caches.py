"""Caches and new tokens for tests of write_cache_, and what the op is to make of them."""

import torch
from torch.testing import assert_close


def inputs(batch, heads, capacity, tokens, dim, dtype, value_dim=None, device="cpu"):
    """(keys, values, slots, key, value): the slots of a sequence differ; tokens lie as projections leave them, [B, T, H, D]."""
    dims = dim, dim if value_dim is None else value_dim
    caches = [torch.randn(batch, heads, capacity, d, device=device).to(dtype) for d in dims]
    fresh = [torch.randn(batch, tokens, heads, d, device=device).to(dtype).transpose(1, 2) for d in dims]
    order = [torch.randperm(capacity, device=device)[:tokens] for _ in range(batch)]
    slots = torch.stack(order) if batch else torch.empty(0, tokens, dtype=torch.int64, device=device)
    return *caches, slots, *fresh


def check(write, keys, values, slots, key, value):
    """write: takes these five; what it writes is what indexing writes, and nothing else."""
    expected = []
    for cache, new in ((keys, key), (values, value)):
        wanted = cache.clone()
        for b, places in enumerate(slots.tolist()):
            for t, place in enumerate(places):
                wanted[b, :, place] = new[b, :, t]
        expected.append(wanted)
    write(keys, values, slots, key, value)
    assert_close([keys, values], expected, rtol=0, atol=0, equal_nan=True)
