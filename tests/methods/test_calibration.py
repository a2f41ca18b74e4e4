"""What every method's calibration asks of its arguments, before any work."""

import copy

import pytest
import torch

from ras_fast.methods import attention, autosteer, moras, projection

MORE = {moras: {"refused_texts": ["w1"]}, autosteer: {}, attention: {}, projection: {}}


@pytest.mark.parametrize("method", MORE, ids=lambda method: method.__name__.split(".")[-1])
@pytest.mark.parametrize("name", ["model", "processor", "pairs"])
@pytest.mark.parametrize("given", [None, 5, "x", {}], ids=repr)
def test_an_argument_of_another_type_is_named(model, processor, method, name, given):
    arguments = {"model": model, "processor": processor, "pairs": [], **MORE[method]} | {name: given}
    with pytest.raises(ValueError, match=f"{name} is a {type(given).__name__}; it needs to be"):
        method.calibrate(**arguments)


def test_condition_pairs_are_named(model, processor):
    with pytest.raises(ValueError, match="condition_pairs is a NoneType"):
        projection.calibrate(model, processor, pairs=[(("w1", None), ("w2", None))], condition_pairs=None)


@pytest.mark.parametrize("method", MORE, ids=lambda method: method.__name__.split(".")[-1])
def test_a_model_in_training_mode_is_refused(model, processor, method):
    with pytest.raises(ValueError, match="training mode"):
        method.calibrate(copy.deepcopy(model).train(), processor, pairs=[], **MORE[method])


def test_attention_risk_in_float64_names_the_last_norm(model, processor, monkeypatch):
    """Before the model is asked anything."""
    monkeypatch.setattr(attention, "refusal_prototypes", lambda *arguments: pytest.fail("too late"))
    image = torch.rand(8, 8, 3).numpy()
    pairs = [(image, f"w{i} ?", f"w{i + 20} ?") for i in range(10)]
    with pytest.raises(ValueError, match=r"last norm, which .* is not fused .*float64"):
        attention.calibrate(copy.deepcopy(model).double(), processor, pairs=pairs, refused_texts=["w1"])
