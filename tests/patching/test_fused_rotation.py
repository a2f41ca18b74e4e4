"""Attention modules that rotate queries and keys by one kernel: the same bits, and everybody else keeps what they had."""

import copy
import pickle
import sys
from functools import wraps

import pytest
import rotations
import torch
from calls import Calls
from families import FAMILIES
from transformers.models.llama import modeling_llama

import ras_fast
from ras_fast.patching.cache_values import cache_name, returned_cache
from ras_fast.patching.rotary import ROTATION, FusedRotation, _with_global

# Layers that rotate: all, or those that attend; one tensor at a time (Gemma 4), neighbours (GLM, Cohere), half tables
# (gpt-oss); none that do so by a function of another name (Llama 4).
ROTATED = {
    "llava": 3, "qwen2_vl": 3, "qwen3_vl": 3, "gemma3": 3, "qwen3_5": 2, "mllama": 2, "gemma4": 4, "glm4v": 3, "aya_vision": 3,
    "llava/gpt_oss": 3, "llama4": 0,
}  # fmt: skip


FORM = {"glm4v": "neighbours", "llava/gpt_oss": "half tables"}


@pytest.fixture
def llava():
    return FAMILIES["llava"].model("llava")


def attentions(model):
    return [layer.self_attn for layer in model.model.language_model.layers]


def ids(model):
    return {"input_ids": torch.randint(3, 60, (2, 9)), "use_cache": False}


@pytest.mark.parametrize("family", ROTATED)
def test_which_families(family):
    model = FAMILIES[family].model(family)
    with torch.no_grad(), ras_fast.patch(model, regions=False) as patched:
        report = patched.report()
        assert report.rotations == ROTATED[family]
        assert f"{ROTATED[family]} rotary embeddings" in str(report)
        assert not any("rota" in why for why in report.unfused.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "qwen3_5", "gemma4", "glm4v", "llava/gpt_oss"])
def test_the_same_bits(family, dtype):
    """Attention with and without, in a prompt and in steps behind it."""
    text = FAMILIES[family].model(family).to(dtype).model.language_model
    prompt, step = torch.randint(3, 60, (2, 9)), torch.randint(3, 60, (2, 1))
    rotating = [module for module in text.modules() if hasattr(module, "q_proj")]
    noted = []
    for attention in rotating:
        attention.register_forward_hook(lambda module, args, output: noted.append(output[0]))

    def run():
        noted.clear()
        with torch.no_grad(), Calls() as calls:
            cache = {cache_name(text): returned_cache(text(input_ids=prompt, use_cache=True))}
            text(input_ids=step, use_cache=True, **cache)
        return [*noted], calls.count["ras_fast::rotary_embedding"]

    expected, none = run()
    for attention in rotating:
        attention.forward = FusedRotation(attention, FORM.get(family, "halves"))
    got, rotated = run()
    # Of Gemma 4's four layers two have keys of others.
    assert (none, rotated) == (0, 2 * (6 if family == "gemma4" else len(rotating)))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_one_launch_a_layer(llava):
    with torch.no_grad():
        given = ids(llava)
        with Calls() as before:
            llava(**given)
        with ras_fast.patch(llava, regions=False), Calls() as after:
            llava(**given)
    assert after.count["ras_fast::rotary_embedding"] == 3
    assert before.count["aten::neg"] == 6
    assert after.count["aten::neg"] == 0


def test_others_keep_theirs(llava):
    """A model of the same modelling file, and after `unpatch` this one."""
    original, other = modeling_llama.apply_rotary_pos_emb, FAMILIES["llava"].model("llava")
    with torch.no_grad(), ras_fast.patch(llava):
        assert all(isinstance(attention.forward, FusedRotation) for attention in attentions(llava))
        with Calls() as calls:
            other(**ids(other))
        assert calls.count["ras_fast::rotary_embedding"] == 0
        assert modeling_llama.apply_rotary_pos_emb is original
    assert not any("forward" in attention.__dict__ for attention in attentions(llava))


def test_a_function_that_is_not_called_is_none():
    """DeepSeek-V3's attention calls another one, as its config says."""
    model = FAMILIES["kimi_k25"].model("kimi_k25")
    with ras_fast.patch(model, regions=False) as patched:
        assert patched.report().rotations == 0
        assert not any("forward" in attention.__dict__ for attention in attentions(model))


def test_without_norms_nothing_is_fused(llava):
    with ras_fast.patch(llava, norms=False) as patched:
        assert patched.report().rotations == 0
        assert not any("forward" in attention.__dict__ for attention in attentions(llava))


