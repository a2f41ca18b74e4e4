"""Attention with image-region statistics in O(N) memory (docs/kernels.md, "Region attention").

Shapes: B batch, Hq query heads, Hkv key/value heads (Hq % Hkv == 0), Lq, Lk lengths, D head dimension, R regions, M rows.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ras_fast.ops import _check, attention_cpu, attention_cuda, attention_reference, attention_triton
from ras_fast.ops._registry import LIBRARY, call, define, guards_nothing, name_of, outside_autocast, renamed
from ras_fast.ops.attention_plan import Plan, are_per_row, case_of, op_of, plan_attention

REDUCTIONS = ("mean", "sum", "max")
_FLOAT32 = torch.finfo(torch.float32)


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
    a key is scale·q·k, then softcap, then the region's bias, then the masks. float64 is taken as well, by the reference alone.

    Args:
        query: [B, Hq, Lq, D], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        key, value: [B, Hkv, Lk, D], dtype of `query`; query head h reads kv head h // (Hq // Hkv).
        region_ids: [B, Lk] int32, −1 for none, else 0..num_regions−1; None when no statistic is wanted. Out-of-range ids
            raise on CPU tensors in eager mode; elsewhere, where looking would force a host sync, they count as none.
        num_regions: R; at least 1 with `region_ids`, 0 without.
        scale: factor on q·k; None: D ** -0.5.
        is_causal: whether a row sees only keys up to its own position.
        kv_start, kv_end: [B] int32; the valid keys are [kv_start, kv_end): left padding, static caches. None: 0 and Lk. Or
            [B, Lq] with is_causal=False: each query row's own valid keys, as of several sequences over one cache, or where
            the tokens of an image see each other and the text after it sees what came before.
        window: a row sees at most that many keys up to and including its own; needs `is_causal`.
        softcap: s ← softcap·tanh(s / softcap).
        sinks: [Hq] floating: one extra logit per head, which takes probability and has no value.
        region_bias: [Hq, R] or [B, Hq, R] float32, added to the score of the keys of a region; −inf shuts it out.
            Finite sinks and biases are to be below 2e38 in magnitude, since they are multiplied by log₂(e).
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
    return call(name, _validate_attention, *arguments)


def explain(*args: object, **keywords: object) -> Plan:
    """The kernel that :func:`region_attention` would run with these arguments, why, and in which configuration. Runs nothing.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`region_attention`.
    """
    given = inspect.signature(region_attention).bind(*args, **keywords)
    given.apply_defaults()
    _, arguments = _attention_call(*given.arguments.values())
    _validate_attention(*arguments)
    query, key, value, *rest = arguments
    plan = plan_attention(query, key, value, case_of(*rest))
    return plan._replace(config=attention_triton.explain(*arguments)) if plan.kernel == "triton" and query.numel() else plan


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
    if isinstance(region_bias, Tensor) and region_ids is not None:
        if region_bias.dim() not in (2, 3) or region_bias.shape[-1] == 0:
            _check.fail("region_bias", f"of shape {tuple(region_bias.shape)}", "[Hq, R] or [B, Hq, R] with R > 0")
        num_regions = region_bias.shape[-1]
        _validate_ids(region_ids, num_regions)
        _validate_ids_of(key, region_ids)
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


def _attention_call(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """Public arguments as (op, its arguments). Of these `_validate_attention` has still to validate the tensors."""
    _check.no_grad("region_attention", query, key, value, sinks, region_bias)
    _validate_scores(is_causal, window, softcap)
    _validate_ids(region_ids, num_regions)
    try:
        scale, window = _resolve_scale(scale, query), _resolve_window(window, key)
        rows = _resolve_rows("mass_rows", mass_rows, query)
        op = op_of(query, key, are_per_row(kv_start, kv_end))
    except (AttributeError, IndexError, ZeroDivisionError):  # of what is no [B, H, L, D]
        _validate_query_key(query, key)
        raise
    if are_per_row(kv_start, kv_end):
        kv_start, kv_end = _validated_row_bounds(query, is_causal, kv_start, kv_end)
    if sinks is not None:
        _check.is_tensor("sinks", sinks, "a tensor or None")
        _check.floating("sinks", sinks)
        sinks = sinks.float().contiguous()
    arguments = (
        query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap or 0.0, sinks,
        region_bias, rows,
    )  # fmt: skip
    return op, arguments


def _validate_attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
) -> None:  # fmt: skip
    """The tensors among an op's arguments."""
    _validate_query_key(query, key)
    _check.tensors(value=value)
    _check.shape("value", value, key.shape, "the shape of key")
    _check.stored("value", value, query.dtype, query.device)
    _validate_ids_of(key, region_ids)
    if not are_per_row(kv_start, kv_end):  # which are validated already
        _validate_bounds(query, kv_start, kv_end)
    _validate_bias(query, region_ids, num_regions, region_bias)
    if sinks is not None:
        _check.shape("sinks", sinks, (query.shape[1],), "[Hq]")
        _check.device("sinks", sinks, query.device)


