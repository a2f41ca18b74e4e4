"""Layers with a norm behind attention and MLP, as Gemma's: computed with the sum and the norm that follow, unless that would be
noticed."""

import copy
from collections import Counter

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import ras_fast
from ras_fast.patching import layers

CONFIG = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
          "num_key_value_heads": 2, "vocab_size": 64, "sliding_window": 4}  # fmt: skip
IDS = torch.arange(14).view(2, 7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(std=0.3)
    return model


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


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_takes_two_calls_of_the_op(model, calls, dtype):
    model.to(dtype)
    expected = states_of(model)
    with ras_fast.patch(model):
        calls.clear()
        got = states_of(model)
    if dtype == torch.float32:
        assert_same(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)
    queries_and_keys, first_norm = 2 * 3, 1
    assert calls == {True: 2 * 3, False: queries_and_keys + first_norm}


def test_hooks_see_the_norm(model, calls):
    expected, seen = states_of(model), []
    name = "model.layers.1.post_attention_layernorm"
    with ras_fast.patch(model):
        with model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append((*args, output))):
            calls.clear()
            assert_same(states_of(model), expected)
            assert calls[True] == 5
        ((before, after),) = seen
        with torch.no_grad():
            torch.testing.assert_close(after, type(model.get_submodule(name)).forward(model.get_submodule(name), before))
        called = []
        with register_module_forward_hook(lambda module, args, output: called.append(module)):
            calls.clear()
            assert_same(states_of(model), expected)
        assert calls[True] == 0
        assert model.get_submodule(name) in called


def test_a_hook_may_change_what_the_norm_gives(model):
    layer = model.model.layers[2].post_feedforward_layernorm
    with layer.register_forward_hook(lambda module, args, output: output * 3):
        expected = states_of(model)
        with ras_fast.patch(model):
            assert_same(states_of(model), expected)
    with ras_fast.patch(model), layer.register_forward_hook(lambda module, args, output: output * 3):
        assert_same(states_of(model), expected)


@pytest.mark.parametrize("patched_first", [True, False])
def test_norms_that_are_not_alike_stay_apart(model, calls, patched_first):
    changed = copy.deepcopy(model)
    changed.model.layers[0].post_attention_layernorm.eps = 0.1
    expected = states_of(changed)
    with ras_fast.patch(model if patched_first else changed) as patch:
        patch.model.model.layers[0].post_attention_layernorm.eps = 0.1
        calls.clear()
        assert_same(states_of(patch.model), expected)
    assert calls[True] == 5


def test_a_forward_of_its_own_is_called(model):
    with ras_fast.patch(model):
        norm = model.model.layers[1].post_attention_layernorm
        fused = norm.forward
        norm.forward = lambda x: fused(x) * 2
        got = states_of(model)
        norm.forward = fused
    model.model.layers[1].post_attention_layernorm.forward = lambda x: 2 * type(norm).forward(norm, x)
    assert_same(got, states_of(model))


def test_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        expected = states_of(model)
    with ras_fast.patch(model), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(states_of(model), expected, rtol=0.05, atol=0.1)


def test_compiled(model):
    with ras_fast.patch(model):
        eager = states_of(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(states_of(compiled), eager)
    torch._dynamo.reset()
