"""The attention ops on the CPU: carries out what attention_plan.py decides."""

from __future__ import annotations

import torch

from ras_fast.ops import attention_reference
from ras_fast.ops.attention_plan import case_of, plan_cpu_prefill

CHUNK_ROWS = 256  # that go together where no kernel is built


def region_attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """Arguments and results of the op `ras_fast::region_attention`."""
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    arguments = (query, key, value, region_ids, num_regions, *masks, sinks, region_bias, mass_rows)
    kernel = plan_cpu_prefill(query, key, value, case_of(*arguments[3:])).kernel
    if kernel == "prefill":
        return torch.ops.ras_fast.prefill_attention(*arguments)
    if kernel == "softmax":
        return by_chunks_of_rows(*arguments)
    out, lse = flash(query, key, value, is_causal, scale)
    mass = query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if mass.numel():
        mass = torch.ops.ras_fast.region_mass(query, key, lse, region_ids, num_regions, *masks, region_bias, mass_rows)
    return attention_reference.laid_out(out), lse, mass


def flash(query, key, value, is_causal, scale=None):
    """(out, lse [B, Hq, Lq]) of torch's flash attention."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse.float().contiguous()  # aten's lies in memory as [B, Lq, Hq]


def by_chunks_of_rows(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """The reference for a chunk of rows after another, so that its memory is linear in the number of keys."""
    rows, parts = query.shape[2], []
    _, end = attention_reference.valid_keys(key, kv_start, kv_end)
    for first in range(0, max(rows, 1), CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, rows)
        # Under a causal mask the chunk's last row is to see the keys up to its own.
        chunk_end = (end[:, 0, 0] - (rows - last)).clamp(min=0) if is_causal else _of_rows(kv_end, first, last)
        masks = (scale, is_causal, _of_rows(kv_start, first, last), chunk_end, window, softcap, sinks, region_bias)
        weighed = min(max(last - rows + mass_rows, 0), last - first)
        part = (query[:, :, first:last], key, value, region_ids, num_regions, *masks, weighed)
        parts.append(attention_reference.region_attention(*part))
    out, lse, mass = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return attention_reference.laid_out(out), lse, mass


def _of_rows(bound, first: int, last: int):
    """The bound of these rows: [B], shared by all, or theirs of [B, Lq]."""
    return bound if bound is None or bound.dim() == 1 else bound[:, first:last]
