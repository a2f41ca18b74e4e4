"""Triton kernels, installed as `ras_fast.triton_kernels`. One file per kernel family."""
