"""Where one attention kernel overtakes another: `python bench/bench_crossovers.py`. The dispatcher's rules come from here.

Every kernel that can run a shape is called by name, past the dispatcher (`ras_fast/ops/attention_plan.py`), in the same run;
"plan" is what the dispatcher would take and "loses" how much slower that is than the best. One image covers half the keys.
"""

from __future__ import annotations

import argparse
import functools

import harness
import torch

from ras_fast import ops
from ras_fast.ops import attention_cpu, attention_cuda, attention_plan, attention_reference

HEADS, KV_HEADS = 32, 8
BF16, FP32 = torch.bfloat16, torch.float32
# (query rows, keys, rows whose mass is wanted, dtype[, head dimension[, heads, kv heads]])
CPU = [(1, keys, 1, dtype) for dtype in (BF16, FP32) for keys in (8, 32, 128, 512, 2048, 8192)]
CPU += [(rows, 2048, rows, dtype) for dtype in (BF16, FP32) for rows in (16, 32)]
CPU += [(keys, keys, keys, dtype) for dtype in (BF16, FP32) for keys in (8, 32, 128, 512, 1024)]
CPU += [
    (rows, keys, rows, dtype, *heads)
    for dtype in (BF16, FP32) for heads in ((128, 32, 8), (128, 32, 32), (64, 16, 16))
    for keys in (64, 640, 2048) for rows in (2, 4, 8)
]  # fmt: skip
GPU = [(rows, 4096, rows, BF16) for rows in (1, 2, 4, 8, 16, 32, 64)]  # times 4 heads a group: packed rows
GPU += [(2048, 2048, rows, BF16) for rows in (1, 32, 128, 256, 512, 1024, 2048)]
GPU += [(n, n, rows, BF16, dim) for dim in (64, 96, 128) for n in (512, 1024, 4096, 8192) for rows in (1, 64, n)]


def kernels(query, key, value, ids, rows: int) -> dict:
    masks = (query.shape[3] ** -0.5, True, None, None, 0, 0.0, None, None)
    call = (query, key, value, ids, 1, *masks, rows)
    square_or_row = query.shape[2] in (1, key.shape[2])
    if not query.is_cuda:
        found = {"prefill": torch.ops.ras_fast.prefill_attention, "softmax": attention_reference.region_attention}
        if square_or_row and key.shape[2] >= attention_plan.MIN_FLASH_KEYS:
            found["flash"] = flash
        if query.shape[2] <= 32:
            found["decode"] = torch.ops.ras_fast.decode_attention
    else:
        found = {"triton": torch.ops.ras_fast.region_attention_triton}
        if query.shape[2] * query.shape[1] // key.shape[1] <= 256:
            found["decode"] = torch.ops.ras_fast.decode_attention
        if square_or_row:
            found["flash"] = flash
        if query.shape[2] > 1 and not attention_plan.hopper_refuses(query, key, value, attention_plan.Case()):
            found["hopper"] = torch.ops.ras_fast.hopper_prefill
    return {name: functools.partial(kernel, *call) for name, kernel in found.items()}


def flash(query, key, value, ids, regions, scale, causal, *rest):
    """torch's flash attention, then the masses of the wanted rows from its LSE."""
    causal = causal and query.shape[2] > 1
    out, lse = (attention_cuda if query.is_cuda else attention_cpu).flash(query, key, value, causal, scale)
    masks, rows = rest[:4], rest[-1]
    return out, lse, torch.ops.ras_fast.region_mass(query, key, lse, ids, regions, scale, causal, *masks, None, rows)


def measure(length_q, length_k, rows, dtype, dim=128, heads=HEADS, kv_heads=KV_HEADS) -> dict[str, object]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.randn(1, length_q, heads, dim, device=device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, kv_heads, length_k, dim, device=device).to(dtype) for _ in range(2))
    ids = torch.full((1, length_k), -1, dtype=torch.int32, device=device)
    ids[:, : length_k // 2] = 0
    times = harness.compare(kernels(query, key, value, ids, rows), seconds=0.2 if query.is_cuda else 0.5, graph=query.is_cuda)
    plan = ops.explain(query, key, value, ids, 1, mass_rows=rows).kernel
    row = {"dtype": str(dtype)[6:], "Hq": heads, "Hkv": kv_heads, "Lq": length_q, "Lk": length_k, "D": dim, "rows": rows}
    columns = ("decode", "prefill", "flash", "softmax", "triton", "hopper")
    row |= {f"{name} µs": times[name] * 1e6 if name in times else None for name in columns}
    return row | {"plan": plan, "loses": times[plan] / min(times.values()) - 1 if plan in times else None}


def measure_scores(rows: int) -> dict[str, object]:
    """Scores of 4096 keys from the last rows of a prompt, and masses with them, by each of the two kernels."""
    query = torch.randn(1, 4096, HEADS, 128, device="cuda").to(BF16).transpose(1, 2)
    key = torch.randn(1, KV_HEADS, 4096, 128, device="cuda").to(BF16)
    lse = torch.full(query.shape[:3], 9.0, device="cuda")
    ids = (torch.arange(4096, device="cuda", dtype=torch.int32) // 2048 - 1)[None]
    masks = (128**-0.5, True, None, None, 0, 0.0, None)
    native = torch.ops.ras_fast
    calls = {
        "cuda": functools.partial(native.selected_key_attention, query, key, lse, rows, "mean", None, *masks),
        "triton": functools.partial(native.key_attention_triton, query, key, lse, rows, "mean", None, *masks),
        "cuda, masses": functools.partial(native.selected_statistics, query, key, lse, ids, 1, rows, "mean", *masks),
        "triton, masses": functools.partial(native.region_statistics_triton, query, key, lse, ids, 1, rows, "mean", *masks),
    }
    times = harness.compare(calls, seconds=0.5, graph=True)
    row = {"scored rows": rows} | {f"{name} µs": times[name] * 1e6 for name in calls}
    return row | {"plan": attention_plan.plan_statistics(query, key, False, rows)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    on_gpu = torch.cuda.is_available()
    tables = {"crossovers": (measure, GPU if on_gpu else CPU)}
    if on_gpu:
        tables["crossovers_scores"] = (measure_scores, [(rows,) for rows in (1, 4, 16, 32, 64, 128, 512, 4096)])
    for name, (measure_one, shapes) in tables.items():
        rows = []
        for shape in shapes:
            rows.append(measure_one(*shape))
            path = harness.save(name, rows)
        print(harness.table(rows))
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
