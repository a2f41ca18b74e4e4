"""The forward passes that the safety table counts."""

import pytest
import torch
from tape import Graphs
from test_engine import make_profile
from test_engine_one_pass import autosteer
from tiny_random import random_image, tiny_llava

import ras_fast
from ras_fast.engine import batch
from ras_fast.evaluation.defences import check_names, make_defences

QUERIES = [("w1 w2 ?", [random_image(1)]), ("w3 ?", []), ("w4 w5 w6 ?", [random_image(2)]), ("w1 ?", [random_image(3)])]


@pytest.fixture
def profiles(model, processor):
    with ras_fast.patch(model):  # as `ras-fast eval` does; the generators would leave theirs on the model
        yield {"moras": make_profile(model, processor), "autosteer": autosteer(model, processor)}


def counts(model, processor, profiles, names):
    defences = make_defences(names, model, processor, profiles, 10).values()
    answers = [defence(*query) for defence in defences for query in QUERIES]
    return [(answer.passes, answer.tokens) for answer in answers]


def test_the_engine_counts_what_a_hook_sees(model, processor, profiles):
    seen = []
    names = ["moras", "moras-binary", "autosteer"]
    defences = make_defences(names, model, processor, profiles, 10).values()
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape[1]))
    for defence in defences:
        defence(*QUERIES[0])  # in the first, the engine also compares itself with the model that it finds
        for query in QUERIES:
            seen.clear()
            answer = defence(*query)
            assert (answer.passes, answer.tokens) == (len(seen), sum(seen))
            assert answer.passes > 1
    hook.remove()


def test_steps_that_a_graph_stands_for_are_counted(model, processor, profiles, monkeypatch):
    names = ["undefended", "moras", "moras-sequential", "autosteer"]
    expected = counts(model, processor, profiles, names)
    graphs = Graphs()
    monkeypatch.setattr(batch, "capture", graphs)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"})
    monkeypatch.setattr("ras_fast.engine.runner.WIDTH", 1)  # no prompt is padded
    assert counts(model, processor, profiles, names) == expected
    assert graphs.replays > graphs.made > 0


def test_a_constant_risk_steers_a_model_whose_vision_tower_has_another_dtype(processor):
    model = tiny_llava(processor).to(torch.bfloat16)
    model.model.vision_tower.float()  # which comes first, and so is the model's dtype
    assert (model.dtype, model.lm_head.weight.dtype) == (torch.float32, torch.bfloat16)
    defences = make_defences(["constant-1"], model, processor, {"moras": make_profile(model, processor)}, 4)
    assert defences["constant-1"]("w3 ?", []).text


def test_names_are_checked_against_what_the_profiles_can_be_made_into():
    staged = {"ras": "ras", "moras+attention": "moras", "projection": "projection"}
    check_names(["undefended", "prompt-only", "constant-0.5", "ras-binary", "moras+attention-sequential", "projection"], staged)
    for name in ("projection-binary", "autosteer", "ras-", "moras"):
        with pytest.raises(ValueError, match=f"defence '{name}' is unknown; with these profiles there are "):
            check_names([name], staged)
    for name in ("constant-x", "constant-1.5", "constant-nan"):
        with pytest.raises(ValueError, match=rf"defence '{name}' needs a number in \[0, 1\]"):
            check_names([name], staged)
    for name in ("prompt-only", "constant-0.5"):
        with pytest.raises(ValueError, match=f"defence '{name}' is unknown"):
            check_names([name], {"projection": "projection"})
