"""The norm modules are the ops, under the parameter names that checkpoints use."""

import pytest
import torch

from ras_fast import nn, ops


def test_loads_a_hugging_face_norm():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(48, 1e-5)
    theirs.weight.data.normal_()
    ours = nn.RMSNorm(48, 1e-5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_loads_a_layer_norm():
    theirs = torch.nn.LayerNorm(48)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours = nn.LayerNorm(48)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert "bias" not in nn.LayerNorm(8, bias=False).state_dict()


@pytest.mark.parametrize("module", [nn.RMSNorm(32), nn.LayerNorm(32), nn.RMSNorm(32, weight_offset=1.0)])
def test_takes_the_residual_along(module):
    x, residual, probes = torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.randn(2, 32)
    y, h = module(x, residual)
    assert torch.equal(h, x + residual)
    torch.testing.assert_close(y, module(x + residual))
    assert module(x, residual, probes=probes)[2].shape == (6, 3)


def test_gemma_offset_starts_at_one():
    x = torch.randn(4, 16)
    torch.testing.assert_close(nn.RMSNorm(16, weight_offset=1.0)(x), ops.add_rms_norm(x, None, torch.ones(16), 1e-6)[0])


def test_a_steered_x_is_not_lost():
    norm, x = nn.RMSNorm(8), torch.randn(3, 8)
    steer = {"steer_vectors": torch.ones(1, 8), "steer_slot": torch.zeros(3).int(), "steer_alpha": torch.ones(3)}
    y, h = norm(x, **steer)
    torch.testing.assert_close(h, x + 1)
    torch.testing.assert_close(y, norm(x + 1))
