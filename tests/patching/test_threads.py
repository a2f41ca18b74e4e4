"""Forwards of one patched model in several threads at once: the statistics of each are those of its own images."""

import threading

import pytest
import torch
from families import FAMILIES
from tiny_models import inputs, llava

import ras_fast
from ras_fast.patching.cache_values import cache_name, returned_cache

NAMES = ["llava", "qwen3_vl", "gemma3", "idefics3", "mllama"]


def meanwhile(module, first, second):
    """(first(), second()), the latter wholly run by another thread at the moment when the former calls `module`."""
    results = []

    def interrupt(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: results.append(second()))
        thread.start()
        thread.join(60)

    handle = module.register_forward_pre_hook(interrupt)
    try:
        return first(), *results
    finally:
        handle.remove()


def statistics(model, batch):
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    return [output.logits, *output.attentions]


def same(got, expected):
    """Within rounding: an interrupted layer's norm is computed again."""
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def places(model):
    """Where a forward is interrupted: before its images are found, and between two layers."""
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    vision = next(module for name, module in model.named_modules() if name.rsplit(".", 1)[-1].startswith(("vision", "visual")))
    return vision, text.layers[2]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_statistics(name, place):
    """Of other numbers of rows, images and tokens; also under a forward that takes none, and over one."""
    family = FAMILIES[name]
    model = family.model(name)
    first, second = (family.inputs(model, rows, seed=len(rows)) for rows in (["ttItt", "tIttItt"], ["tIttt"]))
    for batch in (first, second):
        del batch["regions"]
    with ras_fast.patch(model):
        expected = statistics(model, first), statistics(model, second)
        with torch.no_grad():
            plain = model(**second).logits
        where = places(model)[place]
        got = meanwhile(where, lambda: statistics(model, first), lambda: statistics(model, second))
        assert same(got[0], expected[0])
        assert same(got[1], expected[1])

        def without():
            with torch.no_grad():
                output = model(**second)
            assert not output.attentions
            return output.logits

        observed, logits = meanwhile(where, lambda: statistics(model, first), without)
        assert same(observed, expected[0])
        assert same([logits], [plain])
        logits, observed = meanwhile(where, without, lambda: statistics(model, first))
        assert same(observed, expected[0])
        assert same([logits], [plain])


def test_the_maps_on_the_caches():
    """Steps that follow interleaved prompts find the map of their own one."""
    model = llava()
    batches = inputs(["tItIt", "ttItt"]), inputs(["ttttt"])
    step = {"input_ids": torch.tensor([[7]])}

    def prompt(batch):
        with torch.no_grad():
            return returned_cache(model(**batch, use_cache=True))

    def masses(batch, past):
        rows = len(batch["input_ids"])
        return statistics(model, {"input_ids": step["input_ids"].expand(rows, 1), cache_name(model): past})

    with ras_fast.patch(model):
        expected = [masses(batch, prompt(batch)) for batch in batches]
        caches = meanwhile(model.model.vision_tower, lambda: prompt(batches[0]), lambda: prompt(batches[1]))
        for batch, past, alone in zip(batches, caches, expected, strict=True):
            assert same(masses(batch, past), alone)


def test_the_map_that_a_forward_sees_and_leaves():
    """Inside a forward it is its own; outside, that of the last forward, whichever thread ran it."""
    model, first, second = llava(), inputs(["tItIt"]), inputs(["ttItt", "tIttt"])
    seen = []
    with ras_fast.patch(model) as patched:
        hook = model.model.language_model.norm.register_forward_hook(lambda *_: seen.append(patched.region_map.ids.shape[0]))
        meanwhile(model.model.language_model.layers[1], lambda: statistics(model, first), lambda: statistics(model, second))
        hook.remove()
        assert seen == [2, 1]
        thread = threading.Thread(target=statistics, args=(model, second))
        thread.start()
        thread.join(60)
        assert patched.region_map.ids.shape[0] == 2


@pytest.mark.parametrize("place", [0, 1])
def test_region_bias(place):
    model, first, second = llava(), inputs(["tItIt", "ttItt"]), inputs(["ttttt"])
    with ras_fast.patch(model) as patched:
        patched.set_region_bias(torch.ones(6))
        expected = statistics(model, first), statistics(model, second)
        got = meanwhile(places(model)[place], lambda: statistics(model, first), lambda: statistics(model, second))
    assert same(got[0], expected[0])
    assert same(got[1], expected[1])


def test_collect_is_of_one_forward_at_a_time():
    model, first, second = llava(), inputs(["tItIt"]), inputs(["ttItt", "tIttt"])

    def run(batch):
        with torch.no_grad():
            model(**batch)

    with ras_fast.patch(model) as patched, patched.collect() as collected:
        run(second)
        expected = dict(collected.mass)
        with pytest.raises(RuntimeError, match="another thread's forward"):
            meanwhile(model.model.language_model.layers[1], lambda: run(first), lambda: run(second))
        assert same(collected.mass.values(), expected.values())  # the other thread's are whole
        run(first)  # afterwards all is well
        assert collected.mass[0].shape == (1, 6, 1, 2)


def test_a_forward_that_fails_is_over():
    """What another thread runs then is the last forward again."""
    model, batch = llava(), inputs(["tItIt"])
    with ras_fast.patch(model) as patched:
        for module in places(model):
            handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
            with torch.no_grad(), pytest.raises(ZeroDivisionError):
                model(**batch)
            handle.remove()
            thread = threading.Thread(target=statistics, args=(model, inputs(["tt", "tI"])))
            thread.start()
            thread.join(60)
            assert patched.region_map.ids.shape[0] == 2
