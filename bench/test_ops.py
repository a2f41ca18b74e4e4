"""pytest-benchmark microbenchmarks of each op, to compare one commit with another:

    pytest bench/test_ops.py --benchmark-autosave
    pytest bench/test_ops.py --benchmark-compare

Against peers, interleaved in one run: bench_norm.py, bench_attention.py, bench_engine.py.
"""

import pytest
import torch
from transformers.activations import ACT2FN

from ras_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def measure(benchmark):
    def run(call):
        def synchronised():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        with torch.no_grad():
            benchmark.pedantic(synchronised, rounds=30, warmup_rounds=5)

    return run


def normal(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("tokens", [1, 1024])
def test_add_rms_norm(measure, tokens, steered):
    x, residual, weight = normal(tokens, 4096), normal(tokens, 4096), normal(4096)
    steering = {
        "steer_vectors": normal(2, 4096),
        "steer_slot": torch.zeros(tokens, dtype=torch.int32, device=DEVICE),
        "steer_alpha": torch.ones(tokens, device=DEVICE),
    }
    kwargs = steering if steered else {}
    measure(lambda: ops.add_rms_norm(x, residual, weight, 1e-6, **kwargs))


@pytest.mark.parametrize("tokens", [1, 1024])
def test_rotary_embedding(measure, tokens):
    query, key = (normal(1, tokens, heads, 128).transpose(1, 2) for heads in (32, 8))
    cos, sin = normal(2, 1, tokens, 128)
    measure(lambda: ops.rotary_embedding(query, key, cos, sin))


@pytest.mark.parametrize(("rows", "keys"), [(1024, 1024), (1, 2048)], ids=["prefill", "decode"])
def test_region_attention(measure, rows, keys):
    query, key, value = normal(1, 32, rows, 128), normal(1, 8, keys, 128), normal(1, 8, keys, 128)
    ids = torch.full((1, keys), -1, dtype=torch.int32, device=DEVICE)
    ids[:, 35:611] = 0
    measure(lambda: ops.region_attention(query, key, value, ids, 1, mass_rows=min(64, rows)))


@pytest.mark.parametrize("statistic", ["region_mass", "key_attention", "region_statistics"])
def test_statistics_from_an_lse(measure, statistic):
    query, key = normal(1, 32, 1024, 128), normal(1, 8, 1024, 128)
    lse = torch.full((1, 32, 1024), 7.0, device=DEVICE)
    ids = torch.full((1, 1024), -1, dtype=torch.int32, device=DEVICE)
    ids[:, 35:611] = 0
    measure(
        {
            "region_mass": lambda: ops.region_mass(query, key, lse, ids, 1, mass_rows=64),
            "key_attention": lambda: ops.key_attention(query, key, lse, rows=64),
            "region_statistics": lambda: ops.region_statistics(query, key, lse, ids, 1, rows=64),
        }[statistic]
    )


@pytest.mark.parametrize("layout", ["image", "boxes", "scattered", "frames"])
def test_region_mass_by_layout(measure, layout):
    """576 image keys as one region, as 3×3 boxes of a 24×24 grid, as nine regions at random, as 288 frames of two keys."""
    query, key = normal(1, 32, 1024, 128), normal(1, 8, 1024, 128)
    lse, place = torch.full((1, 32, 1024), 7.0, device=DEVICE), torch.arange(576)
    layouts = {
        "image": (place * 0, 1),
        "boxes": (place // 24 // 8 * 3 + place % 24 // 8, 9),
        "scattered": (torch.randint(0, 9, (576,)), 9),
        "frames": (place // 2, 288),
    }
    ids = torch.full((1, 1024), -1, dtype=torch.int32)
    ids[:, 35:611], regions = layouts[layout]
    ids = ids.to(DEVICE)
    measure(lambda: ops.region_mass(query, key, lse, ids, regions, mass_rows=64))


@pytest.mark.parametrize("by", ["write_cache_", "index_copy_"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (8, 2), (32, 1), (1, 600)])
def test_write_cache(measure, batch, tokens, by):
    """Beside torch's copies, which go row by row."""
    cache, new = torch.zeros(2, batch, 16, 1024, 64, device=DEVICE).bfloat16(), normal(2, batch, tokens, 16, 64).transpose(2, 3)
    slots = torch.arange(tokens, device=DEVICE).expand(batch, -1).contiguous()

    def copies():
        for held, states in zip(cache.flatten(0, 1), new.flatten(0, 1), strict=True):
            held.index_copy_(1, slots[0], states)

    measure(copies if by == "index_copy_" else lambda: ops.write_cache_(*cache, slots, *new))


@pytest.mark.parametrize("laid_out_by", ["rows", "channels"])
def test_states_of_a_tower(measure, laid_out_by):
    """An add and a LayerNorm of torch's, as SigLIP's layers make them of what its convolution gives."""
    states, update = normal(5, 768, 1024).transpose(1, 2), normal(5, 1024, 768)
    if laid_out_by == "rows":
        states = states.contiguous()
    measure(lambda: torch.nn.functional.layer_norm(states + update, (768,)))


@pytest.mark.parametrize("by", ["ras_fast", "torch"])
@pytest.mark.parametrize("rows", [1024, 5120])
@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "quick_gelu"])
def test_gelu(measure, name, rows, by):
    x, theirs = normal(rows, 3072), ACT2FN[name]
    ours = {"gelu_pytorch_tanh": ops.gelu_tanh, "quick_gelu": ops.quick_gelu}[name]
    measure(lambda: theirs(x) if by == "torch" else ours(x))


def test_refusal_similarity(measure):
    logits, prototypes = normal(1, 3, 32000), torch.softmax(torch.randn(3, 32000, device=DEVICE), -1)
    measure(lambda: ops.refusal_similarity(logits, prototypes))
