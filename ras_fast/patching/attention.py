"""The attention function and the mask functions that transformers calls under the names of ras_fast/registration.py.

A causal mask, with or without a window, whose valid keys are one contiguous range per sequence is passed as that range: an
int32 tensor [B, 1, 1, 2] instead of [B, 1, Lq, Lk] booleans. A mask in which every query has a range of its own (tokens of an
image that see each other, a prefix that does, packed sequences, chunks, right padding) is passed as [B, 1, Lq, 3]: the range,
and the query's own place among the keys. Being 4-D, these pass through transformers like any prepared mask. All other masks
(holes, images that see each other across the text between them) stay full masks, and so do all but causal ones where their
values may not be looked at: traced, or captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from ras_fast import ops
from ras_fast.backend import device_type
from ras_fast.ops import attention_reference as reference
from ras_fast.ops.attention_plan import beats_flash_on_cpu, decodes_on_cpu, decodes_on_cuda

if TYPE_CHECKING:
    from ras_fast.patching.state import AttentionState, Request

STATE = "_ras_fast_attention"  # attribute of an attention module of a patched model
_WINDOW = "_ras_fast_window"  # attribute of a range mask that was made for one forward: the window it was made with, in a tuple
_FULL = "_ras_fast_full"  # attribute of such a mask: what `_expand_once` was asked for last, and has made of it
_OWN = "_ras_fast_own"  # attribute of a caller's range mask in which each query has a range of its own
# Keyword arguments that are obeyed, or that change nothing: the model has made use of them already, or they are a module's.
_KNOWN = frozenset((
    "sliding_window", "softcap", "s_aux", "indices", "output_attentions", "input_ids", "position_ids", "cache_position",
    "use_cache", "return_dict", "output_hidden_states", "cross_attention_states", "cross_attention_mask",
    "full_text_row_masked_out_mask",
))  # fmt: skip
_UNSUPPORTED = frozenset((
    "position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "cache", "head_mask", "block_indices", "sinks",
))  # fmt: skip
_CHUNK = 1 << 25  # probabilities held at a time where a full mask forbids the kernels


def range_mask(kv_start: Tensor, kv_end: Tensor) -> Tensor:
    """A range mask: the valid keys [kv_start, kv_end) as an int32 tensor instead of booleans.

    Args:
        kv_start, kv_end: [B], any integer dtype: each sequence's valid keys, under a causal mask. Or both [B, Lq]: the keys
            that each query sees, without a further mask.

    Returns:
        int32 [B, 1, 1, 2], or [B, 1, Lq, 2].

    May be given to a model as its 4-D `attention_mask`, for instance as a persistent tensor in a captured CUDA graph.
    """
    # Laid out so that the kernels get [B] or [B, Lq] slices without a copy.
    mask = _columns(kv_start, kv_end)
    if kv_start.dim() == 2 and not torch.compiler.is_compiling():
        setattr(mask, _OWN, True)
    return mask


def _columns(*columns: Tensor) -> Tensor:
    """[B] or [B, Lq] each, as int32 [B, 1, 1 or Lq, columns]."""
    together = torch.stack(columns).to(torch.int32)
    return together.view(len(columns), together.shape[1], 1, -1).permute(1, 2, 3, 0)


def fresh(mask: Tensor, window: int | None = None) -> Tensor:
    """Marks a range mask as made for a single forward, under this window, and not written to afterwards; returns it."""
    if not torch.compiler.is_compiling():
        setattr(mask, _WINDOW, (window,))
    return mask


def is_range(mask: Any) -> bool:
    """Whether it is a range mask, int32 [B, 1, 1 or Lq, 2] or [B, 1, Lq, 3], and neither None nor a full mask, which is bool or
    floating, nor padding [B, Lk]."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[3] in (2, 3)


def _is_own(mask: Tensor) -> bool:
    """Whether each query of a range mask has a range of its own, which hides all that it is not to see."""
    return mask.shape[2] > 1 or mask.shape[3] == 3 or hasattr(mask, _OWN)


