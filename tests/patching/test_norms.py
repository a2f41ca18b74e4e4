"""Norms behind attention and MLP, of queries and keys, and in vision towers: computed with the sum and the norm that follow, or
by a kernel of their own, or left alone."""

import copy
from collections import Counter

import pytest
import torch
from families import FAMILIES
from tiny_models import relative_error, spread
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import ras_fast
from ras_fast.patching import layers
from ras_fast.patching.layers import FusedNorm

CONFIG = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
          "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
IDS = torch.arange(14).view(2, 7)


def with_norms(model):
    """The model in which no norm's weight is as good as none."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(std=0.3).add_("Qwen" in type(model).__name__)
    return model.eval()


@pytest.fixture
def gemma():
    """With norms behind attention and MLP, and of queries and keys."""
    torch.manual_seed(0)
    return with_norms(Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG, sliding_window=4)))


@pytest.fixture
def qwen():
    """With norms of queries and keys."""
    torch.manual_seed(0)
    return with_norms(Qwen3ForCausalLM(Qwen3Config(**CONFIG)))


GEMMA_4 = {
    "dense": {}, "inputs": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "mixture": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
}  # fmt: skip


@pytest.fixture(params=GEMMA_4)
def gemma_4(request):
    """Its layers scale what they give: the dense ones, those with an input of their own, those with experts."""
    torch.manual_seed(0)
    options = {"hidden_size_per_layer_input": 0} | GEMMA_4[request.param]
    return spread(Gemma4ForCausalLM(Gemma4TextConfig(**CONFIG | {"global_head_dim": 16, "sliding_window": 4} | options)))


@pytest.fixture(params=["gemma", "qwen"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def calls(monkeypatch):
    """How often the norm op ran, by whether it had the weight of a norm before the sum."""
    counted, op = Counter(), layers.ops.add_rms_norm

    def add_rms_norm(*args, **kwargs):
        counted["x_weight" in kwargs] += 1
        return op(*args, **kwargs)

    monkeypatch.setattr(layers.ops, "add_rms_norm", add_rms_norm)
    return counted


@torch.no_grad()
def states_of(model):
    return model(IDS, output_hidden_states=True).hidden_states


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_takes_two_calls_of_the_op(gemma, calls, dtype):
    gemma.to(dtype)
    expected = states_of(gemma)
    with ras_fast.patch(gemma):
        calls.clear()
        got = states_of(gemma)
    rounding = {torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)
    queries_and_keys, first_norm = 2 * 3, 1
    assert calls == {True: 2 * 3, False: queries_and_keys + first_norm}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_scale_what_they_give(gemma_4, calls, dtype):
    exact = states_of(gemma_4)
    gemma_4.to(dtype)
    expected = states_of(gemma_4)
    with ras_fast.patch(gemma_4) as patch:
        report = patch.report()
        assert (report.fused_layers, report.fused_norms, report.unfused) == (3, 6, {})
        calls.clear()
        got = states_of(gemma_4)
        for layer in gemma_4.model.layers:
            layer.layer_scalar.mul_(1.5)
        rescaled = states_of(gemma_4)
    adds = 3 if hasattr(layer, "per_layer_projection") else 2
    assert calls[True] == 2 * adds * 3
    for ours, eager, wanted in zip(got, expected, exact, strict=True):
        assert (ours - wanted).abs().max() <= 2 * (eager - wanted).abs().max() + 2e-5
    assert relative_error(rescaled[-2], states_of(gemma_4)[-2]) < 0.05 < 0.2 < relative_error(rescaled[-2], got[-2])


@pytest.mark.parametrize("apart", [False, True])
def test_layers_that_scale_are_steered_after_it(gemma_4, apart):
    """Norms apart from the sum as well, which a hook wants to see."""
    vector, seen = torch.randn(1, 48), []
    norms = [module for name, module in gemma_4.named_modules() if name.endswith("layernorm")] if apart else []
    hooks = [norm.register_forward_hook(lambda module, args, output: seen.append(output)) for norm in norms]
    with ras_fast.patch(gemma_4) as patch:
        patch.set_steering(1, vector)
        patch.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.full((2,), 0.5))
        got = states_of(gemma_4)
    gemma_4.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.5 * vector)
    close(got[-1], states_of(gemma_4)[-1])  # transformers records a layer's output before later hooks
    assert bool(seen) == bool(hooks) == apart


def test_hooks_see_the_norm(gemma, calls):
    expected, seen = states_of(gemma), []
    name = "model.layers.1.post_attention_layernorm"
    with ras_fast.patch(gemma):
        with gemma.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append((*args, output))):
            calls.clear()
            close(states_of(gemma), expected)
            assert calls[True] == 5
        ((before, after),) = seen
        with torch.no_grad():
            torch.testing.assert_close(after, type(gemma.get_submodule(name)).forward(gemma.get_submodule(name), before))
        called = []
        with register_module_forward_hook(lambda module, args, output: called.append(module)):
            calls.clear()
            close(states_of(gemma), expected)
        assert calls[True] == 0
        assert gemma.get_submodule(name) in called


def test_a_hook_may_change_what_the_norm_gives(gemma):
    layer = gemma.model.layers[2].post_feedforward_layernorm
    with layer.register_forward_hook(lambda module, args, output: output * 3):
        expected = states_of(gemma)
        with ras_fast.patch(gemma):
            close(states_of(gemma), expected)
    with ras_fast.patch(gemma), layer.register_forward_hook(lambda module, args, output: output * 3):
        close(states_of(gemma), expected)


@pytest.mark.parametrize("patched_first", [True, False])
def test_norms_that_are_not_alike_stay_apart(gemma, calls, patched_first):
    changed = copy.deepcopy(gemma)
    changed.model.layers[0].post_attention_layernorm.eps = 0.1
    expected = states_of(changed)
    with ras_fast.patch(gemma if patched_first else changed) as patch:
        patch.model.model.layers[0].post_attention_layernorm.eps = 0.1
        calls.clear()
        close(states_of(patch.model), expected)
    assert calls[True] == 5


def test_a_forward_of_its_own_is_called(gemma):
    with ras_fast.patch(gemma):
        norm = gemma.model.layers[1].post_attention_layernorm
        fused = norm.forward
        norm.forward = lambda x: fused(x) * 2
        got = states_of(gemma)
        norm.forward = fused
    gemma.model.layers[1].post_attention_layernorm.forward = lambda x: 2 * type(norm).forward(norm, x)
    close(got, states_of(gemma))


def another(norm):
    new = copy.deepcopy(norm)
    new.__dict__.pop("forward", None)
    new.weight.data += 1
    return new


@pytest.fixture(params=["before the norm", "behind attention and MLP"])
def olmo_or_gemma(request, gemma):
    if request.param == "before the norm":
        return gemma
    torch.manual_seed(0)
    return with_norms(Olmo2ForCausalLM(Olmo2Config(**CONFIG)))


def test_a_norm_that_is_replaced_later_counts(olmo_or_gemma):
    model, layer = olmo_or_gemma, olmo_or_gemma.model.layers[1]
    for name in [name for name, _ in layer.named_children() if "norm" in name]:
        before = layer.get_submodule(name)
        with ras_fast.patch(model):
            layer.register_module(name, another(before))
            got = states_of(model)
        layer.register_module(name, another(before))
        close(got, states_of(model))
        layer.register_module(name, before)


def test_a_norm_that_is_tuned_later_counts(gemma):
    peft = pytest.importorskip("peft")
    names = ["post_attention_layernorm", "post_feedforward_layernorm"]
    with ras_fast.patch(gemma) as patch:
        tuned = peft.get_peft_model(gemma, peft.LNTuningConfig(target_modules=names)).eval()
        for name, parameter in tuned.named_parameters():
            if "ln_tuning" in name:
                parameter.data += 1
        got = states_of(gemma)
        patch.unpatch()
        close(got, states_of(gemma))
        with tuned.disable_adapter():
            assert not torch.allclose(got[-1], states_of(gemma)[-1], atol=1e-3)


def test_a_weight_of_another_layout_is_left_alone(gemma):
    weight = gemma.model.layers[1].input_layernorm.weight
    weight.data = torch.stack([weight.data] * 2, -1)[..., 0]
    expected = states_of(gemma)
    with ras_fast.patch(gemma) as patch:
        assert "must be contiguous" in patch.report().unfused["layers.1.input_layernorm"]
        close(states_of(gemma), expected)


def test_norms_of_queries_and_keys(qwen):
    expected, norm = states_of(qwen), qwen.model.layers[1].self_attn.k_norm
    with ras_fast.patch(qwen) as patch:
        assert patch.report().other_norms == 6
        assert "6 other norms" in str(patch.report())
        assert isinstance(norm.forward, FusedNorm)
        close(states_of(qwen), expected)
        seen = []
        with norm.register_forward_hook(lambda module, args, output: seen.append((*args, output))):
            close(states_of(qwen), expected)
        ((x, y),) = seen
        with torch.no_grad():
            close(y, Qwen3RMSNorm.forward(norm, x))
    assert "forward" not in norm.__dict__
    with ras_fast.patch(qwen, norms=False) as patch:
        assert patch.report().other_norms == 0
        assert "forward" not in norm.__dict__


class Doubled(Qwen3RMSNorm):
    """Not what its name says."""

    def forward(self, x):
        return super().forward(x) * 2


def test_another_formula_is_left_alone(qwen):
    attention = qwen.model.layers[0].self_attn
    attention.q_norm = Doubled(16).eval()
    attention.q_norm.weight.data.normal_()
    expected = states_of(qwen)
    with ras_fast.patch(qwen) as patch:
        assert patch.report().other_norms == 5
        assert "forward" not in attention.q_norm.__dict__
        close(states_of(qwen), expected)


@torch.no_grad()
def test_norms_without_a_weight(qwen, calls):
    """Of the values in Gemma 4's attention, and Llama 4's of queries and keys."""
    for index, norm in enumerate((Gemma4RMSNorm(16, with_scale=False), Llama4TextL2Norm(), WithoutRoot())):
        qwen.model.layers[index].other_norm = norm
    fused, other, refused = (layer.other_norm for layer in qwen.model.layers)
    with ras_fast.patch(qwen) as patch:
        assert patch.report().other_norms == 8
        assert "forward" not in refused.__dict__
        for norm in (fused, other):
            calls.clear()
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for x in (torch.randn(2, 3, 4, 16), torch.randn(5, 24)):
                    close(norm(x.to(dtype)), type(norm).forward(norm, x.to(dtype)))
            assert calls == {False: 6}
        x = torch.randn(3, 16, requires_grad=True)
        with torch.enable_grad():
            fused(x).sum().backward()
        assert x.grad is not None
        assert calls == {False: 6}
        close(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), fused(x))
    assert "forward" not in fused.__dict__


class WithoutRoot(Llama4TextL2Norm):
    """A norm by its name."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps)


