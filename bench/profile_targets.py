"""Each GPU kernel family at one large and one decode shape, for a profiler to look at (bench/gpu.sh runs it under ncu).

    python bench/profile_targets.py [FAMILY…]
"""

import sys

import torch

from ras_fast import ops

MASKS = (128**-0.5, True, None, None, 0, 0.0, None, None)


def rand(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def norm():
    for tokens, d in ((8192, 4096), (4096, 16384), (8, 4096)):
        x, residual, weight = rand(tokens, d), rand(tokens, d), rand(d)
        steer = {
            "steer_vectors": rand(2, d),
            "steer_slot": torch.ones(tokens, dtype=torch.int32, device="cuda"),
            "steer_alpha": torch.full((tokens,), 0.5, device="cuda"),
        }
        ops.add_rms_norm(x, residual, weight, 1e-6)
        ops.add_rms_norm(x, residual, weight, 1e-6, **steer)


def states(batch, rows, keys):
    query, key, value = rand(batch, 32, rows, 128), rand(batch, 8, keys, 128), rand(batch, 8, keys, 128)
    ids = (torch.arange(keys, device="cuda", dtype=torch.int32) // 256 - 1).clamp(max=7).expand(batch, keys).contiguous()
    return query, key, value, ids, 8


def attention():
    for batch, rows, keys in ((1, 4096, 4096), (8, 1, 4096)):
        query, key, value, ids, regions = states(batch, rows, keys)
        _, lse, _ = ops.region_attention(query, key, value, ids, regions)
        ops.region_mass(query, key, lse, ids, regions, mass_rows=min(rows, 64))
        ops.key_attention(query, key, lse)
        ops.region_statistics(query, key, lse, ids, regions, rows=min(rows, 64))
        torch.ops.ras_fast.region_attention_triton(query, key, value, ids, regions, *MASKS, rows)


def hopper():
    torch.ops.ras_fast.hopper_prefill(*states(1, 4096, 4096), *MASKS, 4096)


def rotary():
    for rows in (4096, 2):
        query, key = (rand(1, rows, heads, 128).transpose(1, 2) for heads in (32, 8))
        ops.rotary_embedding(query, key, *rand(2, 1, rows, 128))


def linear():
    for rows, outputs in ((2, 4096), (2, 11008), (16, 4096)):
        ops.linear(rand(rows, 4096), rand(outputs, 4096))


def cache():
    keys, values = torch.zeros(2, 1, 32, 1024, 128, device="cuda", dtype=torch.bfloat16)
    for tokens in (2, 640):
        new = rand(2, 1, tokens, 32, 128).transpose(2, 3)
        ops.write_cache_(keys, values, torch.arange(tokens, device="cuda")[None], new[0], new[1])


FAMILIES = {"norm": norm, "attention": attention, "rotary": rotary, "linear": linear, "cache": cache, "hopper": hopper}

if __name__ == "__main__":
    with torch.no_grad():
        for family in sys.argv[1:] or FAMILIES:
            FAMILIES[family]()
            torch.cuda.synchronize()
