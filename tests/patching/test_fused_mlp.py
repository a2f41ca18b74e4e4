"""Gated MLPs whose two projections and activation are one kernel: which ones, when, and that hooks see what they saw."""

import copy
import pickle

import pytest
import torch
from calls import Calls
from families import FAMILIES
from torch import nn
from torch.nn.utils import prune
from transformers.activations import ACT2FN

import ras_fast
from ras_fast.patching.mlp import FusedMLP

# Gated MLPs of the layers; GLM has both projections in one matrix, LFM2 other names and no module for its SiLU, Llama 4 experts
# in every other layer.
FUSED = {"llava": 3, "qwen2_vl": 3, "gemma3": 3, "glm4v": 3, "aya_vision": 3, "lfm2_vl": 4}


@pytest.fixture
def llava():
    return FAMILIES["llava"].model("llava")


def mlps(model):
    return [layer.mlp for layer in model.model.language_model.layers]


def ids(length):
    return {"input_ids": torch.randint(3, 60, (2, length)), "use_cache": False}


def count(call):
    with torch.no_grad(), Calls() as calls:
        call()
    return calls.count["ras_fast::linear_glu"]


@pytest.mark.parametrize("family", FUSED)
def test_which_families(family):
    model = FAMILIES[family].model(family)
    given = ids(1)
    with torch.no_grad():
        expected = model(**given).logits
        with ras_fast.patch(model, regions=False) as patched:
            assert patched.report().mlps == FUSED[family]
            assert f"{FUSED[family]} gated MLPs" in str(patched.report())
            assert count(lambda: model(**given)) == FUSED[family]
            torch.testing.assert_close(model(**given).logits, expected, atol=2e-5, rtol=1e-4)
    assert not any(isinstance(module.__dict__.get("forward"), FusedMLP) for module in model.modules())


def test_few_rows_alone(llava):
    with ras_fast.patch(llava):
        assert count(lambda: llava(**ids(1))) == 3
        assert count(lambda: llava(**ids(2))) == 0
    with ras_fast.patch(llava, linears=False) as patched:
        assert patched.report().mlps == 0
        assert count(lambda: llava(**ids(1))) == 0


@pytest.mark.parametrize(
    ("family", "name"),
    [("llava", "mlp.gate_proj"), ("llava", "mlp.up_proj"), ("llava", "mlp.act_fn"), ("llava", "mlp.down_proj"),
     ("glm4v", "mlp.gate_up_proj"), ("glm4v", "mlp.activation_fn"), ("glm4v", "mlp.down_proj"),
     ("lfm2_vl", "feed_forward.w1"), ("lfm2_vl", "feed_forward.w3"), ("lfm2_vl", "feed_forward.w2")],
)  # fmt: skip
def test_hooks_see_what_they_saw(family, name):
    model, given, seen, fused = FAMILIES[family].model(family), ids(1), [], FUSED[family]
    hooked = model.model.language_model.layers[1].get_submodule(name)
    is_last = name.endswith(("down_proj", "w2"))
    with torch.no_grad():
        expected = model(**given).logits
        with ras_fast.patch(model):
            hook = hooked.register_forward_hook(lambda module, args, output: seen.append(output))
            torch.testing.assert_close(model(**given).logits, expected, atol=2e-5, rtol=1e-4)
            assert count(lambda: model(**given)) == (fused if is_last else fused - 1)
            hook.remove()
            assert count(lambda: model(**given)) == fused
    assert len(seen) == 2


@pytest.mark.parametrize("length", [1, 2])
def test_both_projections_in_one_matrix(length):
    """Halves of the weight as it is now; a bias that comes later is not forgotten."""
    model = FAMILIES["glm4v"].model("glm4v")
    with torch.no_grad(), ras_fast.patch(model, regions=False):
        mlp, x = mlps(model)[0], torch.randn(length, 64)
        expected = type(mlp).forward(mlp, x)
        torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
        mlp.gate_up_proj.weight = nn.Parameter(2 * mlp.gate_up_proj.weight)
        doubled = type(mlp).forward(mlp, x)
        assert not torch.allclose(doubled, expected)
        torch.testing.assert_close(mlp(x), doubled, atol=1e-5, rtol=1e-5)
        mlp.gate_up_proj.bias = nn.Parameter(torch.randn(mlp.gate_up_proj.out_features))
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), atol=1e-5, rtol=1e-5)


