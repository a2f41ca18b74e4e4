"""What PEFT does to the parts of a patched model: it copies them for an adapter, and puts wrappers in their places."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from tiny_models import inputs, llava, relative_error

import ras_fast
from ras_fast.fingerprint import fingerprint
from ras_fast.methods.autosteer import AutoSteer
from ras_fast.patching.structure import only_records
from ras_fast.patching.undo import StandIn
from ras_fast.profile import RasProfile

peft = pytest.importorskip("peft")
BATCH, SIZE = inputs(["tItt"]), 48
SLOT, ALPHA = torch.zeros(1, dtype=torch.int32), torch.ones(1)


@pytest.fixture
def model():
    return llava()


def logits(model, **options):
    with torch.no_grad():
        return model(**BATCH, **options).logits


def saving(model, *modules):
    """The model with a LoRA that adds nothing yet, and copies of these modules."""
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=list(modules))).eval()


def stand_ins(model):
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, StandIn)]


@pytest.mark.parametrize("place", [1, "final"])
def test_a_copy_of_a_part_is_not_steered(model, place):
    expected, text = logits(model), model.model.language_model
    patch = ras_fast.patch(model)
    patch.set_steering(place, torch.randn(1, SIZE))
    patch.steering.set_rows(SLOT, ALPHA)
    assert relative_error(logits(model), expected) > 0.1
    part = text.norm if place == "final" else text.layers[1]
    twin = copy.deepcopy(part)
    assert not stand_ins(twin)
    patch.unpatch()
    if place == "final":
        text.norm = twin
    else:
        text.layers[1] = twin
    assert relative_error(logits(model), expected) < 1e-6


def test_copies_for_an_adapter_are_as_if_the_model_had_not_been_patched(model):
    names = ["input_layernorm", "mlp", "lm_head", "language_model.norm"]
    expected = logits(model)
    patch = ras_fast.patch(model)
    patch.set_steering("final", torch.randn(1, SIZE))
    patch.steering.set_rows(SLOT, ALPHA)
    wrapped = saving(model, *names)
    patch.clear_steering()
    assert relative_error(logits(wrapped), expected) < 1e-5
    patch.unpatch()
    assert not stand_ins(wrapped)
    assert relative_error(logits(wrapped), expected) < 1e-6
    with ras_fast.patch(wrapped) as again:
        assert again.report().fused_norms == 6
        assert relative_error(logits(wrapped), expected) < 1e-5
    assert not stand_ins(wrapped)


def test_a_copied_attention_gives_no_statistics(model):
    """Rather than some by the map of an earlier forward."""
    with ras_fast.patch(model):
        wrapped = saving(model, "language_model.layers.1.self_attn")
        logits(wrapped)
        with pytest.raises(ValueError, match="needs to know where the image tokens are"):
            logits(wrapped, output_attentions=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "text model"])
def test_a_copy_of_the_whole_stays_patched(model, duplicate, whole):
    patch = ras_fast.patch(model)
    patch.set_steering(1, torch.randn(1, SIZE))
    patch.steering.set_rows(SLOT, ALPHA)
    twin = duplicate(model if whole else model.model.language_model)
    expected = logits(model)
    assert len(stand_ins(twin)) == len(stand_ins(model if whole else model.model.language_model))
    patch.unpatch()
    handle = ras_fast.patching.Patch.of(twin)
    assert relative_error(logits(handle.model), expected) < 1e-6
    again = copy.deepcopy(handle.model)
    assert relative_error(logits(again), expected) < 1e-6
    handle.unpatch()
    assert not stand_ins(twin)
    hooks = [kind for module in twin.modules() for kind in (module._forward_hooks, module._forward_pre_hooks)]
    assert all(only_records(hook) for kind in hooks for hook in kind.values())
    assert relative_error(logits(handle.model), expected) > 0.01


PARTS = ["lm_head", "model.vision_tower", "model.language_model.norm", "model.language_model.layers.1"]


@pytest.mark.parametrize("part", PARTS)
def test_the_pickle_of_a_part_does_not_hold_the_model(model, part):
    before = len(pickle.dumps(model.get_submodule(part)))
    with ras_fast.patch(model):
        assert len(pickle.dumps(model.get_submodule(part))) < 1.1 * before + 1000


# Wrappers that come after the patch


def autosteer(model):
    shapes = {"in.weight": (8, SIZE), "in.bias": (8,), "out.weight": (2, 8), "out.bias": (2,)}
    tensors = {f"prober_{name}": torch.randn(shape) for name, shape in shapes.items()} | {"refusal": torch.randn(SIZE, SIZE)}
    return AutoSteer(RasProfile("autosteer", {"layer": 1, "strength": 1.0, "threshold": 0.5}, tensors, fingerprint(model)))


@pytest.mark.parametrize("how", ["modules_to_save", "LNTuning", "another"])
def test_a_final_norm_that_is_no_longer_called_is_not_steered(model, how):
    """PEFT keeps it in the model, inside of what is called instead."""
    with ras_fast.patch(model) as patch:
        assert patch.steers("final")
        if how == "modules_to_save":
            saving(model, "language_model.norm")
        elif how == "LNTuning":
            peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["language_model.norm"]))
        else:
            model.model.language_model.norm = copy.deepcopy(model.model.language_model.norm)
        assert not patch.steers("final")
        assert patch.final_norm is None
        with pytest.raises(ValueError, match="still in the model"):
            patch.set_steering("final", torch.randn(1, SIZE))
        with pytest.raises(ValueError, match="another one than when it was patched"):
            autosteer(model).attach(patch).__enter__()


def test_a_layer_inside_of_a_wrapper_is_not_steered(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

    with ras_fast.patch(model) as patch:
        layers = model.model.language_model.layers
        layers[1] = Wrapper(layers[1])
        with pytest.raises(ValueError, match=r"it must be one of \[0, 2, 'final'\], still in the model"):
            patch.set_steering(1, torch.randn(1, SIZE))


def test_what_torch_compile_has_wrapped_is_still_there(model):
    with ras_fast.patch(model) as patch:
        text = model.model.language_model
        text.layers[1], text.norm = torch.compile(text.layers[1], backend="eager"), torch.compile(text.norm, backend="eager")
        assert patch.steers(1)
        assert patch.steers("final")


# Wrappers that are there when the model is patched


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "language_model.norm"])
@pytest.mark.parametrize("kind", ["hook", "global hook"])
def test_hooks_on_a_norm_inside_of_a_wrapper_are_heard(model, name, kind):
    wrapped = saving(model, name)
    norms = [module for path, module in wrapped.named_modules() if path.endswith("modules_to_save.default")]

    def heard():
        calls = []

        def double(module, args, output):
            if module not in norms:
                return None
            calls.append(module)
            return output * 2

        with ExitStack() as hooks:
            if kind == "global hook":
                hooks.enter_context(torch.nn.modules.module.register_module_forward_hook(double))
            else:
                for norm in norms:
                    hooks.enter_context(norm.register_forward_hook(double))
            return logits(wrapped), len(calls)

    (expected, calls), plain = heard(), logits(wrapped)
    with ras_fast.patch(wrapped) as patch:
        assert patch.report().fused_norms == 6
        assert relative_error(logits(wrapped), plain) < 1e-5
        got, seen = heard()
        assert relative_error(got, expected) < 1e-5
        assert relative_error(got, plain) > 0.01
        if name == "language_model.norm":
            patch.set_steering("final", torch.randn(1, SIZE))
            patch.steering.set_rows(SLOT, ALPHA)
            with pytest.raises(RuntimeError, match="hooks on a norm inside"):
                heard()
    assert seen == calls == len(norms)
