"""Steered residual + norm beside its peers: `python bench/bench_norm.py [--quick | --shape T,d ...]`.

Every candidate of a row gets the same tensors in the same run ("in place", as FlashInfer, copies of its own). A "sandwich"
first puts x through a norm of its own, in the same call or, "two calls", before it. GB/s counts the bytes that must move: x
and residual in, h and y out. "share" is that bandwidth over a plain copy's, measured in the same run; on a CPU small shapes
stay in the caches and the share may exceed 1. On a GPU a row is timed as eager calls or as a replayed CUDA graph; "empty" is
a kernel without work.
"""

from __future__ import annotations

import baselines
import harness
import torch

from ras_fast import ops

WIDTHS = (768, 4096, 5120, 8192, 16384)
TOKENS = (1, 8, 64, 512, 8192)
QUICK = [(1, 4096), (1024, 4096)]
OURS = ("ras_fast", "steer no row", "steer all", "in place", "sandwich", "sandwich, two calls")


def case(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[dict, int, dict]:
    tokens, width = shape
    return {"T": tokens, "d": width}, 4 * tokens * width, candidates(tokens, width, dtype, device)


def candidates(tokens: int, width: int, dtype: torch.dtype, device: str) -> dict:
    x, residual = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    own_x, own_residual = x.clone(), residual.clone()
    weight = torch.randn(width, device=device).to(dtype)
    vectors = torch.randn(2, width, device=device).to(dtype)
    alpha = torch.full((tokens,), 0.5, device=device)

    def two_calls():
        normed, _, _ = ops.add_rms_norm(x, None, weight, 1e-6)
        return ops.add_rms_norm(normed, residual, weight, 1e-6)

    def steered(slot: int):
        steering = {
            "steer_vectors": vectors,
            "steer_slot": torch.full((tokens,), slot, dtype=torch.int32, device=device),
            "steer_alpha": alpha,
        }
        return lambda: ops.add_rms_norm(x, residual, weight, 1e-6, **steering)

    ours = {
        "ras_fast": lambda: ops.add_rms_norm(x, residual, weight, 1e-6),
        "steer no row": steered(-1),
        "steer all": steered(1),
        "in place": lambda: ops.add_rms_norm_(own_x, own_residual, weight, 1e-6),
        "sandwich": lambda: ops.add_rms_norm(x, residual, weight, 1e-6, x_weight=weight),
        "sandwich, two calls": two_calls,
    }
    if x.is_cuda:
        ours["empty"] = lambda: torch.cuda._sleep(0)
    return ours | {"clone": x.clone} | baselines.norm_peers(x, residual, weight, 1e-6)


if __name__ == "__main__":
    with torch.no_grad():
        shapes = [(tokens, width) for width in WIDTHS for tokens in TOKENS]
        harness.bound_by_memory(__doc__, "norm", "T,d", shapes, QUICK, case, ours=OURS)