def test_what_changes_after_the_patch(llava):
    with torch.no_grad(), ras_fast.patch(llava):
        first, second, third = mlps(llava)
        first.gate_proj.bias = nn.Parameter(torch.randn(first.gate_proj.out_features))
        prune.identity(first.gate_proj, "bias")
        second.up_proj = nn.Linear(64, second.up_proj.out_features, bias=False)
        third.gate_proj.double()
        x = torch.randn(2, 64)
        assert count(lambda: first(x)) == count(lambda: second(x)) == 0
        gate = first.act_fn(first.gate_proj(x))
        torch.testing.assert_close(first(x), first.down_proj(gate * first.up_proj(x)))
        with pytest.raises(RuntimeError, match="dtype"):
            third(x)
        third.float().act_fn = nn.ReLU()
        torch.testing.assert_close(third(x), third.down_proj(third.gate_proj(x).relu() * third.up_proj(x)))


def test_global_hooks_see_everything(llava):
    seen = []
    with torch.no_grad(), ras_fast.patch(llava):
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        try:
            llava(**ids(1))
        finally:
            hook.remove()
    assert seen.count("Linear") == 22
    assert sum("SiLU" in name for name in seen) == 3


def test_copies_and_pickles(llava):
    given = ids(1)
    with torch.no_grad(), ras_fast.patch(llava):
        expected = llava(**given).logits
        for again in (copy.deepcopy(llava), pickle.loads(pickle.dumps(llava))):
            assert all(mlp.forward.mlp is mlp for mlp in mlps(again))
            assert count(lambda again=again: again(**given)) == 3
            assert torch.equal(again(**given).logits, expected)


def test_lora_projections_keep_their_mlp(llava):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)).eval()
    given = ids(1)
    with torch.no_grad():
        expected = adapted(**given).logits
        with ras_fast.patch(adapted) as patched:
            assert patched.report().mlps == 0
            torch.testing.assert_close(adapted(**given).logits, expected, atol=1e-5, rtol=1e-5)


class Scaled(nn.Module):
    """Looks like a gated MLP, and is none."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class Clamped(Scaled):
    """Of a few families: what is large is cut off."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=16) * self.up_proj(x).clamp(-16, 16))


class Together(nn.Module):
    """An activation of both projections."""

    def forward(self, gate, up):
        return gate.sigmoid() * up


class ByBoth(Scaled):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "gelu_10", "relu", "gelu_pytorch_tanh", "silu"])
def test_which_activations(llava, name, dtype):
    for mlp in mlps(llava):
        mlp.act_fn = ACT2FN[name]
    with ras_fast.patch(llava.to(dtype)) as patched:
        assert patched.report().mlps == (3 if name in ("gelu_pytorch_tanh", "silu") else 0)


def test_clamped_ones_and_such_as_take_both_are_refused(llava):
    layers = llava.model.language_model.layers
    layers[0].mlp = Clamped(layers[0].mlp)
    layers[1].mlp = ByBoth(layers[1].mlp)
    layers[1].mlp.act_fn = Together()
    with ras_fast.patch(llava) as patched:
        assert patched.report().mlps == 1


class UpFirst(nn.Module):
    """Both projections in one matrix, the other one first."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_up_proj = nn.Linear(64, 2 * mlp.gate_proj.out_features, bias=False)
        self.down_proj, self.activation_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


def test_the_gate_comes_first(llava):
    layers = llava.model.language_model.layers
    layers[0].mlp = UpFirst(layers[0].mlp)
    with ras_fast.patch(llava) as patched:
        assert patched.report().mlps == 2


def test_what_only_looks_alike_is_refused(llava):
    layers = llava.model.language_model.layers
    layers[0].mlp = Scaled(layers[0].mlp)
    layers[1].mlp.act_fn = nn.Sigmoid()
    with ras_fast.patch(llava) as patched:
        assert patched.report().mlps == 1


def test_gradients_and_compilation_take_the_original(llava):
    mlp, x = mlps(llava)[0], torch.randn(2, 64, requires_grad=True)
    with ras_fast.patch(llava):
        mlp(x).sum().backward()
        assert x.grad is not None
        compiled = torch.compile(mlp, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x.detach()), mlp(x.detach()), atol=1e-5, rtol=1e-5)
