"""Attention outside of the text model, as of vision towers: SDPA's, by this package's kernel where that is faster."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ras_fast import ops
from ras_fast.ops.attention_plan import beats_flash_on_cpu
from ras_fast.patching.report import Report
from ras_fast.patching.undo import Undo
from ras_fast.registration import TOWER, register

# Keyword arguments that SDPA's function obeys or refuses.
_OF_SDPA = ("position_bias", "softcap")


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
) -> tuple[Tensor, None]:
    """What transformers' function for SDPA gives, within rounding: every patch sees every other, in half precision and on a CPU
    by this package's kernel; whatever else by that function itself.

    Args:
        query: [B, Hq, Lq, D]; key, value: [B, Hkv, Lk, D].

    Returns:
        out: [B, Lq, Hq, D]; None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    obeys_more = dropout or causal or any(kwargs.get(name) is not None for name in _OF_SDPA)
    if attention_mask is None and not obeys_more and _is_faster(query, key, value):
        return ops.region_attention(query, key, value, scale=scaling, is_causal=False)[0].transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these, and faster than SDPA (docs/kernels.md). A vision tower may be asked for gradients."""
    tensors = query, key, value
    halves = query.dtype in (torch.bfloat16, torch.float16) and query.dtype == key.dtype == value.dtype
    rows = key.shape == value.shape and all(tensor.stride(-1) == 1 for tensor in tensors)
    if not halves or not rows or query.device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) and beats_flash_on_cpu(query, key)


def speed_up_towers(root: nn.Module, text_model: nn.Module, undo: Undo, report: Report) -> None:
    """Has the attention modules on a CPU that are outside of the text model, and go by SDPA, go by `attention`."""
    own = {id(module) for module in text_model.modules()}
    others = [module for module in root.modules() if id(module) not in own and _goes_by_sdpa(module, text_model.config)]
    if others:
        register()
    for config in {id(module.config): module.config for module in others}.values():
        undo.set(config, "_attn_implementation_internal", TOWER)
    report.tower_attentions = len(others)


def _goes_by_sdpa(module: nn.Module, text_config: Any) -> bool:
    """Whether it looks up in transformers' attention interface what its config names, and that is SDPA."""
    config = getattr(module, "config", None)
    if config is text_config or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    device = next((parameter.device.type for parameter in module.parameters()), None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and device == "cpu"