def test_a_forward_of_ones_own_stays(llava):
    own = attentions(llava)[1].forward
    attentions(llava)[1].forward = wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    mine = attentions(llava)[1].forward
    with ras_fast.patch(llava, regions=False) as patched:
        assert patched.report().rotations == 2
        assert attentions(llava)[1].forward is mine
    assert attentions(llava)[1].forward is mine


def test_other_tensors_take_the_original(llava):
    """Autocast gives it queries and cosines of different dtypes; a layer that keeps its own forward may have gradients."""
    given = ids(llava)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = llava(**given).logits
        with ras_fast.patch(llava, regions=False), Calls() as calls:
            got = llava(**given).logits
    assert calls.count["ras_fast::rotary_embedding"] == 0
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    attention = attentions(llava)[0]
    fused, states = FusedRotation(attention, "halves"), torch.randn(1, 4, 64, requires_grad=True)
    positions = llava.model.language_model.rotary_emb(states, torch.arange(4)[None])
    gradients = []
    for forward in (attention.forward, fused):
        states.grad = None
        forward(states, position_embeddings=positions, attention_mask=None)[0].sum().backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)


def test_copies_and_pickles(llava):
    with torch.no_grad(), ras_fast.patch(llava, regions=False):
        given = ids(llava)
        expected = llava(**given).logits
        for again in (copy.deepcopy(llava), pickle.loads(pickle.dumps(llava))):
            assert all(attention.forward.attention is attention for attention in attentions(again))
            with Calls() as calls:
                assert torch.equal(again(**given).logits, expected)
            assert calls.count["ras_fast::rotary_embedding"] == 3


def test_a_rotation_that_only_looks_alike_is_refused(llava, monkeypatch):
    def scaled(q, k, cos, sin):
        return q * cos * 1.01, k * cos + k * sin

    monkeypatch.setattr(modeling_llama, ROTATION, scaled)
    with torch.no_grad(), ras_fast.patch(llava, regions=False) as patched:
        assert patched.report().rotations == 0
        assert patched.report().unfused["layers.0.self_attn"] == "rotates in a way of its own"


@pytest.mark.parametrize("form", ["halves", "neighbours"])
def test_tables_and_heads_of_any_strides(llava, form):
    fused, tables = FusedRotation(attentions(llava)[0], form), torch.randn(2, 1, 16, 5).transpose(2, 3)
    query, key = torch.randn(2, 2, 5, 4, 16).transpose(2, 3)
    for heads in (query, key), (query.mT.contiguous().mT, key.mT.contiguous().mT):
        expected = rotations.eager(heads[0], *tables, form == "neighbours")
        taken = form == "halves" or heads[0].stride(3) == 1  # what the op does not take is Llama's, whatever the form
        assert torch.equal(fused._rotate(*heads, *tables)[0], expected) == taken


def test_an_odd_number_of_dimensions(llava):
    """Not a rotation, but what eager code does with it."""
    given = torch.randn(1, 2, 5, 7), torch.randn(1, 2, 5, 7), torch.randn(1, 5, 7), torch.randn(1, 5, 7)
    got = FusedRotation(attentions(llava)[0], "halves")._rotate(*given)
    assert all(map(torch.equal, got, modeling_llama.apply_rotary_pos_emb(*given)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_roundings_are_refused(dtype):
    """Cohere computes in float32, and rounds at the end."""
    model = FAMILIES["aya_vision"].model("aya_vision").to(dtype)
    with torch.no_grad(), ras_fast.patch(model, regions=False) as patched:
        assert patched.report().rotations == 0


def test_a_module_that_does_not_rotate():
    with pytest.raises(ValueError, match=f"Linear does not call {ROTATION}"):
        FusedRotation(torch.nn.Linear(2, 2), "halves")


def shouted(function):
    @wraps(function)
    def run(*args, **kwargs):
        return f"{function(*args, **kwargs)}!"

    return run


def greeting():
    return "hello"


@shouted
@shouted
def greet(name, *, end="."):
    return f"{greeting()} {name}{end}"


def test_a_copy_of_a_function_behind_decorators():
    changed, before = _with_global(greet, "greeting", lambda: "goodbye")
    assert before is greeting
    assert (greet("you"), changed("you"), changed("you", end="")) == ("hello you.!!", "goodbye you.!!", "goodbye you!!")
    assert sys.modules[__name__].greeting is greeting
    assert _with_global(greet, "nothing", None) is None
    assert _with_global(len, "greeting", None) is None
