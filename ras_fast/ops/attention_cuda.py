"""Which kernel runs an attention op on a CUDA device, and why.

Few rows over a long cache: the CUDA decode kernel, bound by reading the cache once. Masses of few of many rows: flash
attention that leaves its LSE, then those rows against the regions' keys alone. Masses of many rows: the Triton kernel that
has them from its own row sums. The thresholds are derived from operation counts (docs/kernels.md), not yet measured.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from ras_fast import backend
from ras_fast.ops import attention
from ras_fast.ops._registry import LIBRARY

DECODE_ROWS = 64  # packed rows of a key/value head up to which one pass over the cache costs what reading it costs
FEW_ROWS = 8  # recomputing Q Kᵀ of 1/8 of the rows adds 1/16 of attention's operations


class Plan(NamedTuple):
    """The kernel that runs a call, "cuda", "flash", "triton" or "torch", and the reason in words."""

    kernel: str
    why: str


def fits_cuda_kernels(*tensors: Tensor) -> str:
    """Why the CUDA C++ kernels cannot take these [B, H, L, D] tensors; "" if they can."""
    if not backend.backends()["cuda"].available:
        return str(backend.backends()["cuda"])
    for tensor in tensors:
        dim, itemsize = tensor.shape[-1], tensor.element_size()
        if itemsize != 2:
            return f"they take float16 and bfloat16, not {tensor.dtype}"
        if dim % 8 or dim > 256:
            return f"they take head dimensions in whole eights up to 256, not {dim}"
        if tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:-1]):
            return "they load 16 bytes at a time, and a row does not begin at a multiple of 16 bytes"
    return ""


def plan_attention(
    query: Tensor, key: Tensor, value: Tensor, num_regions: int, mass_rows: int, *, is_causal: bool = True, plain: bool = True
) -> Plan:
    """The plan of a `region_attention` call. `plain`: no bounds, window, softcap, sinks or bias, so that any flash
    attention gives the same result.
    """
    length_q, length_k = query.shape[2], key.shape[2]
    packed = length_q * query.shape[1] // key.shape[1]
    why_not = fits_cuda_kernels(query, key, value)
    if packed <= DECODE_ROWS and not why_not:
        return Plan("cuda", f"{packed} packed rows (at most {DECODE_ROWS}): one read of the cache decides")
    few = num_regions == 0 or mass_rows * FEW_ROWS <= length_q
    square = not is_causal or length_q == length_k
    if plain and few and square and query.element_size() == 2 and query.shape[3] % 8 == 0 and query.shape[3] <= 256:
        return Plan("flash", f"masses of {mass_rows} of {length_q} rows: recomputing them from the LSE is the lesser work")
    if importlib.util.find_spec("triton") is None:
        return Plan("torch", "Triton is not installed")
    reasons = ["masses of many rows" if not few else "masks that flash attention lacks"]
    if packed <= DECODE_ROWS:
        reasons.append(f"the CUDA kernels are out: {why_not}")
    return Plan("triton", "; ".join(reasons))


def _attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    masks = (scale, is_causal, kv_start, kv_end, window, softcap)
    arguments = (query, key, value, region_ids, num_regions, *masks, sinks, region_bias, mass_rows)
    plain = not (window or softcap) and all(option is None for option in (kv_start, kv_end, sinks, region_bias))
    kernel, _ = plan_attention(query, key, value, num_regions, mass_rows, is_causal=is_causal, plain=plain)
    if query.numel() == 0 or key.shape[2] == 0 or kernel == "torch":
        return attention._attention_reference(*arguments)
    if kernel == "cuda":
        return torch.ops.ras_fast.decode_attention(*arguments)
    if kernel == "triton":
        return attention._attention_triton(*arguments)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]
    mass = query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if mass.numel():
        mass = _mass(query, key, lse, region_ids, num_regions, *masks, region_bias, mass_rows)
    return out.contiguous(), lse, mass


def _mass(query, key, lse, region_ids, num_regions, *rest):
    kernel = attention._mass_triton if fits_cuda_kernels(query, key) else torch.ops.ras_fast.selected_region_mass
    return kernel(query, key, lse, region_ids, num_regions, *rest)


LIBRARY.define(f"selected_region_mass({attention._MASS_SCHEMA.split('(', 1)[1]}")
LIBRARY.impl("region_attention", _attention, "CUDA")
LIBRARY.impl("region_mass", _mass, "CUDA")
LIBRARY.impl("key_attention", attention._key_triton, "CUDA")
