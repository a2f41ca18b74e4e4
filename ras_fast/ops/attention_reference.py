"""The attention ops in plain torch: the definition that every kernel is tested against. Also what the backends share.

Shapes: B batch, Hq query heads, Hkv key/value heads, Lq, Lk lengths, D head dimension, R regions, M rows. What lies between the
arguments and the results of an op is float32, or float64 where the arguments are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def region_attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """Arguments and results of the op `ras_fast::region_attention`."""
    rows, bias = query.shape[2], key_bias(region_ids, region_bias, _accumulator(query))
    s = _masked_scores(query, key, rows, scale, is_causal, kv_start, kv_end, window, softcap, bias)
    lse = _lse(s, sinks)
    p = _normalised(_probabilities(s, lse), lse, sinks)
    # What lies outside the valid keys may be uninitialised cache: NaN there must not reach 0 · NaN.
    valid, _ = valid_keys(key, kv_start, kv_end)
    value = value.masked_fill(~valid.any(1)[:, None, :, None], 0)
    out = p @ by_query_head(value, query.shape[1], p.dtype)
    mass = query.new_zeros((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if region_ids is not None:
        mass = mass_of(p[:, :, rows - mass_rows :], region_ids, num_regions)
    return laid_out(out.to(query.dtype)), lse.float(), mass


def region_mass(
    query, key, lse, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, region_bias, mass_rows
):
    """Arguments and result of the op `ras_fast::region_mass`."""
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    return mass_of(_selected(query, key, lse, mass_rows, *masks, region_ids, region_bias), region_ids, num_regions)


def key_attention(
    query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
):
    """Arguments and result of the op `ras_fast::key_attention`."""
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    return _reduced(_selected(query, key, lse, rows, *masks, region_ids, region_bias), reduce)


def region_statistics(query, key, lse, region_ids, num_regions, rows, reduce, *masks_and_bias):
    """Arguments and results of the op `ras_fast::region_statistics`."""
    *masks, region_bias = masks_and_bias
    p = _selected(query, key, lse, rows, *masks, region_ids, region_bias)
    return mass_of(p, region_ids, num_regions), _reduced(p, reduce)


def scores(query: Tensor, key: Tensor, scale: float, softcap: float | None, bias: Tensor | None) -> Tensor:
    """[B, Hq, Lq, Lk], not masked yet. `query` and `key` are [B, Hq, L, D] in the dtype of the result, `bias` what
    :func:`key_bias` gives."""
    s = query @ key.transpose(-1, -2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s if bias is None else s + bias


def by_query_head(states: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, Hkv, L, D] as [B, Hq, L, D] in `dtype`: each query head's own keys or values."""
    return states.to(dtype).repeat_interleave(heads // states.shape[1], dim=1)


def key_bias(region_ids: Tensor | None, region_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, Hq, 1, Lk]: the bias of each key's region, 0 outside every region; None without a bias."""
    if region_bias is None:
        return None
    bias = region_bias.to(dtype).expand(region_ids.shape[0], *region_bias.shape[-2:])
    # Gathered, not multiplied by a one-hot matrix: −inf shuts a region out, and 0 · −inf is NaN.
    inside = ((region_ids >= 0) & (region_ids < bias.shape[-1]))[:, None]
    places = region_ids.clamp(0, bias.shape[-1] - 1).long()[:, None].expand(-1, bias.shape[1], -1)
    return bias.gather(2, places).masked_fill(~inside, 0)[:, :, None]


def mass_of(p: Tensor, region_ids: Tensor, num_regions: int) -> Tensor:
    """[B, Hq, M, R] float32 of probabilities [B, Hq, M, Lk]; ids outside 0..R−1 count as none."""
    one_hot = region_ids[..., None] == torch.arange(num_regions, device=region_ids.device)
    return torch.einsum("bhqk,bkr->bhqr", p, one_hot.to(p.dtype)).float()


def valid_keys(key: Tensor, kv_start: Tensor | None, kv_end: Tensor | None) -> tuple[Tensor, Tensor]:
    """([B, 1 or Lq, Lk] bool, [B, 1 or Lq, 1] int64 n_valid)."""
    batch, _, length, _ = key.shape
    position = torch.arange(length, device=key.device)
    end = torch.full((batch,), length, device=key.device) if kv_end is None else kv_end.long().clamp(max=length)
    end = _by_row(end)
    valid = position < end
    return (valid if kv_start is None else valid & (position >= _by_row(kv_start))), end


def laid_out(out: Tensor) -> Tensor:
    """[B, Hq, Lq, D] that lies in memory as [B, Lq, Hq, D], as every backend returns it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _by_row(bound: Tensor) -> Tensor:
    """[B] or [B, Lq] as [B, 1 or Lq, 1]."""
    return (bound if bound.dim() == 2 else bound[:, None])[..., None]


def _masked_scores(query, key, rows, scale, is_causal, kv_start, kv_end, window, softcap, bias) -> Tensor:
    """Scores [B, Hq, rows, Lk] of the last `rows` queries; −inf where a row does not see a key."""
    acc = _accumulator(query)
    length_q, length_k = query.shape[2], key.shape[2]
    q = query[:, :, length_q - rows :].to(acc)
    s = scores(q, by_query_head(key, query.shape[1], acc), scale, softcap, bias)
    valid, end = valid_keys(key, kv_start, kv_end)
    seen = valid.expand(-1, length_q, -1)[:, length_q - rows :]
    if is_causal:
        own = torch.arange(length_q - rows, length_q, device=key.device)[None, :, None] + (end - length_q)
        position = torch.arange(length_k, device=key.device)
        seen = seen & (position <= own)
        if window:
            seen = seen & (position > own - window)
    return s.masked_fill(~seen[:, None], -torch.inf)


def _lse(masked_scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, Hq, rows], the sinks included."""
    lse = torch.logsumexp(masked_scores, -1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))


def _probabilities(masked_scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores − lse), 0 in rows that see no key (lse = −inf)."""
    return torch.exp(masked_scores - lse.masked_fill(lse == -torch.inf, 0)[..., None].to(masked_scores.dtype))


def _normalised(p: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities that add up to 1 with the sink's also where the LSE is so large that its rounding shows in them."""
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None]
        total = total + torch.where(sink == lse, 1, torch.exp(sink - lse))[..., None]  # which may be infinite
    return torch.where(total == 0, p, p / total)


def _selected(query, key, lse, rows, scale, is_causal, kv_start, kv_end, window, softcap, region_ids, region_bias) -> Tensor:
    """Probabilities [B, Hq, rows, Lk] of the last `rows` queries."""
    bias = key_bias(region_ids, region_bias, _accumulator(query))
    s = _masked_scores(query, key, rows, scale, is_causal, kv_start, kv_end, window, softcap, bias)
    return _probabilities(s, lse[:, :, query.shape[2] - rows :])


def _reduced(p: Tensor, reduce: str) -> Tensor:
    """Probabilities over their rows; 0 where there are none."""
    if p.shape[2] == 0:
        return p.new_zeros((*p.shape[:2], p.shape[3]), dtype=torch.float32)
    return (p.amax(2) if reduce == "max" else p.mean(2) if reduce == "mean" else p.sum(2)).float()
