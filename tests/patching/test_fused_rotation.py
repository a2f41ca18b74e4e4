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
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import ras_fast
from ras_fast.patching.cache_values import cache_name, returned_cache
from ras_fast.patching.rotary import ROTATION, VISION_ROTATION, Form, FusedRotation, _with_global, _with_rotation
from ras_fast.patching.structure import find_decoder

# Layers that rotate: all, or those that attend; one tensor at a time (Gemma 4), neighbours (GLM, Cohere), half tables
# (gpt-oss); none that do so by a function of another name (Llama 4).
ROTATED = {
    "llava": 3, "qwen2_vl": 3, "qwen3_vl": 3, "gemma3": 3, "qwen3_5": 2, "mllama": 2, "gemma4": 4, "glm4v": 3, "aya_vision": 3,
    "llava/gpt_oss": 3, "llama4": 0,
}  # fmt: skip


FORM = {
    "glm4v": Form(interleaved=True), "llava/gpt_oss": Form(half_tables=True),
    "aya_vision": Form(interleaved=True, in_float32=True),
}  # fmt: skip


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
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "qwen3_5", "gemma4", "glm4v", "aya_vision",
                                    "llava/gpt_oss"])  # fmt: skip
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
        attention.forward = FusedRotation(attention, FORM.get(family, Form()))
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
    fused, states = FusedRotation(attention, Form()), torch.randn(1, 4, 64, requires_grad=True)
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


@pytest.mark.parametrize("form", [Form(), Form(interleaved=True)])
def test_tables_and_heads_of_any_strides(llava, form):
    fused, tables = FusedRotation(attentions(llava)[0], form), torch.randn(2, 1, 16, 5).transpose(2, 3)
    query, key = torch.randn(2, 2, 5, 4, 16).transpose(2, 3)
    for heads in (query, key), (query.mT.contiguous().mT, key.mT.contiguous().mT):
        expected = rotations.eager(heads[0], *tables, form.interleaved)
        taken = not form.interleaved or heads[0].stride(3) == 1  # what the op does not take is Llama's, whatever the form
        assert torch.equal(fused._rotate(*heads, *tables)[0], expected) == taken


def test_an_odd_number_of_dimensions(llava):
    """Not a rotation, but what eager code does with it."""
    given = torch.randn(1, 2, 5, 7), torch.randn(1, 2, 5, 7), torch.randn(1, 5, 7), torch.randn(1, 5, 7)
    got = FusedRotation(attentions(llava)[0], Form())._rotate(*given)
    assert all(map(torch.equal, got, modeling_llama.apply_rotary_pos_emb(*given)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_form_that_holds_for_every_dtype(dtype):
    """Cohere computes in float32, and rounds at the end: which a model in float32 does not show, but may be cast later."""
    model = FAMILIES["aya_vision"].model("aya_vision").to(dtype)
    with torch.no_grad(), ras_fast.patch(model, regions=False) as patched:
        assert patched.report().rotations == 3
        assert attentions(model)[0].forward.form == Form(interleaved=True, in_float32=True)


# Vision towers whose attention rotates by one of the two functions; the others by functions of other names, or not at all.
TOWERS = {
    "qwen2_vl": 2, "qwen2_5_vl": 2, "qwen2_5_omni_thinker": 2, "qwen3_vl": 2, "qwen3_5": 2, "glm4v": 2, "exaone4_5": 2,
    "mistral3": 2, "kimi_k25": 2, "ernie4_5_vl_moe": 2, "gemma4": 0, "llama4": 0, "llava": 0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(TOWERS.keys() & FAMILIES.keys()))
def test_towers(family, dtype):
    """The bits of the unpatched tower's rotations, on the tensors that the patched one rotates."""
    description = FAMILIES[family]
    model = description.model(family).to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in description.inputs(model, ["tIt", "tII"]).items()}
    batch.pop("regions")
    compared = []

    def checked(module, rotate):
        def both(*args, **kwargs):
            got, expected = rotate(*args, **kwargs), module.forward._original(*args, **kwargs)
            compared.append(all(map(torch.equal, got, expected)))
            return got

        return both

    with torch.no_grad(), ras_fast.patch(model, regions=False) as patched:
        assert patched.report().tower_rotations == TOWERS[family]
        assert f"and {TOWERS[family]} in vision towers" in str(patched.report())
        text = {id(module) for module in find_decoder(model)[1].modules()}
        rotating = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedRotation) and id(m) not in text]
        for module in rotating:
            module.forward._forward, _, _ = _with_rotation(module, checked(module, module.forward._rotate))
        with Calls() as calls:
            model(**batch)
    assert len(rotating) == TOWERS[family]
    assert all(compared)
    assert len(compared) >= TOWERS[family]
    assert calls.count["ras_fast::rotary_embedding"] >= len(compared)
    assert not any("forward" in module.__dict__ for module in rotating)


def test_a_tower_that_rotates_otherwise_is_left_alone(monkeypatch):
    def scaled(q, k, cos, sin):
        return q * cos[:, None] * 1.01, k * sin[:, None]

    monkeypatch.setattr(modeling_qwen2_5_vl, VISION_ROTATION, scaled)
    with ras_fast.patch(FAMILIES["qwen2_5_vl"].model("qwen2_5_vl"), regions=False) as patched:
        assert patched.report().tower_rotations == 0


def test_a_towers_function_with_other_tensors():
    """Heads before tokens, which look alike where there are as many of both; gradients; other numbers of arguments."""
    attention = FAMILIES["qwen2_5_vl"].model("qwen2_5_vl").model.visual.blocks[0].attn
    fused = FusedRotation(attention, Form(in_float32=True))
    query, key, (cos, sin) = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8), torch.randn(2, 1, 4, 8)
    patches = query[0].clone().requires_grad_(), key[0], cos[0], sin[0]
    for given in ((query, key, cos, sin), (query[0], key[0], cos, sin), patches):
        with Calls() as calls:
            got = fused._rotate(*given)
        assert calls.count["ras_fast::rotary_embedding"] == 0
        assert all(map(torch.equal, got, modeling_qwen2_5_vl.apply_rotary_pos_emb_vision(*given)))


def test_a_module_that_does_not_rotate():
    with pytest.raises(ValueError, match=f"Linear does not call {ROTATION}"):
        FusedRotation(torch.nn.Linear(2, 2), Form())


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
