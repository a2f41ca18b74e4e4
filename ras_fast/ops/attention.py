"""Attention with image-region statistics in O(N) memory (docs/kernels.md, "Region attention").

Shapes: B batch, Hq query heads, Hkv key/value heads (Hq % Hkv == 0), Lq, Lk lengths, D head dimension, R regions, M rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ras_fast.ops import _check
from ras_fast.ops._registry import LIBRARY, call, define, define_triton, outside_autocast
from ras_fast.ops.attention_plan import Case, Plan, op_of, plan_attention, plan_cpu_prefill

REDUCTIONS = ("mean", "sum", "max")
CHUNK_ROWS = 256  # that go together where no kernel is built


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_ids: Tensor | None = None,
    num_regions: int = 0,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    region_bias: Tensor | None = None,
    mass_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention that also says how much of it falls on each region of the keys.

    Causal is aligned bottom-right: query row i sees keys ≤ i + (n_valid − Lq), where n_valid is `kv_end` (or Lk). The score of
    a key is scale·q·k, then softcap, then the region's bias, then the masks.

    Args:
        query: [B, Hq, Lq, D], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        key, value: [B, Hkv, Lk, D], dtype of `query`; query head h reads kv head h // (Hq // Hkv).
        region_ids: [B, Lk] int32, −1 for none, else 0..num_regions−1; None when no statistic is wanted. Out-of-range ids
            raise on CPU tensors in eager mode; elsewhere, where looking would force a host sync, they count as none.
        num_regions: R; at least 1 with `region_ids`, 0 without.
        scale: factor on q·k; None: D ** -0.5.
        is_causal: whether a row sees only keys up to its own position.
        kv_start, kv_end: [B] int32; the valid keys are [kv_start, kv_end): left padding, static caches. None: 0 and Lk. Or
            [B, Lq] with is_causal=False: each query row's own valid keys, as of several sequences over one cache.
        window: a row sees at most that many keys up to and including its own; needs `is_causal`.
        softcap: s ← softcap·tanh(s / softcap).
        sinks: [Hq] floating: one extra logit per head, which takes probability and has no value.
        region_bias: [Hq, R] or [B, Hq, R] float32, added to the score of the keys of a region.
        mass_rows: M, the number of last query rows whose masses are wanted; None: all Lq.

    Returns:
        out: [B, Hq, Lq, D], dtype of `query`; in memory [B, Lq, Hq, D], so that the projection after it needs no copy.
        lse: [B, Hq, Lq] float32, natural log of the softmax denominator, sink included.
        mass: [B, Hq, M, R] float32, probability on each region; its sum over regions is at most 1.
        A row without a valid key: out 0, mass 0, lse −inf (with a sink: the sink's logit).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: an input requires grad and grad mode is on.
    """
    name, arguments = _attention_call(
        query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
        mass_rows,
    )  # fmt: skip
    return call(name, None, *arguments)


def explain(
    query: Tensor, key: Tensor, value: Tensor, region_ids: Tensor | None = None, num_regions: int = 0, **keywords
) -> Plan:
    """The kernel that `region_attention` would run with these arguments, why, and in which configuration. Runs nothing.

    Raises:
        ValueError, RuntimeError: as :func:`region_attention`.
    """
    defaults = dict.fromkeys(_KEYWORDS) | {"is_causal": True}
    unknown = set(keywords) - set(defaults)
    if unknown:
        _check.fail("keywords", sorted(unknown), f"of region_attention's: {', '.join(_KEYWORDS)}")
    _, arguments = _attention_call(query, key, value, region_ids, num_regions, *(defaults | keywords).values())
    plan = plan_attention(*arguments[:3], case_of(*arguments[3:]))
    return plan._replace(config=_triton_config(*arguments)) if plan.kernel == "triton" and query.numel() else plan


def _triton_config(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
) -> str:  # fmt: skip
    from ras_fast.triton_kernels.attention import explain

    if _are_per_row(kv_start, kv_end):  # they go one by one
        query = query[:, :, :1]
    return explain(query, key, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias)


