"""The attention ops on CUDA: carries out what attention_plan.py decides."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

from ras_fast.ops import attention_reference, attention_triton
from ras_fast.ops.attention_plan import are_per_row, case_of, plan_cuda, plan_statistics

_STATISTICS = {"triton": attention_triton, "torch": attention_reference}  # where the functions below are, by backend


def region_attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """Arguments and results of the op `ras_fast::region_attention`."""
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    arguments = (query, key, value, region_ids, num_regions, *masks, sinks, region_bias, mass_rows)
    kernel = plan_cuda(query, key, value, case_of(*arguments[3:])).kernel
    if kernel == "torch":
        return attention_reference.region_attention(*arguments)
    if kernel == "decode":
        return torch.ops.ras_fast.decode_attention(*arguments)
    if kernel == "hopper":
        return torch.ops.ras_fast.hopper_prefill(*arguments)
    if kernel == "triton":
        return attention_triton.region_attention(*arguments)
    out, lse = flash(query, key, value, is_causal, scale)
    mass = query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if mass.numel():
        mass = region_mass(query, key, lse, region_ids, num_regions, *masks, region_bias, mass_rows)
    return attention_reference.laid_out(out), lse, mass


def flash(query, key, value, is_causal, scale=None):
    """(out, lse [B, Hq, Lq]) of torch's attention: cuDNN's where torch prefers it (sm_90, sm_100), else flash attention, which
    is FlashAttention 3 or 4 where the user has activated that (`torch.nn.attention.activate_flash_attention_impl`)."""
    aten = torch.ops.aten
    preferred = torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=True)
    if preferred == SDPBackend.CUDNN_ATTENTION.value and not _activated_flash_attention():
        out, lse = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]
    lse = lse.reshape(query.shape[:3])  # cuDNN's is [B, Hq, Lq, 1]
    # Flash attention says +inf where a row's sum is NaN. Masses computed from that would be 0, an image unseen.
    return out, torch.nan_to_num(lse, nan=torch.nan, posinf=torch.nan, neginf=-torch.inf)


def _activated_flash_attention() -> str | None:
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # from torch 2.11 on
    return current() if current else None


def region_mass(query, key, lse, region_ids, num_regions, scale, is_causal, kv_start, kv_end, *rest):
    """Arguments and result of the op `ras_fast::region_mass`."""
    backend = plan_statistics(query, key, are_per_row(kv_start, kv_end))
    kernel = torch.ops.ras_fast.selected_region_mass if backend == "cuda" else _STATISTICS[backend].region_mass
    return kernel(query, key, lse, region_ids, num_regions, scale, is_causal, kv_start, kv_end, *rest)


def key_attention(query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, *rest):
    """Arguments and result of the op `ras_fast::key_attention`."""
    backend = plan_statistics(query, key, are_per_row(kv_start, kv_end), rows)
    kernel = torch.ops.ras_fast.selected_key_attention if backend == "cuda" else _STATISTICS[backend].key_attention
    return kernel(query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, *rest)


def region_statistics(query, key, lse, region_ids, num_regions, rows, reduce, scale, is_causal, kv_start, kv_end, *rest):
    """Arguments and results of the op `ras_fast::region_statistics`."""
    backend = plan_statistics(query, key, are_per_row(kv_start, kv_end), rows)
    kernel = torch.ops.ras_fast.selected_statistics if backend == "cuda" else _STATISTICS[backend].region_statistics
    return kernel(query, key, lse, region_ids, num_regions, rows, reduce, scale, is_causal, kv_start, kv_end, *rest)
