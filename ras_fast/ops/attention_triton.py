"""The attention ops in Triton (triton_kernels/attention.py), which is imported with its first call."""

from __future__ import annotations

from ras_fast.ops._registry import triton_kernel

region_attention = triton_kernel("attention", "region_attention")
region_mass = triton_kernel("attention", "region_mass")
key_attention = triton_kernel("attention", "key_attention")
region_statistics = triton_kernel("attention", "region_statistics")
_explain = triton_kernel("attention", "explain")


def explain(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
) -> str:  # fmt: skip
    """The configuration of a `ras_fast::region_attention` call in words."""
    return _explain(query, key, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias)
