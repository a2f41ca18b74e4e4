"""Norms that no residual add precedes, as of queries and keys and in vision towers: one kernel where that is proved."""

import pytest
import torch
from families import FAMILIES
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import ras_fast
from ras_fast.patching.layers import FusedNorm

IDS = torch.arange(14).view(2, 7)
CONFIG = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
          "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.3)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_norms_of_queries_and_keys(model):
    expected, norm = logits(model), model.model.layers[1].self_attn.k_norm
    with ras_fast.patch(model) as patch:
        assert patch.report().other_norms == 4
        assert "4 other norms" in str(patch.report())
        assert isinstance(norm.forward, FusedNorm)
        close(logits(model), expected)
        seen = []
        with norm.register_forward_hook(lambda module, args, output: seen.append((*args, output))):
            close(logits(model), expected)
        ((x, y),) = seen
        with torch.no_grad():
            close(y, Qwen3RMSNorm.forward(norm, x))
    assert "forward" not in norm.__dict__
    with ras_fast.patch(model, norms=False) as patch:
        assert patch.report().other_norms == 0
        assert "forward" not in norm.__dict__


def test_under_autocast_they_are_their_own(model):
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
    with ras_fast.patch(model), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.1)


def test_compiled(model):
    with ras_fast.patch(model):
        expected = logits(model)
        close(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), expected)
    torch._dynamo.reset()


class Doubled(Qwen3RMSNorm):
    """Not what its name says."""

    def forward(self, x):
        return super().forward(x) * 2


def test_another_formula_is_left_alone(model):
    attention = model.model.layers[0].self_attn
    attention.q_norm = Doubled(16).eval()
    attention.q_norm.weight.data.normal_()
    expected = logits(model)
    with ras_fast.patch(model) as patch:
        assert patch.report().other_norms == 3
        assert "forward" not in attention.q_norm.__dict__
        close(logits(model), expected)


def test_all_are_undone_where_the_text_model_gives_something_else(model, monkeypatch):
    monkeypatch.setattr("ras_fast.patching.fusion.compare", lambda *args: "is off by 1")
    expected = logits(model)
    with ras_fast.patch(model, linears=False) as patch:
        assert patch.report().other_norms == 0
        assert not any(isinstance(module.__dict__.get("forward"), FusedNorm) for module in model.modules())
        assert torch.equal(logits(model), expected)


def test_a_vision_tower_keeps_its_gradients():
    """By which pictures are sought that fool a model."""
    family = FAMILIES["qwen2_5_vl"]
    model = family.model("qwen2_5_vl")
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    batch = family.inputs(model, ["tIt"])
    pixels, grid = batch["pixel_values"].requires_grad_(), batch["image_grid_thw"]

    def features():
        found = model.model.visual(pixels, grid_thw=grid)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    def gradient():
        (found,) = torch.autograd.grad(features().square().sum(), pixels)
        return found

    expected, wanted = features().detach(), gradient()
    with ras_fast.patch(model) as patch:
        assert patch.report().other_norms > 0
        assert isinstance(model.model.visual.blocks[0].norm1.forward, FusedNorm)
        with torch.no_grad():
            close(features(), expected)
        assert torch.equal(gradient(), wanted)
