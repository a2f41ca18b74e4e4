"""The attention ops in Triton (triton_kernels/attention.py), which is imported with its first call."""

from __future__ import annotations

from ras_fast.ops._registry import triton_kernel

region_attention = triton_kernel("attention", "region_attention")
region_mass = triton_kernel("attention", "region_mass")
key_attention = triton_kernel("attention", "key_attention")
region_statistics = triton_kernel("attention", "region_statistics")
explain = triton_kernel("attention", "explain")
