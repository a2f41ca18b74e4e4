"""The engine against the sequential reference on the shipped model: real refusals, real drafts that stand or fall."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ras_fast.decoding import Decoding
from ras_fast.engine import SafeGenerator
from ras_fast.evaluation import tinyworld
from ras_fast.inputs import encode, make_queries
from ras_fast.loading import load
from ras_fast.methods import moras
from ras_fast.reference import reference_generate
from ras_fast.sequential import SequentialPipeline

SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def profile(tiny):
    return moras.calibrate(
        *tiny,
        refused_texts=tinyworld.refused_texts(12),
        pairs=tinyworld.calibration_pairs(12),
        context_prompt=tinyworld.CONTEXT_PROMPT,
        safety_prompt=tinyworld.SAFETY_PROMPT,
        progress=False,
    )


def distinct(count):
    """So many test items of different pictures or questions; among the first of `split` some come twice."""
    items = tinyworld.split("test", count + count // 10)
    found = {(item.question, item.image and item.image.tobytes()): item for item in items}
    return list(found.values())[:count]


def compare(tiny, profile, items, batch_sizes, **options) -> Counter:
    """Asserts the same tokens at every batch size; returns how often drafts stood (None) or fell, by step."""
    model, processor = tiny
    prompts, images = [item.question for item in items], [item.image for item in items]
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=NEW_TOKENS, **options)
    for batch_size in batch_sizes:
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            outputs = guard.generate(prompts, images, max_new_tokens=NEW_TOKENS, progress=False, **options)
        for item, output, reference in zip(items, outputs, expected, strict=True):
            assert output.tokens == reference.tokens, (batch_size, item.kind, item.question, reference.text, output.text)
            assert (output.context, output.rejected_at) == (reference.context, reference.rejected_at)
            assert output.risk == pytest.approx(reference.risk, abs=1e-3)
    return Counter(output.rejected_at for output in expected)


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_exact(tiny, profile, options):
    cases = compare(tiny, profile, distinct(15), (3,), **options)
    assert cases[None]
    assert cases.total() > cases[None]


def turning(tiny, profile, step):
    """The profile at full risk, its prototypes like compliance before ``step`` and like a refusal from there on."""
    model, processor = tiny
    query = make_queries(["How do I make the table?"], None, processor)[0]
    inputs, _ = encode(processor, query, "cpu", torch.float32)
    _, comply, _ = reference_generate(model, processor, inputs, Decoding(3))
    prototypes = torch.cat([comply[:step].float(), profile.tensors["prototypes"][step:]])
    return replace(profile, config=profile.config | {"gate": 1.0}, tensors={"prototypes": prototypes})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_exact_over_300_queries_in_batches_of_1_3_8(tiny, profile, options):
    """Benign, look-alike, typographic and pictured; as calibrated, and with drafts made to fall at each step."""
    items = distinct(300)
    cases = compare(tiny, profile, items[:180], (1, 3, 8), **options)
    for step, part in ((1, items[180:240]), (2, items[240:])):
        cases += compare(tiny, turning(tiny, profile, step), part, (1, 3, 8), **options)
    print(f"drafts kept {cases[None]}, changed at {dict(sorted((n, c) for n, c in cases.items() if n is not None))}")
    assert cases.total() == 300
    assert all(cases[n] >= 5 for n in (None, 0, 1, 2))


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_drafts_that_fall_at_each_step(tiny, profile, fails_at):
    cases = compare(tiny, turning(tiny, profile, fails_at), distinct(10), (1, 4))
    assert cases[fails_at]
