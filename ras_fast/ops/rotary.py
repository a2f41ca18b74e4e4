"""Rotary position embedding of queries and keys (docs/kernels.md, "Rotary embedding").

Shapes: B batch, Hq and Hkv query and key heads, L tokens, D head dimension, r rotated dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ras_fast.ops import _check
from ras_fast.ops._registry import call, define, triton_kernel


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated by their positions: x · cos + rotate_half(x) · sin (RoPE, arXiv 2104.09864).

    Of each head the first r dimensions are rotated, the others copied. Products are rounded to the dtype of the tables and sums
    to that of `query`, where Hugging Face's eager code rounds: the results are that code's, bit for bit. Text models have
    tables like `query`; vision towers (Qwen2-VL, arXiv 2409.12191) have float32 ones, and so round once. float64 is taken as
    well, by the reference alone.

    Args:
        query: [B, Hq, L, D], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        key: [B, Hkv, L, D], like `query`.
        cos, sin: [B or 1, L, r] with r even and 0 < r ≤ D, both of the dtype of `query` or float32, contiguous last dimension.
        interleaved: dimension 2i is paired with 2i + 1, as in the paper and in GLM; else i with i + r/2, as in Llama.

    Returns:
        query and key, rotated. In memory they are [B, L, H, D], as projections leave them.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride; the message names it.
        RuntimeError: an input requires grad.
    """
    _check.no_grad("rotary_embedding", query, key, cos, sin)
    return call("rotary_embedding", _validate, query, key, cos, sin, interleaved)


def _validate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    _check.tensors(query=query, key=key, cos=cos, sin=sin)
    if not isinstance(interleaved, bool):
        _check.fail("interleaved", repr(interleaved), "True or False")
    _check.floating("query", query)
    if query.dim() != 4 or query.shape[-1] == 0:
        _check.fail("query", f"of shape {tuple(query.shape)}", "[B, Hq, L, D] with D > 0")
    batch, _, length, dim = query.shape
    if key.dim() != 4:
        _check.fail("key", f"of shape {tuple(key.shape)}", "[B, Hkv, L, D]")
    _check.shape("key", key, (batch, key.shape[1], length, dim), "[B, Hkv, L, D]")
    rotated = cos.shape[-1] if cos.dim() else 0
    if not 0 < rotated <= dim or rotated % 2:
        _check.fail("cos", f"of shape {tuple(cos.shape)}", f"[B or 1, L, r] with r even, 0 < r <= D = {dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        rows = 1 if table.dim() == 3 and table.shape[0] == 1 else batch
        _check.shape(name, table, (rows, length, rotated), "[B or 1, L, r]")
    if cos.dtype not in (query.dtype, torch.float32) or query.dtype == torch.float64 != cos.dtype:
        _check.fail("cos", f"of dtype {cos.dtype}", f"{query.dtype}, that of query, or float32")
    _check.dtype("key", key, query.dtype)
    _check.dtype("sin", sin, cos.dtype)
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        _check.last_dim_contiguous(name, tensor)
        _check.device(name, tensor, query.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    head, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1 if interleaved else -2).flatten(-2)
    rotated = (head * cos + turned * sin).to(x.dtype)
    return torch.cat([rotated, rest], -1).transpose(1, 2).contiguous().transpose(1, 2)


def _reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    _check.one_device("rotary_embedding", query, key, cos, sin)

    def like(x: Tensor) -> Tensor:
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)

    return like(query), like(key)


define(
    "rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved=False) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
    triton=triton_kernel("rotary", "rotary_embedding"),
)