def _statistics_masks(name, query, key, lse, scale, is_causal, kv_start, kv_end, window, softcap, region_bias) -> tuple:
    """Validates what the ops that take an LSE share; their arguments from `scale` to `softcap`."""
    _check.no_grad(name, query, key, lse, region_bias)
    _validate_query_key(query, key)
    _validate_lse(lse, query)
    _validate_scores(is_causal, window, softcap)
    if are_per_row(kv_start, kv_end):
        kv_start, kv_end = _validated_row_bounds(query, is_causal, kv_start, kv_end)
    else:
        _validate_bounds(query, kv_start, kv_end)
    return _resolve_scale(scale, query), is_causal, kv_start, kv_end, _resolve_window(window, key), softcap or 0.0


def _resolve_scale(scale: float | None, query: Tensor) -> float:
    default = query.shape[-1] ** -0.5  # an error with D = 0, whatever the scale
    if scale is None:
        return default
    _check.numbers(scale=scale)
    return float(scale)


def _resolve_window(window: int | None, key: Tensor) -> int:
    """The window, 0 for none. One that covers all keys counts as none, so that it never overflows a kernel's 32 bits."""
    return 0 if window is None or window >= key.shape[2] else window


def _resolve_rows(name: str, rows: int | None, query: Tensor) -> int:
    if rows is None:
        return query.shape[2]
    if not (_check.is_integer(rows) and 0 <= rows <= query.shape[2]):
        _check.fail(name, repr(rows), f"None or an integer in 0..Lq = {query.shape[2]}")
    return rows


def _validate_query_key(query: Tensor, key: Tensor) -> None:
    _check.tensors(query=query, key=key)
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
    _check.tensors(lse=lse)
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
    _validate_ids(region_ids, num_regions)
    _validate_ids_of(key, region_ids)
    _validate_bias(query, region_ids, num_regions, region_bias)


def _validate_ids(region_ids: Tensor | None, num_regions: int) -> None:
    """What the ids are and, on a CPU, that they lie in their range: kernels take those that do not for none."""
    if region_ids is None:
        if num_regions:
            _check.fail("num_regions", num_regions, "0 when region_ids is None")
        return
    if not (_check.is_integer(num_regions) and num_regions >= 1):
        _check.fail("num_regions", repr(num_regions), "an integer of at least 1 when region_ids is given")
    _check.is_tensor("region_ids", region_ids, "a tensor or None")
    _check.dtype("region_ids", region_ids, torch.int32)
    if region_ids.device.type == "cpu" and region_ids.numel() and _check.may_read(region_ids):
        low, high = (int(bound) for bound in torch.aminmax(region_ids))
        if low < -1 or high >= num_regions:
            _check.fail("region_ids", f"in {low}..{high}", f"in -1..num_regions-1 = -1..{num_regions - 1}")


def _validate_ids_of(key: Tensor, region_ids: Tensor | None) -> None:
    """Where the ids are, beside the keys."""
    if region_ids is None:
        return
    _check.shape("region_ids", region_ids, (key.shape[0], key.shape[2]), "[B, Lk]")
    _check.device("region_ids", region_ids, key.device)
    _check.last_dim_contiguous("region_ids", region_ids)


def _validated_row_bounds(query, is_causal, kv_start, kv_end) -> tuple[Tensor | None, Tensor | None]:
    """Bounds of each row's own, contiguous; those of a single row as [B], of no row none."""
    if is_causal:
        name = "kv_start" if are_per_row(kv_start) else "kv_end"
        _check.fail(name, "[B, Lq] with is_causal=True", "[B], or used with is_causal=False")
    _validate_bounds(query, kv_start, kv_end, (query.shape[0], query.shape[2]), "[B, Lq], as the other bound is,")
    if query.shape[2] == 0:
        return None, None
    given = (None if bound is None else bound.contiguous() for bound in (kv_start, kv_end))
    return tuple(given) if query.shape[2] > 1 else tuple(None if bound is None else bound.view(-1) for bound in given)


