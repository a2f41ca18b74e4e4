"""The attention ops on CUDA: carries out what attention_plan.py decides."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

from ras_fast.ops import attention
from ras_fast.ops._registry import LIBRARY
from ras_fast.ops.attention_plan import plan_cuda, plan_statistics


def _attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    arguments = (query, key, value, region_ids, num_regions, *masks, sinks, region_bias, mass_rows)
    kernel = plan_cuda(query, key, value, attention.case_of(*arguments[3:])).kernel
    if kernel == "torch":
        return attention._attention_reference(*arguments)
    if kernel == "decode":
        return torch.ops.ras_fast.decode_attention(*arguments)
    if kernel == "hopper":
        return torch.ops.ras_fast.hopper_prefill(*arguments)
    if kernel == "triton":
        return attention._attention_triton(*arguments)
    out, lse = flash(query, key, value, is_causal, scale)
    mass = query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if mass.numel():
        mass = _mass(query, key, lse, region_ids, num_regions, *masks, region_bias, mass_rows)
    return attention._laid_out(out), lse, mass


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


# Statistics of selected rows, by backend.
_MASS = {"triton": attention._mass_triton, "torch": attention._mass_reference}
_KEY = {"triton": attention._key_triton, "torch": attention._key_reference}
_STATISTICS = {"triton": attention._statistics_triton, "torch": attention._statistics_reference}


def _mass(query, key, *rest):
    return _MASS[plan_statistics(query, key)](query, key, *rest)


def _key(query, key, lse, rows, *rest):
    return _KEY[plan_statistics(query, key, rows)](query, key, lse, rows, *rest)


def _statistics(query, key, lse, region_ids, num_regions, rows, *rest):
    return _STATISTICS[plan_statistics(query, key, rows)](query, key, lse, region_ids, num_regions, rows, *rest)


for _name, _schema, _kernels in (
    ("selected_region_mass", attention._MASS_SCHEMA, _MASS),
    ("selected_key_attention", attention._KEY_SCHEMA, _KEY),
    ("selected_statistics", attention._STATISTICS_SCHEMA, _STATISTICS),
):
    LIBRARY.define(f"{_name}({_schema.split('(', 1)[1]}")
    _kernels["cuda"] = getattr(torch.ops.ras_fast, _name)
LIBRARY.impl("region_attention", _attention, "CUDA")
LIBRARY.impl("region_mass", _mass, "CUDA")
LIBRARY.impl("key_attention", _key, "CUDA")
LIBRARY.impl("region_statistics", _statistics, "CUDA")
