"""The attention ops in Triton (triton_kernels/attention.py), which is imported with its first call."""

from __future__ import annotations

from ras_fast.ops._registry import triton_kernel
from ras_fast.ops.attention_plan import are_per_row
from ras_fast.ops.attention_reference import row_by_row

region_mass = triton_kernel("attention", "region_mass")
key_attention = triton_kernel("attention", "key_attention")
region_statistics = triton_kernel("attention", "region_statistics")
_region_attention = triton_kernel("attention", "region_attention")
_explain = triton_kernel("attention", "explain")


def region_attention(query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, *rest):
    """Arguments and results of the op `ras_fast::region_attention`."""
    arguments = (query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, *rest)
    if are_per_row(kv_start, kv_end):
        return row_by_row(_region_attention, *arguments)
    return _region_attention(*arguments)


def explain(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
) -> str:  # fmt: skip
    """The configuration of a `ras_fast::region_attention` call in words."""
    if are_per_row(kv_start, kv_end):  # they go one by one
        query = query[:, :, :1]
    return _explain(query, key, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias)