def has_own_ranges(mask: Tensor) -> bool:
    """Whether it is a caller's range mask in which each query has a range of its own, and nobody says where the query is."""
    return _is_own(mask) and mask.shape[3] == 2


def sees_itself(mask: Tensor) -> Tensor:
    """[B] bool: the sequences of a range mask whose last query sees itself. No host sync.

    A range of which nobody says where its query is ends with that, or is empty.
    """
    start, end, *places = mask[:, 0, -1].unbind(-1)
    own = places[0] if places else end - 1
    return (start <= own) & (own < end)


# The mask function.


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    explicit: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """None, a range mask, or what transformers would give to SDPA.

    None leaves it to the attention module whether it is causal, as with SDPA; those of prefix language models such as
    PaliGemma say that they are not. So a causal mask is None only where it hides nothing, or where SDPA's is None as well.

    `attention_mask` is the 2-D padding mask [B, seen] in bool, or None; the rest as transformers' own mask functions.
    `explicit`: None hides nothing, whatever the module says, as with eager attention.
    """
    def full_mask() -> Tensor | None:
        # Causal masks must be spelled out here: SDPA's shortcut for them means something else with a static cache.
        options = kwargs | {"allow_is_causal_skip": False, "local_size": local_size}
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, device=device, **options,
        )  # fmt: skip

    if mask_function is bidirectional_mask_function or _reads_masks(kwargs.get("config")):
        return full_mask()
    if not _is_causal(mask_function):
        return as_ranges(full_mask(), q_offset - kv_offset)
    end = q_offset + q_length - kv_offset
    everything = isinstance(end, int) and end == kv_length
    skips = everything and _none_will_do(q_length, kv_length, local_size, explicit)
    if attention_mask is None:
        if skips:
            return None
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    else:
        if not may_look(attention_mask):
            return full_mask()
        start, is_range_, is_padded = _left_padding(attention_mask, end, kv_offset)
        if not is_range_:
            return as_ranges(full_mask(), q_offset - kv_offset)
        if skips and not is_padded:
            return None
    end = end.expand(batch_size) if isinstance(end, Tensor) else start.new_full((batch_size,), end)
    return fresh(range_mask(start, end.to(start.device)), local_size)


explicit_mask = partial(attention_mask, explicit=True)


def _reads_masks(config: Any) -> bool:
    """Whether the model itself looks up in its masks which keys it may choose from, as Qwen4's indexer does."""
    return "indexed_attention" in (getattr(config, "layer_types", None) or ())


def _none_will_do(q_length: int, kv_length: int, window: int | None, explicit: bool) -> bool:
    """Whether None can stand for a causal mask whose keys are all valid."""
    if q_length == 1:
        return window is None or kv_length <= window
    return not explicit and q_length == kv_length and (window is None or kv_length < window)  # as transformers has it for SDPA


def _is_causal(mask_function: Any) -> bool:
    """Whether it is transformers' causal mask, alone or under its sliding window and nothing else."""
    if mask_function is causal_mask_function:
        return True
    if torch.compiler.is_compiling():  # closures cannot be looked into; what is not called causal gets its full mask
        return False
    windowed = sliding_window_causal_mask_function(1)
    parts, expected = _parts(mask_function), _parts(windowed)
    return (
        getattr(mask_function, "__code__", None) is windowed.__code__
        and len(parts) == len(expected)
        and all(part.__code__ is other.__code__ for part, other in zip(parts, expected, strict=True))
    )


def _parts(mask_function: Any) -> tuple:
    """The functions that transformers' `and_masks` closed over."""
    cells = getattr(mask_function, "__closure__", None) or ()
    return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, tuple)), ())