def _validate_bounds(query, kv_start, kv_end, shape: tuple[int, ...] | None = None, symbols: str = "[B]") -> None:
    for name, bound in (("kv_start", kv_start), ("kv_end", kv_end)):
        if bound is not None:
            _check.is_tensor(name, bound, f"None or a tensor {symbols}")
            _check.shape(name, bound, (query.shape[0],) if shape is None else shape, symbols)
            _check.stored(name, bound, torch.int32, query.device)


def _validate_scores(is_causal, window, softcap) -> None:
    if is_causal not in (True, False):  # such as None, which transformers takes for the module's own
        _check.fail("is_causal", repr(is_causal), "True or False")
    if window is not None:
        if not (_check.is_integer(window) and window >= 1):
            _check.fail("window", repr(window), "None or an integer of at least 1")
        if not is_causal:
            _check.fail("window", f"{window} with is_causal=False", "used with is_causal=True")
    # Kernels divide by it in float32.
    if softcap is not None and not (_check.is_number(softcap) and _FLOAT32.tiny <= softcap <= _FLOAT32.max):
        _check.fail("softcap", repr(softcap), f"None, or in {_FLOAT32.tiny:.2g}..{_FLOAT32.max:.2g}")


def _validate_bias(query: Tensor, region_ids: Tensor | None, num_regions: int, region_bias: Tensor | None) -> None:
    _check.tensors_or_none(region_bias=region_bias)
    if region_bias is None:
        return
    if region_ids is None:
        _check.fail("region_bias", "given without region_ids", "given together with region_ids")
    batch, heads = query.shape[:2]
    if tuple(region_bias.shape) not in ((heads, num_regions), (batch, heads, num_regions)):
        _check.fail(
            "region_bias",
            f"of shape {tuple(region_bias.shape)}",
            f"[Hq, R] or [B, Hq, R] with B = {batch}, Hq = {heads}, R = {num_regions}",
        )
    _check.stored("region_bias", region_bias, torch.float32, query.device)


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


def _key_fake(query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, window, softcap, region_bias):
    _check.one_device("key_attention", query, key, lse, region_ids, kv_start, kv_end, region_bias)
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32)


def _statistics_fake(
    query, key, lse, region_ids, num_regions, rows, reduce, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
):
    _check.one_device("region_statistics", query, key, lse, region_ids, kv_start, kv_end, region_bias)
    heads = query.shape[:2]
    mass = query.new_empty((*heads, rows, num_regions), dtype=torch.float32)
    return mass, query.new_empty((*heads, key.shape[2]), dtype=torch.float32)


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


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **kwargs: object) -> int:
    """As torch counts SDPA: as if every row saw every key. Statistics are not counted: their products depend on the regions."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * (dim + value[3])


for _schema, _fake in (
    (_ATTENTION_SCHEMA, _attention_fake), (_MASS_SCHEMA, _mass_fake), (_KEY_SCHEMA, _key_fake),
    (_STATISTICS_SCHEMA, _statistics_fake),
):  # fmt: skip
    _name = name_of(_schema)
    define(
        _schema,
        fake=_fake,
        reference=getattr(attention_reference, _name),
        triton=getattr(attention_triton, _name),
        flops=_attention_flops if _name == "region_attention" else None,
    )
    LIBRARY.impl(_name, outside_autocast(getattr(attention_cuda, _name)), "CUDA")
guards_nothing("region_attention", "cuda")  # statistics are validated before they are called
LIBRARY.impl("region_attention", outside_autocast(attention_cpu.region_attention), "CPU")
# Single kernels of csrc/, among which attention_cpu.py and attention_cuda.py choose.
for _name in ("decode_attention", "prefill_attention", "hopper_prefill"):
    define(
        renamed(_ATTENTION_SCHEMA, _name),
        fake=_attention_fake,
        reference=attention_reference.region_attention,
        flops=_attention_flops,
    )
LIBRARY.define(renamed(_MASS_SCHEMA, "selected_region_mass"))
LIBRARY.define(renamed(_KEY_SCHEMA, "selected_key_attention"))
LIBRARY.define(renamed(_STATISTICS_SCHEMA, "selected_statistics"))
