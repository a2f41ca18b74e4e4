"""What `torch.utils.flop_counter` says of the ops, and that it says of a patched model what it says of the original."""

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

import ras_fast
from ras_fast import ops


def count(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def rand(*shape):
    return torch.randn(*shape)


def test_linear():
    x, weight, right = rand(2, 1, 32), rand(48, 32), rand(4, 32)
    assert count(lambda: ops.linear(x, weight, rand(48))) == 2 * 2 * 32 * 48
    assert count(lambda: ops.linears(x, [weight, weight[:8]], [rand(48), None])) == 2 * 2 * 32 * (48 + 8)
    assert count(lambda: ops.linear_glu(x, weight, weight, activation="silu")) == 2 * 2 * 2 * 32 * 48
    assert count(lambda: ops.gated_linear(x, rand(32, 32), torch.ones(2))) == 2 * 2 * 32 * 32
    assert count(lambda: ops.gated_linear(x, rand(32, 4), torch.ones(2), right=right)) == 2 * 2 * 2 * 32 * 4


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("rows", [1, 5])
def test_attention(backend, rows):
    query, key, value = rand(2, 4, rows, 16), rand(2, 2, 7, 16), rand(2, 2, 7, 16)
    ids = torch.zeros(2, 7, dtype=torch.int32)
    assert count(lambda: ops.region_attention(query, key, value, ids, 1)) == 2 * 2 * 4 * rows * 7 * (16 + 16)


@pytest.mark.parametrize("length", [1, 9])
def test_a_patched_model(length):
    model, ids = FAMILIES["llava"].model("llava"), torch.randint(3, 60, (1, length))
    expected = count(lambda: model(input_ids=ids, use_cache=False))
    with ras_fast.patch(model):
        assert count(lambda: model(input_ids=ids, use_cache=False)) == expected