class ChannelNorm(torch.nn.Module):
    """RMSNorm over the channels of [B, C, H, W]; of [B, C] that of rows."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.randn(channels)), 1e-6

    def forward(self, x):
        weight = self.weight.view(-1, *[1] * (x.dim() - 2))
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * weight


@pytest.mark.parametrize(
    "norm",
    [ChannelNorm(16), torch.nn.GroupNorm(1, 16), torch.nn.BatchNorm1d(16), torch.nn.GroupNorm(1, 16, affine=False)],
)
@torch.no_grad()
def test_norms_over_channels_are_left_alone(qwen, norm):
    """On rows alone, the first two would pass for RMSNorm and LayerNorm."""
    qwen.model.visual = norm.eval()
    x = torch.randn(2, 16, 16)
    expected = norm(x)
    with ras_fast.patch(qwen) as patch:
        assert patch.report().other_norms == 6
        assert torch.equal(norm(x), expected)


def test_all_are_undone_where_the_text_model_gives_something_else(qwen, monkeypatch):
    monkeypatch.setattr("ras_fast.patching.fusion.compare", lambda *args: "is off by 1")
    expected = states_of(qwen)
    with ras_fast.patch(qwen, linears=False) as patch:
        assert patch.report().other_norms == 0
        assert not any(isinstance(module.__dict__.get("forward"), FusedNorm) for module in qwen.modules())
        assert all(map(torch.equal, states_of(qwen), expected))


def test_a_vision_tower_keeps_its_gradients():
    """By which pictures are sought that fool a model."""
    family = FAMILIES["qwen2_5_vl"]
    model = family.model("qwen2_5_vl")
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


def test_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        expected = states_of(model)
    with ras_fast.patch(model), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(states_of(model), expected, rtol=0.05, atol=0.1)


def test_compiled(model):
    with ras_fast.patch(model):
        eager = states_of(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(states_of(compiled), eager)
    torch._dynamo.reset()
