"""Profiles without stages of their own through the engine: the tokens of `generate` with the method attached."""

import numpy as np
import pytest
import torch
from tiny_random import endless_llava, random_image, random_words

import ras_fast
from ras_fast.engine import SafeGenerator, workspace
from ras_fast.engine.batch import Batch
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import encode, make_queries
from ras_fast.methods import attach
from ras_fast.methods.projection import Condition, from_vectors
from ras_fast.patching import Patch
from ras_fast.profile import RasProfile

NEW_TOKENS = 8


def projection(model, processor, alpha=4.0, layers=(0, 1), condition=None):
    torch.manual_seed(3)
    return from_vectors(model, processor, torch.randn(32), alpha=alpha, layers=layers, condition=condition)


def conditional(model, processor):
    torch.manual_seed(5)
    return projection(model, processor, layers=[1], condition=Condition(0, torch.randn(32), threshold=0.0))


def attention(model, processor):
    torch.manual_seed(4)
    tensors = {
        "prototypes": torch.randn(3, 32),
        "attention_weights": torch.tensor([30.0, -20.0, 5.0, 10.0, -15.0, -5.0]),
        "attention_bias": torch.tensor([-1.0]),
    }
    return RasProfile("attention", {"heads": [[0, 1], [1, 3]]}, tensors, fingerprint(model, processor))


def autosteer(model, processor):
    """The gate opens for some of the prompts."""
    torch.manual_seed(6)
    shapes = {"in.weight": (8, 32), "in.bias": (8,), "out.weight": (2, 8), "out.bias": (2,)}
    tensors = {f"prober_{name}": torch.randn(shape) for name, shape in shapes.items()}
    tensors["refusal"] = torch.randn(32, 32)
    config = {"layer": 1, "strength": 5.0, "threshold": 0.5}
    return RasProfile("autosteer", config, tensors, fingerprint(model, processor))


PROFILES = [projection, conditional, attention, autosteer]


def queries(count=7):
    prompts = [random_words(900 + i, 2 + i % 4) for i in range(count)]
    images = [None if i % 3 == 2 else [random_image(50 + n) for n in range(i, i + 1 + (i == 4))] for i in range(count)]
    return prompts, images


def attached(model, processor, profile, prompts, images):
    """(tokens, risk) of each query by `model.generate`."""
    answers = []
    with ras_fast.patch(model) as patch:
        for query in make_queries(prompts, images, processor):
            inputs, _ = encode(processor, query, "cpu", torch.float32)
            with attach(patch, profile) as method:
                out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers.append((out[0, inputs["input_ids"].shape[1] :].tolist(), method.risk.item()))
    return answers