def may_look(mask: Tensor) -> bool:
    """Whether the mask's values may be read: there are any, and neither is this traced nor captured in a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return False
    if mask.is_meta or isinstance(mask, FakeTensor) or is_functorch_wrapped_tensor(mask):
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def as_ranges(mask: Tensor | None, first: int | Tensor) -> Tensor | None:
    """A full mask [B, 1, Lq, Lk], as each query's own range where all see one run of keys. One host sync.

    first: the first query's place among the keys.
    """
    if mask is None or not mask.numel() or not may_look(mask):
        return mask
    seen = mask[:, 0]
    start, past = (by_key.view(torch.uint8).argmax(-1) for by_key in (seen, seen.flip(-1)))  # of the first that is seen
    end = torch.where(seen.any(-1), seen.shape[-1] - past, start)
    position = torch.arange(seen.shape[-1], device=mask.device)
    if not torch.equal((position >= start[..., None]) & (position < end[..., None]), seen):
        return mask
    own = (torch.arange(seen.shape[1], device=mask.device) + first).expand_as(start)
    return fresh(_columns(start, end, own))


def _left_padding(mask: Tensor, end: int | Tensor, kv_offset: int) -> tuple[Tensor, bool, bool]:
    """(start [B] int32, whether the valid keys of every row are [start, end), whether any start > 0).

    One host sync where nothing is masked, which is what most forwards bring, else two.
    """
    mask = mask[:, kv_offset:].bool()
    if isinstance(end, int) and end <= mask.shape[1] and mask.all():
        return torch.zeros(mask.shape[0], dtype=torch.int32, device=mask.device), True, False
    position = torch.arange(mask.shape[1], device=mask.device)
    before_end = position < end
    start = ((mask.cumsum(1) == 0) & before_end).sum(1)
    wanted = (position >= start[:, None]) & before_end
    covers = torch.as_tensor(end, device=mask.device) <= mask.shape[1]
    fits = ((mask & before_end) == wanted).all() & covers
    fits, padded = torch.stack([fits, (start > 0).any()]).tolist()
    return start.to(torch.int32), fits, padded


# The attention function.


class _Call(NamedTuple):
    """The arguments of `attention`, with what module and mask have to say in them.

    causal: whether None hides what comes later. window: of a range mask. sinks: [Hq].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it; with `output_attentions`, also how much falls on each image.

    Args:
        module: the attention module; a patched model's carries the region map.
        query: [B, Hq, Lq, D]; key, value: [B, Hkv, Lk, D].
        attention_mask: None, a range mask ([B, 1, 1, 2], or [B, 1, Lq, 2 or 3] where each query has its own and the window
            is in it), or a full mask [B or 1, Hq or 1, Lq, ≥ Lk], bool or additive. None is what it is to SDPA: no mask for a
            single query or a module that is not causal, else causal from the first key on; without a window.
        kwargs: `sliding_window`, `softcap`, `s_aux` (sinks [Hq]) and `indices` [B, Lq, k] (of a full mask's keys those that a
            query sees, in any order: DeepSeek's sparse attention) are obeyed; `output_attentions` asks for statistics. While
            `patch` tries the module, a tensor that is not known is refused: it may say which keys a query sees.

    Returns:
        out: [B, Lq, Hq, D].
        mass: [B, Hq, Lq, R] float32, the softmax probability on each image, or None when it was not asked for.

    Raises:
        ValueError: an argument that is not supported; statistics asked for where no region map is known.
        RuntimeError: the module is in training mode.
    """
    if module.training or dropout or not _KNOWN.issuperset(kwargs):
        _refuse(module, dropout, kwargs)
    if kwargs.get("indices") is not None:
        attention_mask = _chosen(attention_mask, kwargs["indices"], key.shape[2])
    state: AttentionState | None = getattr(module, STATE, None)
    attentions = kwargs.get("output_attentions", False)
    if state is None and attentions and is_causal_call(module, is_causal):
        raise ValueError(
            "output_attentions=True with attn_implementation='ras_fast' needs to know where the image tokens are: "
            "call ras_fast.patch(model, norms=False, linears=False) first"
        )
    request = None if state is None else state.request(attentions)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if request is None and attention_mask is None and softcap is None and sinks is None and query.element_size() != 2:
        # The shortest way: every layer's, every step's.
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=is_causal)[0], None
    causal, window = is_causal_call(module, is_causal), _window(attention_mask, kwargs)
    call = _Call(query, key, value, attention_mask, scaling, causal, window, softcap, sinks)
    if request is None:
        return _without_statistics(module, call), None
    ids, num_regions = state.regions(key.shape[0], key.shape[2])
    bias = state.bias(num_regions, query.device)
    out, mass, scores = _with_statistics(module, call, ids, num_regions, bias, request)
    return out, state.deliver(request, mass, scores)


def _chosen(mask: Tensor | None, indices: Tensor, length_k: int) -> Tensor:
    """The full mask under which a query sees only those of its keys that are among its `indices`."""
    if mask is None or is_range(mask):
        raise ValueError("indices is given without a full attention_mask; it needs one [B or 1, Hq or 1, Lq, Lk]")
    others = indices.new_ones((*indices.shape[:2], length_k), dtype=torch.bool).scatter(-1, indices.long(), False)[:, None]
    mask = mask[..., :length_k]
    return mask & ~others if mask.dtype == torch.bool else mask.masked_fill(others, torch.finfo(mask.dtype).min)


def explicit_attention(*args: Any, is_causal: bool | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`attention` under what `explicit_mask` gives: None hides nothing, whatever the module says."""
    return attention(*args, is_causal=False, **kwargs)


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if module.training:
        raise RuntimeError(
            "attn_implementation='ras_fast' is for inference, but the model is in training mode: call eval(). Where it shares "
            "its config with a patched model, build it from a copy of that made before patch; a later copy also needs "
            "set_attn_implementation('sdpa')"
        )
    if dropout:
        raise ValueError(f"dropout is {dropout}; with attn_implementation='ras_fast' it must be 0")
    state: AttentionState | None = getattr(module, STATE, None)
    proving = state is not None and not state.heads  # then what comes is the module's own, later it may be any input's
    for name in kwargs.keys() - _KNOWN:
        if (name in _UNSUPPORTED and kwargs[name] is not None) or (proving and isinstance(kwargs[name], Tensor)):
            raise ValueError(
                f"{name} is given; attn_implementation='ras_fast' supports neither it nor continuous batching nor packed "
                "sequences: use ras_fast.patch(model, regions=False), or load the model with 'sdpa'"
            )


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether a call is causal, by its argument or else by the module."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _window(mask: Tensor | None, kwargs: dict[str, Any]) -> int | None:
    """The window of a range mask, which need not be the module's: where layers were taken out, masks go by their new places."""
    made_with = getattr(mask, _WINDOW, None)
    return kwargs.get("sliding_window") if made_with is None else made_with[0]


def _without_statistics(module: nn.Module, call: _Call) -> Tensor:
    """[B, Lq, Hq, D]: SDPA exactly as transformers calls it, so that the answers are its answers bit for bit; a kernel only
    where SDPA lacks something or is slow."""
    query, key, value, mask = call[:4]
    beyond_sdpa = call.softcap is not None or call.sinks is not None
    call = _autocast(call) if beyond_sdpa else call
    if (beyond_sdpa or sdpa_is_slow(query, key, value, mask)) and _kernels_apply(call):
        return _region_attention(call)[0].transpose(1, 2)
    if beyond_sdpa:
        return _dense(call)[0].transpose(1, 2)
    full = None if mask is None else _full_mask(call)
    return sdpa_attention_forward(module, query, key, value, full, scaling=call.scaling, is_causal=call.causal)[0]


def sdpa_is_slow(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether this is attention that this package's kernels do faster (docs/kernels.md): in half precision, or over ranges of
    each query's own, where the caller asks for them, as the engine does.

    On the CPU torch's flash attention takes longer for few rows than reading the cache, and for more rows of half precision
    than multiplying in float. On a GPU it does not take masks, and what SDPA falls back to under one neither splits the keys
    among blocks nor shares them within a group of query heads.
    """
    if not query.dtype == key.dtype == value.dtype:
        return False
    own = is_range(mask) and _is_own(mask)
    asked = own and mask.shape[3] == 2
    if asked and query.is_cpu and decodes_on_cpu(query, key, row_bounds=True):
        return True
    if query.element_size() != 2:
        return False
    if query.is_cpu:
        return beats_flash_on_cpu(query, key, own)
    return query.is_cuda and is_range(mask) and decodes_on_cuda(query, key)


def _with_statistics(module: nn.Module, call: _Call, ids: Tensor, num_regions: int, bias: Tensor | None, request: Request):
    """(out [B, Lq, Hq, D], mass [B, Hq, M, R], scores [B, Hq, Lk] or None), under a region bias [Hq, R] or None."""
    call = _autocast(call)
    query, key = call.query, call.key
    rows, score_rows = (_resolve_rows(wanted, query) for wanted in (request.rows, request.score_rows))
    if not _kernels_apply(call):
        out, mass, scores = _dense(call, ids, num_regions, bias, rows, score_rows, request.reduce)
        return out.transpose(1, 2), mass, scores
    if not num_regions and not score_rows:
        return _without_statistics(module, call), query.new_zeros((*query.shape[:2], rows, 0), dtype=torch.float32), None
    together = num_regions and rows == score_rows  # the scores' probabilities give the masses, too
    out, lse, mass = _region_attention(call, ids if num_regions else None, num_regions, bias, 0 if together else rows)
    if not score_rows:
        return out.transpose(1, 2), mass, None
    keywords = dict(_masking(call), scale=call.scaling, softcap=call.softcap, region_bias=bias,
                    rows=score_rows, reduce=request.reduce)  # fmt: skip
    if together:
        mass, scores = ops.region_statistics(query, key, lse, ids, num_regions, **keywords)
    else:
        scores = ops.key_attention(query, key, lse, region_ids=None if bias is None else ids, **keywords)
    return out.transpose(1, 2), mass, scores


def _autocast(call: _Call) -> _Call:
    """The call in the dtype that autocast would convert SDPA's arguments to."""
    device = device_type(call.query)
    if device == "meta" or not torch.is_autocast_enabled(device):  # asking is an error on meta
        return call
    dtype = torch.get_autocast_dtype(device)
    return _Call(*(tensor.to(dtype) for tensor in call[:3]), *call[3:])


def _resolve_rows(rows: int | None, query: Tensor) -> int:
    return query.shape[2] if rows is None else min(rows, query.shape[2])


def _kernels_apply(call: _Call) -> bool:
    """Whether the mask is one that the kernels know. Their causal one ends at the last key; where None means the one that
    begins at the first, as in cross-attention without a mask, that is not the same."""
    if call.key.shape != call.value.shape:
        return False
    if call.mask is None:
        return not call.causal or call.query.shape[2] in (1, call.key.shape[2])
    return is_range(call.mask)


def _masking(call: _Call) -> dict[str, Any]:
    """The mask as keywords of the ops."""
    mask = call.mask
    if mask is not None and _is_own(mask):
        kv_start, kv_end = (mask[:, 0, :, bound].contiguous() for bound in (0, 1))
        return {"is_causal": False, "kv_start": kv_start, "kv_end": kv_end}
    if mask is not None:
        kv_start, kv_end = mask[:, 0, 0].unbind(1)
        return {"is_causal": True, "kv_start": kv_start.contiguous(), "kv_end": kv_end.contiguous(), "window": call.window}
    return {"is_causal": call.causal}


def _region_attention(call: _Call, ids: Tensor | None = None, num_regions: int = 0, bias: Tensor | None = None, rows: int = 0):
    return ops.region_attention(
        call.query, call.key, call.value, ids, num_regions, scale=call.scaling, softcap=call.softcap, sinks=call.sinks,
        region_bias=bias, mass_rows=rows, **_masking(call),
    )  # fmt: skip


def _full_mask(call: _Call) -> Tensor | None:
    """bool or additive [B or 1, ., Lq, Lk]; None where every query sees every key."""
    mask, length_q, length_k = call.mask, call.query.shape[2], call.key.shape[2]
    if mask is None:
        hides = call.causal and length_q > 1
        return torch.ones(1, 1, length_q, length_k, dtype=torch.bool, device=call.key.device).tril() if hides else None
    if not is_range(mask):
        return mask[..., :length_k]
    return _expand_once(mask, length_q, length_k, call.window)


def _expand(mask: Tensor, length_q: int, length_k: int, window: int | None) -> Tensor:
    """A range mask as booleans [B, 1, Lq, Lk]."""
    start, end = mask[..., :1], mask[..., 1:2]
    position = torch.arange(length_k, device=mask.device)
    if _is_own(mask):
        return (position >= start) & (position < end)
    own = torch.arange(length_q, device=mask.device)[:, None] + (end - length_q)
    seen = (position >= start) & (position <= own)
    return seen & (position > own - window) if window is not None else seen


def _expand_once(mask: Tensor, length_q: int, length_k: int, window: int | None) -> Tensor:
    """`_expand`, remembered on the mask for the next layer of the same forward, which gets the same one.

    A caller's own range may be written between two forwards, also by a replayed CUDA graph: only what was made for this
    forward is remembered.
    """
    if not hasattr(mask, _WINDOW):
        return _expand(mask, length_q, length_k, window)
    asked = length_q, length_k, window
    before, full = getattr(mask, _FULL, (None, None))
    if before != asked:
        full = _expand(mask, length_q, length_k, window)
        setattr(mask, _FULL, (asked, full))
    return full


def _dense(
    call: _Call, ids: Tensor | None = None, num_regions: int = 0, bias: Tensor | None = None, rows: int = 0,
    score_rows: int = 0, reduce: str = "sum",
):  # fmt: skip
    """Attention under a full mask, row chunk by row chunk.

    Returns out [B, Hq, Lq, D], mass [B, Hq, rows, R], and scores [B, Hq, Lk] over the last `score_rows`, or None.
    """
    query, key, value = call[:3]
    length_q = query.shape[2]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    mass = query.new_zeros((*query.shape[:2], length_q, num_regions), dtype=torch.float32)
    scores = query.new_zeros((*query.shape[:2], key.shape[2]), dtype=torch.float32) if score_rows else None
    values = reference.by_query_head(value, query.shape[1], torch.float32)
    for start, p in _probabilities(call, reference.key_bias(ids, bias, torch.float32)):
        stop = start + p.shape[2]
        out[:, :, start:stop] = (p @ values).to(out.dtype)
        if num_regions and stop > length_q - rows:
            mass[:, :, start:stop] = reference.mass_of(p, ids, num_regions)
        if score_rows and stop > length_q - score_rows:
            counted = p[:, :, max(length_q - score_rows - start, 0) :]
            scores = torch.maximum(scores, counted.amax(2)) if reduce == "max" else scores + counted.sum(2)
    if score_rows and reduce == "mean":
        scores = scores / score_rows
    return out, mass[:, :, length_q - rows :], scores


def _probabilities(call: _Call, key_bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(first row, probabilities [B, Hq, rows, Lk] float32), chunk after chunk."""
    query, key, mask = call.query, call.key, _full_mask(call)
    scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    keys = reference.by_query_head(key, query.shape[1], torch.float32)
    chunk = max(1, _CHUNK // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], chunk):
        s = reference.scores(query[:, :, start : start + chunk].float(), keys, scale, call.softcap, key_bias)
        if mask is not None:
            part = mask[..., start : start + chunk, :] if mask.shape[-2] > 1 else mask
            s = s.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else s + part
        # Not exp(s - logsumexp), as in the reference: in a row that an additive mask fills with a finite minimum it is 1.
        blind = (s == -torch.inf).all(-1, keepdim=True)
        if call.sinks is not None:
            sink = call.sinks.float()[:, None, None].expand(*s.shape[:3], 1)
            p = torch.cat([s, sink], -1).softmax(-1)[..., :-1]
        else:
            p = s.softmax(-1)
        yield start, p.masked_fill(blind, 0)
