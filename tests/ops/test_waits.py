"""No op waits for the device or copies from the CPU: each runs, validation included, where tensors have no values."""

import pytest
import torch
from waits import Waits

from ras_fast import ops


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(rows):
    """(query, key, value and region ids, all keywords) of `rows` query rows over nine keys."""
    query, key = meta(2, 4, rows, 16, dtype=torch.bfloat16), meta(2, 2, 9, 16, dtype=torch.bfloat16)
    bounds = {"kv_start": meta(2, dtype=torch.int32), "kv_end": meta(2, dtype=torch.int32), "window": 4, "softcap": 5.0}
    return query, key, meta(2, 9, dtype=torch.int32), bounds | {"sinks": meta(4), "region_bias": meta(4, 3)}


@pytest.mark.parametrize("rows", [1, 5])
def test_attention(rows):
    query, key, ids, keywords = attention(rows)
    with Waits() as waits:
        _, lse, mass = ops.region_attention(query, key, key, ids, 3, **keywords)
        assert mass.shape == ops.region_mass(query, key, lse, ids, 3, **keywords).shape == (2, 4, rows, 3)
        assert ops.key_attention(query, key, lse, region_ids=ids, **keywords).shape == (2, 4, 9)
    assert waits.found == []


@pytest.mark.parametrize("mode", ["add", "lerp"])
def test_norms(mode):
    x, slot = meta(2, 3, 8, dtype=torch.bfloat16), meta(6, dtype=torch.int32)
    steering = {"steer_vectors": meta(2, 8), "steer_slot": slot, "steer_alpha": meta(6), "steer_mode": mode}
    with Waits() as waits:
        ops.add_rms_norm(x, x, meta(8), 1e-6, probes=meta(2, 8), **steering)
        ops.add_layer_norm(x, x, meta(8), meta(8), 1e-6, probes=meta(2, 8), **steering)
    assert waits.found == []


def test_gate_rotation_and_similarity():
    with Waits() as waits:
        ops.rotary_embedding(meta(2, 4, 3, 8), meta(2, 2, 3, 8), meta(2, 3, 8), meta(1, 3, 8))
        ops.linear(meta(6, 8), meta(5, 8), meta(5))
        ops.linears(meta(6, 8), [meta(5, 8), meta(3, 8)], [meta(5), None])
        ops.linear_glu(meta(6, 8), meta(5, 8), meta(5, 8))
        ops.gated_linear(meta(6, 8), meta(8, 8), meta(6))
        ops.gated_linear(meta(6, 8), meta(8, 2), meta(6), right=meta(2, 8))
        ops.gelu_tanh(meta(6, 8))
        ops.quick_gelu(meta(6, 8))
        ops.refusal_similarity(meta(2, 3, 50), meta(3, 50), steps=meta(2, dtype=torch.int32))
    assert waits.found == []
