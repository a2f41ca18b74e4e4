"""Every CUDA kernel once on small shapes: what bench/gpu.sh runs under compute-sanitizer.

    python tests/cuda/small_shapes.py [FAMILY…]

Checks nothing itself beyond finite outputs. A kernel family that is not built is named and skipped.
"""

import sys

import torch

import ras_fast
from ras_fast import backend, ops


def rand(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def norm():
    slot = torch.tensor([-1, 0, 1], dtype=torch.int32, device="cuda").repeat(100)
    alpha = torch.full((300,), 0.5, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, d in ((2, 256), (3, 769), (3, 1024), (2, 4096), (300, 512), (270, 2048), (2, 8200), (2, 16392)):
            x, residual = rand(rows, d, dtype=dtype), rand(rows, d, dtype=dtype)
            weight, bias = rand(d, dtype=dtype), rand(d, dtype=dtype)
            steer = {"steer_vectors": rand(2, d, dtype=dtype), "steer_slot": slot[:rows], "steer_alpha": alpha[:rows]}
            probes = rand(2, d, dtype=dtype)
            yield ops.add_rms_norm(x, residual, weight, 1e-6)
            yield ops.add_rms_norm(x, residual, weight, 1e-6, probes=probes, **steer)
            yield ops.add_rms_norm(x, residual, weight, 1e-6, x_scale=0.22)
            yield ops.add_rms_norm(x, residual, weight, 1e-6, x_weight=bias)
            yield ops.add_rms_norm(x, None, weight, 1e-6, probes=probes, x_weight=bias, scale=rand(1, dtype=dtype), **steer)
            yield ops.add_layer_norm(x, residual, weight, bias, 1e-6, probes=probes, steer_mode="lerp", **steer)
            yield ops.add_rms_norm_(x.clone(), residual.clone(), weight, 1e-6, probes=probes, **steer)
            yield ops.add_layer_norm(x[:, 1:], None, weight[1:], None, 1e-6)


def ends_of_rows(rows, keys):
    return torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device="cuda").repeat(2, 1)


def attention():
    for dtype in (torch.float16, torch.bfloat16):
        for rows, keys, head_dim in ((65, 65, 64), (130, 200, 128), (1, 300, 128)):
            query = rand(2, 4, rows, head_dim, dtype=dtype)
            key, value = rand(2, 2, keys, head_dim, dtype=dtype), rand(2, 2, keys, head_dim, dtype=dtype)
            ids = (torch.arange(keys, device="cuda", dtype=torch.int32) // 40 - 1).clamp(max=3).expand(2, keys).contiguous()
            start = torch.tensor([0, 7], dtype=torch.int32, device="cuda")
            out, lse, mass = ops.region_attention(query, key, value, ids, 4, kv_start=start)
            yield out, lse, mass
            yield (ops.region_mass(query, key, lse, ids, 4, kv_start=start),)
            own = {"is_causal": False, "kv_start": start[:, None].repeat(1, rows), "kv_end": ends_of_rows(rows, keys)}
            out, lse, mass = ops.region_attention(query, key, value, ids, 4, **own)
            yield out, lse, mass, *ops.region_statistics(query, key, lse, ids, 4, **own)
            for scored in (1, min(rows, 40)):
                yield (ops.key_attention(query, key, lse, rows=scored, kv_start=start),)
                yield ops.region_statistics(query, key, lse, ids, 4, rows=scored, kv_start=start)
        two = torch.tensor([[40, 0], [7, 200]], dtype=torch.int32, device="cuda")
        yield ops.region_attention(rand(2, 4, 2, 128, dtype=dtype), key, value, ids, 4, is_causal=False, kv_start=two)


def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for dtype in (torch.float16, torch.bfloat16):
        # The last two: blocks that walk several tiles, of two and of three consumers.
        for rows, keys, head_dim, regions, heads in ((130, 300, 64, 4, 2), (130, 130, 128, 0, 2), (70, 300, 128, 4, 2),
                                                     (130, 300, 256, 4, 2), (130, 150, 128, 4, 100),
                                                     (130, 150, 64, 4, 300)):  # fmt: skip
            query = rand(2, heads, rows, head_dim, dtype=dtype)
            key, value = rand(2, 1, keys, head_dim, dtype=dtype), rand(2, 1, keys, head_dim, dtype=dtype)
            ids = torch.arange(keys, device="cuda", dtype=torch.int32) // 90 - 1
            ids = ids.clamp(max=3).expand(2, keys).contiguous() if regions else None
            masks = (0.1, True, None, None, 0, 0.0, None, None)
            yield torch.ops.ras_fast.hopper_prefill(query, key, value, ids, regions, *masks, rows if regions else 0)


def rotary():
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, length, dim, rotated in ((4, 2, 3, 64, 64), (40, 8, 1, 128, 128), (3, 1, 5, 72, 30)):
            query, key = rand(2, length, heads, dim, dtype=dtype), rand(2, length, kv_heads, dim, dtype=dtype)
            heads_first = query.transpose(1, 2), key.transpose(1, 2)
            for table in (rand(2, length, rotated, dtype=dtype), rand(2, length, rotated, dtype=torch.float32)):
                for interleaved in (False, True):
                    yield ops.rotary_embedding(*heads_first, table, table, interleaved=interleaved)


def cache():
    for dtype in (torch.float32, torch.bfloat16):
        for heads, tokens, dim in ((2, 3, 64), (40, 1, 128), (3, 5, 7)):
            new = rand(2, 2, tokens, heads, dim, dtype=dtype).transpose(2, 3)
            held = torch.zeros(2, 2, heads, 9, dim, dtype=dtype, device="cuda")
            slots = torch.arange(2 * tokens, device="cuda").view(2, tokens) % 9
            ops.write_cache_(held[0], held[1], slots, new[0], new[1])
            yield (held,)


def linear():
    for dtype in (torch.float16, torch.bfloat16):
        for rows, inputs, outputs in ((1, 8, 1), (3, 1544, 40), (16, 1024, 33), (5, 127, 20), (5, 256, 9000), (16, 256, 4000)):
            x, weight = rand(rows, inputs, dtype=dtype), rand(outputs, inputs, dtype=dtype)
            yield ops.linear(x, weight, rand(outputs, dtype=dtype))
            yield from ops.linears(x, [weight, weight[: outputs // 2 + 1]], [None, None])
            yield ops.linear_glu(x, weight, rand(outputs, inputs, dtype=dtype))


# Each with an op that only it has a CUDA kernel of.
FAMILIES = {
    "norm": (norm, "add_rms_norm"), "attention": (attention, "decode_attention"), "hopper": (hopper, "hopper_prefill"),
    "rotary": (rotary, "rotary_embedding"), "linear": (linear, "linear"), "cache": (cache, "write_cache_"),
}  # fmt: skip


def main():
    ras_fast.set_backend("cuda")
    for name in sys.argv[1:] or FAMILIES:
        family, op = FAMILIES[name]
        if not backend.has_kernel(op, "cuda"):
            print(f"{name}: no CUDA kernel is built")
            continue
        calls = 0
        for outputs in family():
            torch.cuda.synchronize()
            assert all(output is None or not output.isnan().any() for output in outputs), name
            calls += 1
        print(f"{name}: {calls} calls", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