@pytest.mark.parametrize("make", PROFILES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_exact(model, processor, make, batch_size):
    profile, (prompts, images) = make(model, processor), queries()
    expected = attached(model, processor, profile, prompts, images)
    with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    assert [output.tokens for output in outputs] == [tokens for tokens, _ in expected]
    assert [output.risk for output in outputs] == pytest.approx([risk for _, risk in expected], abs=1e-4)
    assert {output.failed_closed for output in outputs} == {None}
    assert all(list(output.timings) == ["prompt", "answer", "first_token", "total"] for output in outputs)
    plain = [output.tokens for output in undefended(model, processor, prompts, images)]
    assert plain != [output.tokens for output in outputs]
    if make is not projection:
        assert len({round(output.risk, 3) for output in outputs}) > 1


@pytest.mark.parametrize("make", [conditional, attention, autosteer])
def test_a_batch_whose_longest_prompt_ends_first(processor, make):
    """The others' steps, by which some methods steer, count on."""
    model = endless_llava(processor, layers=2)
    profile, prompts, images = (
        make(model, processor),
        [random_words(100, 5), random_words(500, 3)],
        [random_image(0), random_image(9)],
    )
    (longest, _), _ = attached(model, processor, profile, prompts, images)
    model.generation_config.eos_token_id = longest[0]
    expected = [tokens for tokens, _ in attached(model, processor, profile, prompts, images)]
    assert len(expected[0]) == 1 < len(expected[1])
    with SafeGenerator(model, processor, profile) as guard:
        assert [output.tokens for output in guard.generate(prompts, images, max_new_tokens=NEW_TOKENS)] == expected


def undefended(model, processor, prompts, images):
    with SafeGenerator(model, processor, projection(model, processor, alpha=1e-30)) as guard:
        return guard.generate(prompts, images, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("make", PROFILES)
def test_pixels_that_are_not_finite_get_no_answer_and_touch_no_other_query(model, processor, make):
    profile, (prompts, images) = make(model, processor), queries(4)
    with SafeGenerator(model, processor, profile) as guard:
        before = guard.generate(prompts, images, max_new_tokens=4)
        images[1] = np.full((8, 8, 3), np.nan)
        outputs = guard.generate(prompts, images, max_new_tokens=4)
        assert "failed closed 1" in guard.explain()
    assert [o.tokens for i, o in enumerate(outputs) if i != 1] == [o.tokens for i, o in enumerate(before) if i != 1]
    assert (outputs[1].risk, outputs[1].tokens) == (1, [])
    assert "NaN or infinite pixels" in outputs[1].failed_closed
    assert guard.counters["failed_closed"] == 1


def test_a_risk_that_cannot_be_computed_is_said(model, processor, monkeypatch):
    profile, (prompts, images) = attention(model, processor), queries(3)
    read = ras_fast.methods.attention.features_so_far
    monkeypatch.setattr("ras_fast.methods.attention.features_so_far", lambda *args: (torch.nan * read(*args)[0], None))
    with SafeGenerator(model, processor, profile, batch_size=3) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=4)
    refusal = model.lm_head(profile.tensors["prototypes"]).argmax(-1).tolist()
    for output, image in zip(outputs, images, strict=True):
        if image is not None:
            assert (output.risk, output.failed_closed) == (1, "the risk could not be computed")
            assert output.tokens[:3] == refusal


@pytest.mark.parametrize("make", PROFILES)
def test_without_an_end_token_a_query_that_is_not_finite_ends_alone(processor, make):
    model = endless_llava(processor, layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("w77")] = torch.nan
    profile, prompts = make(model, processor), ["w1 w2", "w3 w77", "w4"]
    with SafeGenerator(model, processor, profile, sync_every=2) as guard:
        alone = guard.generate([prompts[0], prompts[2]], max_new_tokens=5)
        outputs = guard.generate(prompts, max_new_tokens=5)
    assert [outputs[0].tokens, outputs[2].tokens] == [output.tokens for output in alone]
    assert len(outputs[1].tokens) < 5
    assert outputs[1].failed_closed
    assert guard.counters["failed_closed"] == 1


def test_out_of_memory_splits_a_batch_of_several_groups(model, processor, monkeypatch):
    """Prompts with and without an image, each group with a pool: those of the attempt itself are no reason to try the same
    again."""
    (prompts, images), profile, asked = queries(6), autosteer(model, processor), []
    with SafeGenerator(model, processor, profile) as guard:
        expected = [output.tokens for output in guard.generate(prompts, images, max_new_tokens=4)]
    lend = workspace.Workspaces.lend

    def tight(self, rows, *slots):
        asked.append(rows)
        if sum(space.rows for space in self._kept.values()) + rows > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return lend(self, rows, *slots)

    monkeypatch.setattr(workspace.Workspaces, "lend", tight)
    with SafeGenerator(model, processor, profile) as guard:
        with pytest.warns(UserWarning, match="out of memory with 6 queries in a batch: going on with 3"):
            outputs = guard.generate(prompts, images, max_new_tokens=4)
        assert [output.tokens for output in outputs] == expected
        assert (guard.counters["memory_splits"], len(asked)) == (1, 6)
        # Pools that were there before are freed first.
        assert sum(space.rows for space in guard._runner.workspaces._kept.values()) > 1
        assert guard.generate(prompts[:5], [images[0]] * 5, max_new_tokens=4)
        assert guard.counters["memory_splits"] == 1


def test_sampling_does_not_depend_on_the_batch(model, processor):
    prompts, images = queries(5)
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "repetition_penalty": 1.2, "seed": 3}
    profile = conditional(model, processor)
    alone, together = (SafeGenerator(model, processor, profile, batch_size=size) for size in (1, 5))
    expected = alone.generate(prompts, images, **options)
    alone.close()
    outputs = together.generate(prompts, images, **options)
    together.close()
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]


def test_region_mass_and_streaming(model, processor):
    class Recorder:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value.tolist())

        def end(self):
            self.values.append("end")

    streamer = Recorder()
    with SafeGenerator(model, processor, attention(model, processor), region_mass=True) as guard:
        (output,) = guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=4, streamer=streamer)
    prompt, *shown, end = streamer.values
    assert processor.tokenizer.decode(prompt).endswith("ASSISTANT :")
    assert [token for value in shown for token in value] == output.tokens
    assert end == "end"
    assert output.region_mass.shape == (2, 4, 1)
    assert ((output.region_mass > 0) & (output.region_mass < 1)).all()


def test_a_profile_that_does_not_fit_is_refused_at_once_and_leaves_the_model_unpatched(model, processor):
    profile = projection(model, processor)
    profile.config["layers"] = [0, 7]
    with pytest.raises(ValueError, match="layer 7"):
        SafeGenerator(model, processor, profile)
    assert Patch.of(model) is None
    with pytest.raises(ValueError, match="needs the patched model"):
        SafeGenerator(model, processor, projection(model, processor), fused=False)


@pytest.mark.parametrize("make", PROFILES)
def test_words_put_into_the_assistants_mouth_are_refused(model, processor, make):
    """They would be what is judged. A chat with earlier answers is answered."""
    first, answer = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
    with SafeGenerator(model, processor, make(model, processor)) as guard:
        with pytest.raises(ValueError, match=r"prompts\[1\] ends in an assistant message"):
            guard.generate(["w1", [first, answer]], max_new_tokens=2)
        (output,) = guard.generate([[first, answer, first]], max_new_tokens=2)
    assert len(output.tokens) > 0


@pytest.mark.parametrize("make", PROFILES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_an_interruption_shows_nothing_and_leaves_nothing_attached(model, processor, monkeypatch, make, error):
    def hooks():
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)

    guard = SafeGenerator(model, processor, make(model, processor))
    (expected,) = guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=3)
    guard.close()
    before, shown = hooks(), []  # transformers leaves hooks of its own on modules that have run
    streamer = type("Streamer", (), {"put": lambda self, value: shown.append(value), "end": lambda self: None})()

    def stop(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "prompts", stop)
        with pytest.raises(error):
            guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=3, streamer=streamer)
    assert shown == []
    assert (Patch.of(model) is None) == (error is KeyboardInterrupt)
    assert guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=3)[0].tokens == expected.tokens
    guard.close()
    assert Patch.of(model) is None
    assert hooks() == before
