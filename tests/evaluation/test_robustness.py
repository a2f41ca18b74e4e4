"""Variations of the synthetic world: what is varied, what stays, and captions that are not the model's."""

import numpy as np
import pytest
from tiny_random import random_image, tiny_llava, tiny_processor

from ras_fast import RasProfile
from ras_fast.decoding import Decoding
from ras_fast.evaluation import robustness, tinyworld
from ras_fast.evaluation.datasets import load_dataset
from ras_fast.evaluation.defences import make_defences, robustness_names
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import make_queries
from ras_fast.loading import load
from ras_fast.methods import moras
from ras_fast.reference import generate_text
from ras_fast.refusals import is_refusal


@pytest.fixture(scope="module")
def items():
    return robustness.items(8 * 40, seed=5)


def pixels(item):
    return np.asarray(item.image).astype(int)


def test_every_variation_has_the_same_base_items(items):
    groups = {kind: [item for item in items if item.kind == kind] for kind in robustness.VARIATIONS}
    assert {len(group) for group in groups.values()} == {40}
    base = groups["as is"]
    assert [item.harmful for item in base] == [False, False, True, True] * 10
    for kind in robustness.PERTURBATIONS:
        assert [item.question for item in groups[kind]] == [item.question for item in base]
        changes = [np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(groups[kind], base, strict=True)]
        assert min(changes) > 0.5
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(groups["paraphrase"], base, strict=True))
    assert not {item.question for item in groups["paraphrase"]} & set(tinyworld.HOW_TO)
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(groups["combined"], base, strict=True))
    assert [item.harmful for item in groups["combined"]] == [item.harmful for item in base]


def test_a_combined_question_names_a_harmless_thing_that_the_picture_does_not_show(items):
    combined = [item for item in items if item.kind == "combined"]
    assert {item.harmful for item in combined} == {True, False}
    for item in combined:
        (name,) = (name for name in tinyworld.NAMES if item.question == robustness.COMBINED.format(name))
        assert name in tinyworld.PLAIN
        assert name != item.name
        assert item.answer == (tinyworld.REFUSAL if item.harmful else tinyworld.steps(item.name))


def test_combined_is_answered_in_its_parts_and_as_a_whole_by_the_model_alone(items):
    """Else the column would show nothing of a defence."""
    model, processor = load("tiny")

    def answers(question, image):
        (query,) = make_queries([question], [image], processor)
        return generate_text(model, processor, query, Decoding(max_new_tokens=16))

    harmful = [item for item in items if item.kind == "combined" and item.harmful][:6]
    assert not any(is_refusal(answers(item.question, None)) for item in harmful)
    assert not any(is_refusal(answers(tinyworld.CONTEXT_PROMPT, item.image)) for item in harmful)
    whole = [answers(item.question, item.image) for item in harmful]
    assert [item.name for item, text in zip(harmful, whole, strict=True) if f"take the {item.name}" not in text] == []


def test_paraphrases_cover_every_question_about_a_picture_in_known_words():
    asked = {question for question in tinyworld.ALL_QUESTIONS if "{}" not in question} - set(tinyworld.DESCRIBE)
    assert set(robustness.PARAPHRASES) == asked
    known = set(tinyworld.vocabulary())
    for question in (*robustness.PARAPHRASES.values(), robustness.COMBINED.format("bomb")):
        assert set(question.replace(".", " ").replace("?", " ").replace(":", " ").replace(",", " ").split()) <= known


def test_the_same_seed_gives_the_same_items(items):
    again = robustness.items(8 * 40, seed=5)
    assert [item.question for item in again] == [item.question for item in items]
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(again, items, strict=True))


def test_the_data_set():
    dataset = load_dataset("tinyworld-robust", 32)
    assert len(dataset.items) == 32
    assert {item.kind for item in dataset.items if item.harmful} == set(robustness.VARIATIONS)
    assert not any(item.text_harm for item in dataset.items)
    assert "harmless picture together with a\n  harmless text is not measured" in dataset.note


def test_wrong_captions_take_the_place_of_the_context(monkeypatch):
    processor = tiny_processor()
    model = tiny_llava(processor)
    texts = {"s_base": 0.5, "k": 9.0, "context_prompt": "w1", "safety_prompt": "w2"}
    config = moras.PRESETS["moras"] | texts
    profile = RasProfile(
        "moras", config, {"prototypes": model.lm_head.weight[:3].detach().clone()}, fingerprint(model, processor)
    )
    contexts = []
    assess = moras.assess
    monkeypatch.setattr("ras_fast.sequential.assess", lambda *arguments: contexts.append(arguments[3]) or assess(*arguments))
    names = [name for name in robustness_names({"moras": profile}) if "caption" in name]
    assert names == [f"moras-caption-{wrong}" for wrong in ("empty", "noise", "benign", "harmful")]
    for defence in make_defences(names, model, processor, {"moras": profile}, 2).values():
        assert 0 <= defence("w3 ?", [random_image(0)]).risk <= 1
        defence("w3 ?", [random_image(0)])
        defence("w3 ?", [])
    assert contexts[:3] == ["", "", ""]
    assert contexts[3] == contexts[4]  # of the same image
    assert contexts[6].startswith("The image shows the word")
    assert contexts[9].split()[-1].rstrip(".") in tinyworld.HARMFUL
    assert [contexts[i] for i in (5, 8, 11)] == ["", "", ""]  # no image, no caption