def region_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    region_ids: Tensor,
    num_regions: int,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    region_bias: Tensor | None = None,
    mass_rows: int | None = None,
) -> Tensor:
    """The `mass` of :func:`region_attention` alone, recomputed from an `lse` that some attention has left.

    Reads only the last `mass_rows` queries and the keys that lie in a region.
    Arguments as in :func:`region_attention`, except:

    Args:
        lse: [B, Hq, Lq] float32, from attention with the same arguments.
        kv_start, kv_end: [B] only.
        sinks: ignored, because `lse` has them in it; accepted so that one set of keywords serves both functions.

    Returns:
        mass: [B, Hq, M, R] float32.

    Raises:
        ValueError, RuntimeError: as :func:`region_attention`.
    """
    masks = _statistics_masks("region_mass", query, key, lse, scale, is_causal, kv_start, kv_end, window, softcap, region_bias)
    _validate_wanted_regions(query, key, region_ids, num_regions, region_bias)
    rows = _resolve_rows("mass_rows", mass_rows, query)
    return call("region_mass", None, query, key, lse, region_ids, num_regions, *masks, region_bias, rows)


def key_attention(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: int | None = None,
    reduce: str = "mean",
    region_ids: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    region_bias: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives from the last `rows` query rows: the heat map.

    Arguments as in :func:`region_mass`, except:

    Args:
        rows: how many of the last query rows to reduce over; None: all.
        region_ids: needed only with `region_bias`, whose last dimension is then R.
        reduce: "mean", "sum" or "max" over those rows. With no row at all the scores are 0.

    Returns:
        scores: [B, Hq, Lk] float32.

    Raises:
        ValueError, RuntimeError: as :func:`region_attention`.
    """
    masks = _statistics_masks(
        "key_attention", query, key, lse, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
    )
    _validate_reduce(reduce)
    num_regions = 0
    if region_bias is not None and region_ids is not None:
        if region_bias.dim() not in (2, 3):
            _check.fail("region_bias", f"of shape {tuple(region_bias.shape)}", "[Hq, R] or [B, Hq, R]")
        num_regions = region_bias.shape[-1]
        _validate_regions(key, region_ids, num_regions)
    _validate_bias(query, region_ids, num_regions, region_bias)
    rows, ids = _resolve_rows("rows", rows, query), region_ids if num_regions else None
    return call("key_attention", None, query, key, lse, rows, reduce, ids, *masks, region_bias)


def region_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    region_ids: Tensor,
    num_regions: int,
    *,
    rows: int | None = None,
    reduce: str = "mean",
    scale: float | None = None,
    is_causal: bool = True,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    region_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`region_mass` and :func:`key_attention` of the same rows, whose probabilities are computed once for both.

    Arguments as in those two. In Triton it is one launch up to 256 rows; more rows take one for each statistic.

    Returns:
        mass: [B, Hq, rows, R] float32.
        scores: [B, Hq, Lk] float32.

    Raises:
        ValueError, RuntimeError: as :func:`region_attention`.
    """
    masks = _statistics_masks(
        "region_statistics", query, key, lse, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
    )
    _validate_reduce(reduce)
    _validate_wanted_regions(query, key, region_ids, num_regions, region_bias)
    rows = _resolve_rows("rows", rows, query)
    return call("region_statistics", None, query, key, lse, region_ids, num_regions, rows, reduce, *masks, region_bias)


_KEYWORDS = (
    "scale", "is_causal", "kv_start", "kv_end", "window", "softcap", "sinks", "region_bias", "mass_rows",
)  # fmt: skip


def _attention_call(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """Public arguments, validated, as (op, its arguments)."""
    _check.no_grad("region_attention", query, key, value, sinks, region_bias)
    _validate_query_key(query, key)
    _check.shape("value", value, key.shape, "the shape of key")
    _check.dtype("value", value, query.dtype)
    _check.last_dim_contiguous("value", value)
    _check.device("value", value, query.device)
    _validate_regions(key, region_ids, num_regions)
    if _are_per_row(kv_start, kv_end):
        kv_start, kv_end = _validated_row_bounds(query, is_causal, kv_start, kv_end)
    else:
        _validate_bounds(query, kv_start, kv_end)
    _validate_scores(is_causal, window, softcap)
    _validate_bias(query, region_ids, num_regions, region_bias)
    if sinks is not None:
        _check.shape("sinks", sinks, (query.shape[1],), "[Hq]")
        _check.floating("sinks", sinks)
        _check.device("sinks", sinks, query.device)
        sinks = sinks.float().contiguous()
    rows = _resolve_rows("mass_rows", mass_rows, query)
    arguments = (
        query, key, value, region_ids, num_regions, _resolve_scale(scale, query), is_causal, kv_start, kv_end,
        _resolve_window(window, key), softcap or 0.0, sinks, region_bias, rows,
    )  # fmt: skip
    return op_of(query, _are_per_row(kv_start, kv_end)), arguments


def case_of(
    region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias, mass_rows
) -> Case:
    """What the dispatcher looks at, from the op's arguments after the three tensors."""
    bounds = kv_start is not None or kv_end is not None
    rows = mass_rows if num_regions else 0
    row_bounds = _are_per_row(kv_start, kv_end)
    return Case(rows, is_causal, window, softcap, bounds, sinks is not None, region_bias is not None, row_bounds, scale)


def _statistics_masks(name, query, key, lse, scale, is_causal, kv_start, kv_end, window, softcap, region_bias) -> tuple:
    """Validates what the ops that take an LSE share; their arguments from `scale` to `softcap`."""
    _check.no_grad(name, query, key, lse, region_bias)
    _validate_query_key(query, key)
    _validate_lse(lse, query)
    _validate_bounds(query, kv_start, kv_end)
    _validate_scores(is_causal, window, softcap)
    return _resolve_scale(scale, query), is_causal, kv_start, kv_end, _resolve_window(window, key), softcap or 0.0


def _resolve_scale(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _resolve_window(window: int | None, key: Tensor) -> int:
    """The window, 0 for none. One that covers all keys counts as none, so that it never overflows a kernel's 32 bits."""
    return 0 if window is None or window >= key.shape[2] else window


def _resolve_rows(name: str, rows: int | None, query: Tensor) -> int:
    if rows is None:
        return query.shape[2]
    if not 0 <= rows <= query.shape[2]:
        _check.fail(name, rows, f"None or in 0..Lq = {query.shape[2]}")
    return rows


def _validate_query_key(query: Tensor, key: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or tensor.shape[-1] == 0:
            _check.fail(name, f"of shape {tuple(tensor.shape)}", "[B, H, L, D] with D > 0")
        _check.last_dim_contiguous(name, tensor)
    _check.floating("query", query)
    _check.dtype("key", key, query.dtype)
    _check.device("key", key, query.device)
    batch, heads, _, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim:
        _check.fail("key", f"of shape {tuple(key.shape)}", f"[B, Hkv, Lk, D] with B = {batch} and D = {dim}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        _check.fail("key", f"of {key.shape[1]} heads", f"of a number of heads that divides Hq = {heads}")


def _validate_lse(lse: Tensor, query: Tensor) -> None:
    _check.shape("lse", lse, query.shape[:3], "[B, Hq, Lq]")
    _check.dtype("lse", lse, torch.float32)
    _check.device("lse", lse, query.device)


def _validate_reduce(reduce: str) -> None:
    if reduce not in REDUCTIONS:
        _check.fail("reduce", repr(reduce), f"one of {REDUCTIONS}")


def _validate_wanted_regions(query, key, region_ids, num_regions, region_bias) -> None:
    """For the ops whose result is by region."""
    if region_ids is None:
        _check.fail("region_ids", "None", "[B, Lk] int32")
    _validate_regions(key, region_ids, num_regions)
    _validate_bias(query, region_ids, num_regions, region_bias)


def _validate_regions(key: Tensor, region_ids: Tensor | None, num_regions: int) -> None:
    if region_ids is None:
        if num_regions:
            _check.fail("num_regions", num_regions, "0 when region_ids is None")
        return
    if num_regions < 1:
        _check.fail("num_regions", num_regions, "at least 1 when region_ids is given")
    _check.shape("region_ids", region_ids, (key.shape[0], key.shape[2]), "[B, Lk]")
    _check.dtype("region_ids", region_ids, torch.int32)
    _check.device("region_ids", region_ids, key.device)
    _check.last_dim_contiguous("region_ids", region_ids)
    if region_ids.device.type == "cpu" and region_ids.numel() and _check.may_read(region_ids):
        low, high = (int(bound) for bound in torch.aminmax(region_ids))
        if low < -1 or high >= num_regions:
            _check.fail("region_ids", f"in {low}..{high}", f"in -1..num_regions-1 = -1..{num_regions - 1}")


def _are_per_row(*bounds: Tensor | None) -> bool:
    """Whether one of them is [B, Lq], each row's own."""
    return any(bound is not None and bound.dim() == 2 for bound in bounds)


def _validated_row_bounds(query, is_causal, kv_start, kv_end) -> tuple[Tensor | None, Tensor | None]:
    """Bounds of each row's own, contiguous; those of a single row as [B], of no row none."""
    if is_causal:
        name = "kv_start" if _are_per_row(kv_start) else "kv_end"
        _check.fail(name, "[B, Lq] with is_causal=True", "[B], or used with is_causal=False")
    _validate_bounds(query, kv_start, kv_end, (query.shape[0], query.shape[2]), "[B, Lq], as the other bound is,")
    if query.shape[2] == 0:
        return None, None
    given = (None if bound is None else bound.contiguous() for bound in (kv_start, kv_end))
    return tuple(given) if query.shape[2] > 1 else tuple(None if bound is None else bound.view(-1) for bound in given)


def _validate_bounds(query, kv_start, kv_end, shape: tuple[int, ...] | None = None, symbols: str = "[B]") -> None:
    for name, bound in (("kv_start", kv_start), ("kv_end", kv_end)):
        if bound is not None:
            _check.shape(name, bound, (query.shape[0],) if shape is None else shape, symbols)
            _check.dtype(name, bound, torch.int32)
            _check.device(name, bound, query.device)
            _check.last_dim_contiguous(name, bound)


def _validate_scores(is_causal, window, softcap) -> None:
    if window is not None:
        if window < 1:
            _check.fail("window", window, "None or at least 1")
        if not is_causal:
            _check.fail("window", f"{window} with is_causal=False", "used with is_causal=True")
    if softcap is not None and not 0 < softcap < math.inf:
        _check.fail("softcap", softcap, "None, or positive and finite")


def _validate_bias(query: Tensor, region_ids: Tensor | None, num_regions: int, region_bias: Tensor | None) -> None:
    if region_bias is None:
        return
    if region_ids is None:
        _check.fail("region_bias", "given without region_ids", "given together with region_ids")
    batch, heads = query.shape[:2]
    if tuple(region_bias.shape) not in ((heads, num_regions), (batch, heads, num_regions)):
        _check.fail("region_bias", f"of shape {tuple(region_bias.shape)}",
                    f"[Hq, R] or [B, Hq, R] with B = {batch}, Hq = {heads}, R = {num_regions}")
    _check.dtype("region_bias", region_bias, torch.float32)
    _check.device("region_bias", region_bias, query.device)
    _check.last_dim_contiguous("region_bias", region_bias)


# The reference ("torch" backend): the definition that every kernel is tested against.


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _valid_keys(key: Tensor, kv_start: Tensor | None, kv_end: Tensor | None) -> tuple[Tensor, Tensor]:
    """([B, 1 or Lq, Lk] bool, [B, 1 or Lq, 1] int64 n_valid)."""
    batch, _, length, _ = key.shape
    position = torch.arange(length, device=key.device)
    end = torch.full((batch,), length, device=key.device) if kv_end is None else kv_end.long().clamp(max=length)
    end = _by_row(end)
    valid = position < end
    return (valid if kv_start is None else valid & (position >= _by_row(kv_start))), end


def _by_row(bound: Tensor) -> Tensor:
    """[B] or [B, Lq] as [B, 1 or Lq, 1]."""
    return (bound if bound.dim() == 2 else bound[:, None])[..., None]


def _one_hot(region_ids: Tensor, num_regions: int, dtype: torch.dtype) -> Tensor:
    """[B, Lk, R]; ids outside 0..R−1 give a row of zeros."""
    return (region_ids[..., None] == torch.arange(num_regions, device=region_ids.device)).to(dtype)


def _key_bias(region_ids: Tensor, region_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, Hq, 1, Lk]: the bias of each key's region, 0 outside every region; None without a bias."""
    if region_bias is None:
        return None
    bias = region_bias.to(dtype).expand(region_ids.shape[0], *region_bias.shape[-2:])
    # Gathered, not multiplied by a one-hot matrix: −inf shuts a region out, and 0 · −inf is NaN.
    inside = ((region_ids >= 0) & (region_ids < bias.shape[-1]))[:, None]
    places = region_ids.clamp(0, bias.shape[-1] - 1).long()[:, None].expand(-1, bias.shape[1], -1)
    return bias.gather(2, places).masked_fill(~inside, 0)[:, :, None]


def _scores(query, key, rows, scale, is_causal, kv_start, kv_end, window, softcap, bias) -> Tensor:
    """Masked scores [B, Hq, rows, Lk] of the last `rows` queries; −inf where a row does not see a key."""
    acc = _accumulator(query)
    length_q, length_k = query.shape[2], key.shape[2]
    q = query[:, :, length_q - rows :].to(acc)
    k = key.to(acc).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    s = q @ k.transpose(-1, -2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    valid, end = _valid_keys(key, kv_start, kv_end)
    seen = valid.expand(-1, rows, -1)
    if is_causal:
        own = torch.arange(length_q - rows, length_q, device=key.device)[None, :, None] + (end - length_q)
        position = torch.arange(length_k, device=key.device)
        seen = seen & (position <= own)
        if window:
            seen = seen & (position > own - window)
    return s.masked_fill(~seen[:, None], -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores − lse), 0 in rows that see no key (lse = −inf)."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None].to(scores.dtype))


def _attention_reference(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    rows, bias = query.shape[2], _key_bias(region_ids, region_bias, _accumulator(query))
    scores = _scores(query, key, rows, scale, is_causal, kv_start, kv_end, window, softcap, bias)
    # What lies outside the valid keys may be uninitialised cache: NaN there must not reach 0 · NaN.
    valid, _ = _valid_keys(key, kv_start, kv_end)
    value = value.masked_fill(~valid.any(1)[:, None, :, None], 0)
    out, lse = _softmax_out(scores, value, sinks)
    mass = query.new_zeros((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if region_ids is not None:
        p = _probabilities(scores[:, :, rows - mass_rows :], lse[:, :, rows - mass_rows :])
        mass = _mass_of(p, region_ids, num_regions)
    return _laid_out(out.to(query.dtype)), lse.float(), mass


def _laid_out(out: Tensor) -> Tensor:
    """[B, Hq, Lq, D] that lies in memory as [B, Lq, Hq, D], as every backend returns it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _softmax_out(scores: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of masked scores, both in the scores' dtype."""
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))
    v = value.to(scores.dtype).repeat_interleave(scores.shape[1] // value.shape[1], dim=1)
    return _probabilities(scores, lse) @ v, lse


def _selected(query, key, lse, rows, scale, is_causal, kv_start, kv_end, window, softcap, region_ids, region_bias) -> Tensor:
    """Probabilities [B, Hq, rows, Lk] of the last `rows` queries."""
    bias = _key_bias(region_ids, region_bias, _accumulator(query))
    scores = _scores(query, key, rows, scale, is_causal, kv_start, kv_end, window, softcap, bias)
    return _probabilities(scores, lse[:, :, query.shape[2] - rows :])


def _mass_of(p: Tensor, region_ids: Tensor, num_regions: int) -> Tensor:
    return torch.einsum("bhqk,bkr->bhqr", p, _one_hot(region_ids, num_regions, p.dtype)).float()


def _reduced(p: Tensor, reduce: str) -> Tensor:
    """Probabilities over their rows; 0 where there are none."""
    if p.shape[2] == 0:
        return p.new_zeros((*p.shape[:2], p.shape[3]), dtype=torch.float32)
    return (p.amax(2) if reduce == "max" else p.mean(2) if reduce == "mean" else p.sum(2)).float()


def _mass_reference(
    query, key, lse, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, region_bias, mass_rows
):
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    return _mass_of(_selected(query, key, lse, mass_rows, *masks, region_ids, region_bias), region_ids, num_regions)


def _key_reference(
    query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
):
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    return _reduced(_selected(query, key, lse, rows, *masks, region_ids, region_bias), reduce)


def _statistics_reference(query, key, lse, region_ids, num_regions, rows, reduce, *masks_and_bias):
    *masks, region_bias = masks_and_bias
    p = _selected(query, key, lse, rows, *masks, region_ids, region_bias)
    return _mass_of(p, region_ids, num_regions), _reduced(p, reduce)


def _row_by_row(decode, query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, *rest):
    """Attention whose query rows each have their own bounds, by kernels that take one pair of bounds per sequence."""
    *rest, mass_rows = rest
    rows = query.shape[2]
    parts = [
        decode(
            query[:, :, row : row + 1], key, value, region_ids, num_regions, scale, is_causal,
            *(None if bound is None else bound[:, row].contiguous() for bound in (kv_start, kv_end)),
            *rest, int(row >= rows - mass_rows),
        )
        for row in range(rows)
    ]  # fmt: skip
    out, lse, mass = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return _laid_out(out), lse, mass


# CPU: what attention_plan.py decides.


def _cpu_attention(query, key, value, region_ids, num_regions, *rest):
    arguments = (query, key, value, region_ids, num_regions, *rest)
    if _are_per_row(*rest[2:4]):
        return _row_by_row(torch.ops.ras_fast.decode_attention, *arguments)
    kernel = plan_cpu_prefill(query, key, value, case_of(*arguments[3:])).kernel
    if kernel == "prefill":
        return torch.ops.ras_fast.prefill_attention(*arguments)
    return (_cpu_flash if kernel == "flash" else _by_chunks_of_rows)(*arguments)


def _cpu_flash(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """torch's flash attention, which leaves the LSE, from which the masses of the wanted rows are recomputed."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    lse = lse.float().contiguous()  # aten's lies in memory as [B, Lq, Hq]
    mass = query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if mass.numel():
        masks = (scale, is_causal, kv_start, kv_end, window, softcap, region_bias)
        mass = torch.ops.ras_fast.region_mass(query, key, lse, region_ids, num_regions, *masks, mass_rows)
    return _laid_out(out), lse, mass


def _by_chunks_of_rows(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """The reference for a chunk of rows after another, so that its memory is linear in the number of keys."""
    rows, parts = query.shape[2], []
    _, end = _valid_keys(key, kv_start, kv_end)
    for first in range(0, max(rows, 1), CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, rows)
        # Under a causal mask the chunk's last row is to see the keys up to its own.
        chunk_end = (end[:, 0, 0] - (rows - last)).clamp(min=0) if is_causal else kv_end
        masks = (scale, is_causal, kv_start, chunk_end, window, softcap, sinks, region_bias)
        weighed = min(max(last - rows + mass_rows, 0), last - first)
        parts.append(_attention_reference(query[:, :, first:last], key, value, region_ids, num_regions, *masks, weighed))
    out, lse, mass = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return _laid_out(out), lse, mass


def _attention_fake(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    _check.one_device("region_attention", query, key, value, region_ids, kv_start, kv_end, sinks, region_bias)
    batch, heads, rows, dim = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    mass = query.new_empty((batch, heads, mass_rows, num_regions), dtype=torch.float32)
    return query.new_empty((batch, rows, heads, dim)).transpose(1, 2), lse, mass


def _mass_fake(
    query, key, lse, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, region_bias, mass_rows
):
    _check.one_device("region_mass", query, key, lse, region_ids, kv_start, kv_end, region_bias)
    return query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)


def _key_fake(
    query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
):
    _check.one_device("key_attention", query, key, lse, region_ids, kv_start, kv_end, region_bias)
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32)


def _statistics_fake(
    query, key, lse, region_ids, num_regions, rows, reduce, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
):
    _check.one_device("region_statistics", query, key, lse, region_ids, kv_start, kv_end, region_bias)
    heads = query.shape[:2]
    mass = query.new_empty((*heads, rows, num_regions), dtype=torch.float32)
    return mass, query.new_empty((*heads, key.shape[2]), dtype=torch.float32)


def _attention_triton(query, *args):
    from ras_fast.triton_kernels.attention import region_attention

    if _are_per_row(*args[6:8]):
        return _row_by_row(region_attention, query, *args)
    return region_attention(query, *args)


def _mass_triton(*args):
    from ras_fast.triton_kernels.attention import region_mass

    return region_mass(*args)


def _key_triton(*args):
    from ras_fast.triton_kernels.attention import key_attention

    return key_attention(*args)


def _statistics_triton(*args):
    from ras_fast.triton_kernels.attention import region_statistics

    return region_statistics(*args)


_MASKS = "float scale, bool is_causal, Tensor? kv_start, Tensor? kv_end, int window, float softcap"
_ATTENTION_SCHEMA = (
    f"region_attention(Tensor query, Tensor key, Tensor value, Tensor? region_ids, SymInt num_regions, {_MASKS}, "
    "Tensor? sinks, Tensor? region_bias, SymInt mass_rows) -> (Tensor out, Tensor lse, Tensor mass)"
)
_MASS_SCHEMA = (
    f"region_mass(Tensor query, Tensor key, Tensor lse, Tensor region_ids, SymInt num_regions, {_MASKS}, "
    "Tensor? region_bias, SymInt mass_rows) -> Tensor"
)
_KEY_SCHEMA = (
    f"key_attention(Tensor query, Tensor key, Tensor lse, SymInt rows, str reduce, Tensor? region_ids, {_MASKS}, "
    "Tensor? region_bias) -> Tensor"
)
_STATISTICS_SCHEMA = (
    "region_statistics(Tensor query, Tensor key, Tensor lse, Tensor region_ids, SymInt num_regions, SymInt rows, str reduce, "
    f"{_MASKS}, Tensor? region_bias) -> (Tensor mass, Tensor scores)"
)
define(_ATTENTION_SCHEMA, fake=_attention_fake, reference=_attention_reference)
for _name in ("decode_attention", "prefill_attention", "hopper_prefill"):
    define(f"{_name}({_ATTENTION_SCHEMA.split('(', 1)[1]}", fake=_attention_fake, reference=_attention_reference)
define(_MASS_SCHEMA, fake=_mass_fake, reference=_mass_reference)
define(_KEY_SCHEMA, fake=_key_fake, reference=_key_reference)
define(_STATISTICS_SCHEMA, fake=_statistics_fake, reference=_statistics_reference)
define_triton(_ATTENTION_SCHEMA, fake=_attention_fake, kernel=_attention_triton)
define_triton(_MASS_SCHEMA, fake=_mass_fake, kernel=_mass_triton)
define_triton(_KEY_SCHEMA, fake=_key_fake, kernel=_key_triton)
define_triton(_STATISTICS_SCHEMA, fake=_statistics_fake, kernel=_statistics_triton)
LIBRARY.impl("region_attention", outside_autocast(_cpu_attention), "CPU")
