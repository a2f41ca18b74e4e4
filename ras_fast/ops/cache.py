"""Writing new tokens into a cache of keys and values (docs/kernels.md, "Cache writes").

Shapes: B batch, H key/value heads, C capacity of the cache, T new tokens, D and Dv head dimensions of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ras_fast.backend import forced_backend
from ras_fast.ops import _check
from ras_fast.ops._registry import call, define


def write_cache_(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Puts the keys and values of new tokens into their slots of a cache, in place, in one launch.

    keys[b, h, slots[b, t]] = key[b, h, t], and likewise values. Where two tokens of a sequence have the same slot, either is
    kept. On a GPU what has a slot outside of the cache is dropped, as nothing can be said about it without waiting.

    Args:
        keys: [B, H, C, D], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        values: [B, H, C, Dv], like `keys`.
        slots: [B, T] int64, each in 0 .. C − 1.
        key, value: [B, H, T, D] and [B, H, T, Dv], like `keys`.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride; the message names it.
        RuntimeError: an input requires grad and grad mode is on; on a CPU also a slot outside of the cache.
    """
    _check.no_grad("write_cache_", keys, values, key, value)
    if forced_backend() == "triton":  # which has no kernel for it
        _validate(keys, values, slots, key, value)
        _reference(keys, values, slots, key, value)
    else:
        call("write_cache_", _validate, keys, values, slots, key, value)
    if not torch.compiler.is_compiling():  # native kernels do not mark what they write
        torch.autograd.graph.increment_version((keys, values))


def _validate(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    _check.tensors(keys=keys, values=values, slots=slots, key=key, value=value)
    _check.floating("keys", keys)
    for name, tensor, symbols in (("keys", keys, "[B, H, C, D]"), ("values", values, "[B, H, C, Dv]")):
        if tensor.dim() != 4:
            _check.fail(name, f"of shape {tuple(tensor.shape)}", symbols)
    batch, heads, capacity, dim = keys.shape
    _check.shape("values", values, (batch, heads, capacity, values.shape[3]), "[B, H, C, Dv]")
    if slots.dim() != 2 or slots.dtype != torch.int64:
        _check.fail("slots", f"{slots.dtype} of shape {tuple(slots.shape)}", "int64 [B, T]")
    _check.shape("slots", slots, (batch, slots.shape[1]), "[B, T]")
    _check.device("slots", slots, keys.device)
    _check.shape("key", key, (batch, heads, slots.shape[1], dim), "[B, H, T, D]")
    _check.shape("value", value, (batch, heads, slots.shape[1], values.shape[3]), "[B, H, T, Dv]")
    for name, tensor in (("keys", keys), ("values", values), ("key", key), ("value", value)):
        _check.stored(name, tensor, keys.dtype, keys.device)


def _reference(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    # Before anything is written; and indexing would take a negative one from the end.
    if slots.is_cpu and not torch.compiler.is_compiling():
        outside = slots[(slots < 0) | (slots >= keys.shape[2])]
        if len(outside):
            raise RuntimeError(f"ras_fast cache: slots holds {outside[0]}; the cache has {keys.shape[2]} slots")
    for cache, new in ((keys, key), (values, value)):
        for row, places, states in zip(cache, slots, new, strict=True):  # a CPU scatters element by element, but copies rows
            row.index_copy_(1, places, states)


def _fake(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    _check.one_device("write_cache_", keys, values, slots, key, value)


define(
    "write_cache_(Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor key, Tensor value) -> ()",
    fake=_fake,
    reference=_reference,
)
