"""The engine against the three calls made one after another, on a LLaVA of random weights."""

import copy
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
from test_engine_one_pass import PROFILES, autosteer
from tiny_random import IMAGES_LAST, endless_llava, random_image, random_words, tiny_llava, tiny_processor
from torch.utils.hooks import RemovableHandle
from transformers import LogitsProcessor, SuppressTokensLogitsProcessor, TextIteratorStreamer

import ras_fast
from ras_fast import inputs
from ras_fast.backend import forced_backend
from ras_fast.engine import SafeGenerator, batch, kv_cache
from ras_fast.engine.watch import Watch
from ras_fast.fingerprint import fingerprint
from ras_fast.methods.moras import PRESETS
from ras_fast.methods.prompt_state import replaced
from ras_fast.model_lock import lock_of
from ras_fast.patching import Patch
from ras_fast.profile import RasProfile
from ras_fast.reference import _own_config_set_aside
from ras_fast.sequential import SequentialPipeline

NEW_TOKENS = 14
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 11}


def make_profile(model, processor, **changes):
    """Prototypes are real states of the model, which makes steering change some tokens and leave others."""
    texts = [processor(text=random_words(i, 6), return_tensors="pt")["input_ids"] for i in range(3)]
    with torch.no_grad():
        states = [model.model(input_ids=ids.to(model.device)).last_hidden_state[0, -1].cpu() for ids in texts]
    config = PRESETS["moras"] | {
        "s_base": 0.15,
        "k": 6.0,
        "context_prompt": "w1 w2 w3",
        "safety_prompt": "w4 w5 w6 w7 w8",
        "max_context_tokens": 8,
    }
    return RasProfile("moras", config | changes, {"prototypes": torch.stack(states)}, fingerprint(model, processor))


@pytest.fixture(scope="module")
def profile(model, processor):
    return make_profile(model, processor)


def make_queries(count, seed=0):
    """Prompts of many lengths: with one image, two, none, in a chat, with an assistant prefix."""
    prompts, images = [], []
    for i in range(seed, seed + count):
        question, image = random_words(1000 + i, 2 + i % 9), random_image(i)
        if i % 6 == 1:
            question, image = (
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": random_words(2000 + i, 3)},
                    {"role": "user", "content": random_words(3000 + i, 4)},
                ],
                image,
            )
        elif i % 6 == 2:
            image = [image, random_image(500 + i)]
        elif i % 6 == 3:
            image = None
        elif i % 6 == 4:
            question = [{"role": "user", "content": question}, {"role": "assistant", "content": random_words(i, 2)}]
        prompts.append(question)
        images.append(image)
    return prompts, images


def assert_same(outputs, references):
    for output, reference in zip(outputs, references, strict=True):
        assert output.tokens == reference.tokens
        assert output.context == reference.context
        assert output.rejected_at == reference.rejected_at
        assert (output.failed_closed is None) == (reference.failed_closed is None)
        assert output.text == reference.text
        assert output.risk == pytest.approx(reference.risk, abs=1e-4, nan_ok=True)
        assert output.similarity == pytest.approx(reference.similarity, abs=1e-4, nan_ok=True)


@pytest.fixture
def reference(model, processor, profile):
    assert Patch.of(model) is None
    return SequentialPipeline(model, processor, profile)


@pytest.fixture(scope="module", params=[{}, SAMPLING], ids=["greedy", "sampling"])
def answered(request, model, processor, profile):
    """(options, prompts, images, the reference's answers)."""
    prompts, images = make_queries(18)
    pipeline = SequentialPipeline(model, processor, profile)
    return request.param, prompts, images, pipeline.generate(prompts, images, max_new_tokens=NEW_TOKENS, **request.param)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_exact(model, processor, profile, answered, batch_size, fused):
    options, prompts, images, expected = answered
    with SafeGenerator(model, processor, profile, batch_size=batch_size, fused=fused) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=NEW_TOKENS, **options), expected)
    assert {output.rejected_at for output in expected} >= {0, 1, 2}


def test_adapters(model, processor):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    profile = make_profile(wrapped.get_base_model(), processor)
    with pytest.raises(ValueError, match=r"calibrated on another model \(adapters: profile None, .*; decoder: "):
        SafeGenerator(wrapped, processor, make_profile(model, processor))
    prompts, images = make_queries(6)
    with SafeGenerator(wrapped, processor, profile) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    assert_same(outputs, SequentialPipeline(wrapped, processor, profile).generate(prompts, images, max_new_tokens=NEW_TOKENS))


def with_adapters(model):
    """(a PEFT model with the adapters a and b, of which a acts; the transformers model inside)."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="a")
    wrapped.add_adapter("b", config)
    wrapped.set_adapter("a")
    return wrapped.eval(), wrapped.get_base_model()


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


SWITCHES = {
    "another": lambda wrapped: wrapped.set_adapter("b"),
    "off": lambda wrapped: wrapped.base_model.disable_adapter_layers(),
    "scaled": lambda wrapped: [layer.scale_layer(0.5) for layer in lora_layers(wrapped)],
    "merged": lambda wrapped: wrapped.merge_adapter(),
}
RETURNS = {
    "another": lambda wrapped: wrapped.set_adapter("a"),
    "off": lambda wrapped: wrapped.base_model.enable_adapter_layers(),
    "scaled": lambda wrapped: [layer.unscale_layer() for layer in lora_layers(wrapped)],
    "merged": lambda wrapped: wrapped.unmerge_adapter(),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_profile_of_one_adapter_is_refused_while_another_acts(model, processor, switch):
    wrapped, inner = with_adapters(model)
    profile = make_profile(inner, processor)
    prompts, images = make_queries(3)
    pipeline = SequentialPipeline(wrapped, processor, profile)
    expected = pipeline.generate(prompts, images, max_new_tokens=6)
    with SafeGenerator(wrapped, processor, profile, cache_bytes=10**7) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)
        SWITCHES[switch](wrapped)
        for generate in (guard.generate, pipeline.generate, lambda *args: SafeGenerator(wrapped, processor, profile)):
            with pytest.raises(ValueError, match=r"calibrated on another model \(.*adapters: profile 'a × 2\.0', model '"):
                generate(prompts, images)
        with SafeGenerator(wrapped, processor, make_profile(inner, processor)) as other:
            assert other.generate(prompts, images, max_new_tokens=6)[0].tokens
        if switch == "merged":
            return  # and back, the weights are the same but for rounding
        RETURNS[switch](wrapped)
        assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)


def test_soft_prompts_are_refused(model, processor, profile):
    peft = pytest.importorskip("peft")
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4, "num_transformer_submodules": 1}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with pytest.raises(ValueError, match="soft prompts"):
        SafeGenerator(wrapped, processor, profile)


def test_sampling_depends_on_the_seed_and_follows_the_distribution(model, processor, profile):
    guard = SafeGenerator(model, processor, make_profile(model, processor, gate=0.0), fused=False, batch_size=400)
    draws = [output.tokens[0] for output in guard.generate(["w1"] * 400, max_new_tokens=1, do_sample=True, temperature=0.7)]
    again = guard.generate(["w1"] * 20, max_new_tokens=1, do_sample=True, temperature=0.7, seed=1)
    assert [output.tokens[0] for output in again] != draws[:20]
    ids = processor(text="<bos> USER : w1 ASSISTANT :", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = (model(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor(draws), minlength=len(probabilities)) / 400
    # Four standard errors for every token.
    assert ((counts - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 400).sqrt() + 1e-2).all()


def test_end_of_sequence_in_every_stage(model, processor, profile, reference, monkeypatch):
    prompts, images = make_queries(18)
    plain = reference.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    guards = [SafeGenerator(model, processor, profile, batch_size=size, fused=False) for size in (1, 8)]
    common = [token for token, _ in Counter(t for output in plain for t in output.tokens).most_common(6)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", common[1::2])
    expected = reference.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    assert any(len(output.tokens) < 3 for output in expected)
    assert any(3 <= len(output.tokens) < NEW_TOKENS for output in expected)
    assert any(output.context == "" for output, image in zip(expected, images, strict=True) if image)
    for guard in guards:  # made when the model had other end-of-sequence tokens
        assert_same(guard.generate(prompts, images, max_new_tokens=NEW_TOKENS), expected)


def test_risk_stage_that_ends_early_uses_the_steps_there_are(model, processor, profile, reference, monkeypatch):
    lengths = []
    similarity = reference.moras.similarity
    monkeypatch.setattr(reference.moras, "similarity", lambda x: lengths.append(x.shape[1]) or similarity(x))
    prompts, images = make_queries(12)
    plain = reference.generate(prompts, images, max_new_tokens=4)
    for token in range(len(processor.tokenizer)):
        monkeypatch.setattr(model.generation_config, "eos_token_id", token)
        lengths.clear()
        expected = reference.generate(prompts[:3], images[:3], max_new_tokens=4)
        if {1, 3} <= set(lengths) or {2, 3} <= set(lengths):
            break
    else:
        pytest.fail(f"no token ends some risk stages early and not others; without: {plain}")
    assert_same(
        SafeGenerator(model, processor, profile, fused=False).generate(prompts[:3], images[:3], max_new_tokens=4),
        expected,
    )


def test_stop_strings(model, processor, profile, reference):
    prompts, images = make_queries(12)
    plain = reference.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    by_length = sorted(plain, key=lambda output: len(output.text.split()))
    stops = [by_length[-1].text.split()[1], " ".join(by_length[-2].text.split()[4:6])]
    expected = reference.generate(prompts, images, max_new_tokens=NEW_TOKENS, stop_strings=stops)
    guard = SafeGenerator(model, processor, profile, batch_size=5, fused=False)
    outputs = guard.generate(prompts, images, max_new_tokens=NEW_TOKENS, stop_strings=stops)
    assert_same(outputs, expected)
    assert sum(output.text.endswith(tuple(stops)) for output in outputs) >= 2
    assert any(len(output.tokens) == NEW_TOKENS for output in outputs)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_fewer_new_tokens_than_steered_steps(model, processor, profile, reference, max_new_tokens):
    prompts, images = make_queries(8)
    expected = reference.generate(prompts, images, max_new_tokens=max_new_tokens)
    guard = SafeGenerator(model, processor, profile, batch_size=3, fused=False)
    assert_same(guard.generate(prompts, images, max_new_tokens=max_new_tokens), expected)


@pytest.mark.parametrize("changes", [{"steps": 1}, {"max_context_tokens": 1}, {"gate": "binary"}, {"gate": 0.5}, {"gate": 1.0}])
def test_other_settings(model, processor, changes):
    profile = make_profile(model, processor)
    profile.config |= changes
    profile.tensors["prototypes"] = profile.tensors["prototypes"][: profile.config["steps"]]
    prompts, images = make_queries(8, seed=40)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    guard = SafeGenerator(model, processor, profile, fused=False)
    assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)


def test_risk_zero_is_the_undefended_answer(model, processor):
    guard = SafeGenerator(model, processor, make_profile(model, processor, gate=0.0), fused=False)
    image = random_image(3)
    inputs = processor(
        text="<bos> USER : <image> w5 w6 ASSISTANT :", images=image, add_special_tokens=False, return_tensors="pt"
    )
    plain = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    (output,) = guard.generate(["w5 w6"], [image], max_new_tokens=9)
    assert output.tokens == plain
    assert not output.steered


def test_a_template_that_shares_nothing(model):
    processor = tiny_processor(IMAGES_LAST)
    profile = make_profile(model, processor)
    prompts, images = [random_words(i, 3 + i) for i in range(4)], [random_image(i) for i in range(4)]
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    guard = SafeGenerator(model, processor, profile, fused=False)
    assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)
    assert guard.counters["not_shared"] == 8
    assert "could not 8" in guard.explain()


class Recorder:
    """A transformers streamer."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("seed", [0, 3, 6, 12])
def test_streaming_shows_nothing_before_the_risk_is_known(model, processor, profile, monkeypatch, seed):
    guard, streamer = SafeGenerator(model, processor, profile, fused=False), Recorder()
    prompts, images = make_queries(1, seed=seed)
    (expected,) = guard.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    assess, seen_before_risk = guard.plan._assess, []
    monkeypatch.setattr(guard.plan, "_assess", lambda *args: seen_before_risk.append(list(streamer.values)) or assess(*args))
    guard.generate(prompts, images, max_new_tokens=NEW_TOKENS, streamer=streamer)
    assert seen_before_risk == [[]]
    prompt, *shown = streamer.values
    assert processor.tokenizer.decode(prompt).endswith("ASSISTANT :")
    assert [token for value in shown for token in value] == expected.tokens
    assert streamer.ended == 1


@pytest.mark.parametrize("step", [10, 13, 16])
def test_a_second_attempt_shows_nothing_twice(model, processor, monkeypatch, step):
    """An answer that runs out of memory is tried again where there were pools of other sizes to be freed."""
    guard, streamer = SafeGenerator(model, processor, make_profile(model, processor, gate=0.0)), Recorder()
    (expected,) = guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=20)
    guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=300)
    steps, own = [], batch.Batch.step

    def tight(self, *args, **kwargs):
        steps.append(len(streamer.values))
        if len(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(batch.Batch, "step", tight)
    (output,) = guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=20, streamer=streamer)
    guard.close()
    prompt, *shown = streamer.values
    assert (steps[step - 1] > 0) == (step > 12)  # the middle of stage 1, and of the answer
    assert processor.tokenizer.decode(prompt).endswith("ASSISTANT :")
    assert output.tokens == [token for value in shown for token in value] == expected.tokens
    assert streamer.ended == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_generator_has_no_copies(model, processor, profile, copied):
    with SafeGenerator(model, processor, profile) as guard, pytest.raises(TypeError, match="of one model in one process"):
        copied(guard)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("out of memory")], ids=repr)
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_streamer_that_is_out_of_memory_is_not_the_model(model, processor, profile, error, calls):
    class Full(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == calls:
                raise error

    guard, streamer = SafeGenerator(model, processor, profile, fused=False), Full()
    guard.generate(["w1"], [random_image(0)], max_new_tokens=6)  # keeps pools, which are given up where memory is short
    with pytest.raises(type(error)) as raised:
        guard.generate(["w1"], [random_image(0)], max_new_tokens=6, streamer=streamer)
    assert raised.value is error
    assert (len(streamer.values), streamer.ended) == (calls, 1)
    assert guard.generate(["w1"], [random_image(0)], max_new_tokens=6)


def test_transformers_streamers_work(model, processor, profile):
    guard = SafeGenerator(model, processor, profile, fused=False)
    (expected,) = guard.generate(["w1 w2"], [random_image(1)], max_new_tokens=9)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    arguments = {"images": [random_image(1)], "max_new_tokens": 9, "streamer": streamer}
    thread = threading.Thread(target=guard.generate, args=(["w1 w2"],), kwargs=arguments)
    thread.start()
    assert "".join(streamer).split() == expected.text.split()
    thread.join()
    with pytest.raises(ValueError, match="a streamer takes one prompt"):
        guard.generate(["w1", "w2"], streamer=streamer)


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (["w1", "w2"], {}),
        ([" "], {}),
        (["w1"], {"images": ["nowhere.png"]}),
        (["w1"], {"max_new_tokens": 0}),
        (["w1"], {"num_beams": 2}),
    ],
)
@pytest.mark.parametrize("make", [SequentialPipeline, partial(SafeGenerator, fused=False)], ids=["reference", "engine"])
def test_a_streamer_is_ended_even_where_there_is_nothing_to_answer(model, processor, profile, make, prompts, options):
    """Else the thread that reads it waits for ever."""
    streamer = Recorder()
    with pytest.raises((ValueError, TypeError)):
        make(model, processor, profile).generate(prompts, streamer=streamer, **options)
    assert (streamer.values, streamer.ended) == ([], 1)


def test_the_reference_streams_and_shows_its_progress(model, processor, profile, capsys):
    pipeline, streamer = SequentialPipeline(model, processor, profile), Recorder()
    (output,) = pipeline.generate(["w1"], streamer=streamer, max_new_tokens=3)
    assert [token for value in streamer.values[1:] for token in value] == output.tokens
    assert streamer.ended == 1
    assert "queries" not in capsys.readouterr().err
    pipeline.generate(["w1", "w2"], max_new_tokens=1)
    assert "2/2" in capsys.readouterr().err
    pipeline.generate(["w1", "w2"], max_new_tokens=1, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stage", ["_context_and_draft", "_assess", "_check_drafts", "_finish"])
def test_an_exception_in_a_stage_shows_no_answer_and_leaves_a_usable_engine(model, processor, profile, monkeypatch, stage):
    guard, streamer = SafeGenerator(model, processor, profile), Recorder()

    def fail(*args):
        raise ArithmeticError("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(guard.plan, stage, fail)
        with pytest.raises(ArithmeticError):
            guard.generate(["w1"], [random_image(0)], streamer=streamer)
    assert streamer.values == []
    assert streamer.ended == 1
    assert guard.generate(["w1"], [random_image(0)], max_new_tokens=2)
    guard.close()
    assert Patch.of(model) is None


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_leaves_the_model_unpatched_and_usable(model, processor, profile, monkeypatch):
    guard = SafeGenerator(model, processor, profile)
    (expected,) = guard.generate(["w1"], [random_image(0)], max_new_tokens=4)
    assert Patch.of(model) is not None

    with monkeypatch.context() as patched:
        patched.setattr(guard.plan, "_assess", interrupt)
        with pytest.raises(KeyboardInterrupt):
            guard.generate(["w1"], [random_image(0)])
    assert Patch.of(model) is None
    assert guard.generate(["w1"], [random_image(0)], max_new_tokens=4)[0].tokens == expected.tokens
    guard.close()


def test_ctrl_c_while_images_load_leaves_the_model_unpatched(model, processor, profile, monkeypatch):
    guard = SafeGenerator(model, processor, profile)
    guard.generate(["w1"], [random_image(0)], max_new_tokens=2)
    assert Patch.of(model) is not None
    monkeypatch.setattr(inputs, "load_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        guard.generate(["w1"], [random_image(0)], max_new_tokens=2)
    assert Patch.of(model) is None


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("place", ["patch", "methods", "hooks", "proof"])
def test_ctrl_c_while_a_generator_is_made_leaves_the_model_as_it_was(model, processor, monkeypatch, own, place):
    """Also where it strikes what takes hooks off again, or methods."""

    def state():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
        hooks = [[list(getattr(module, kind)) for kind in kinds] for module in model.modules()]
        return hooks, [module.__dict__.get("forward") for module in model.modules()], set(vars(model))

    def replace_methods(patch, method):
        vars(patch.model)["generate"] = None
        raise KeyboardInterrupt

    def remove(*args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    profile = autosteer(model, processor)
    handle = ras_fast.patch(model) if own else None
    before = state()
    if place == "patch":
        monkeypatch.setattr("ras_fast.engine.one_pass.attached", interrupt)
    elif place == "methods":
        monkeypatch.setattr("ras_fast.engine.one_pass.attached", replace_methods)
    elif place == "hooks":
        monkeypatch.setattr(RemovableHandle, "remove", remove)
        monkeypatch.setattr(RemovableHandle, "__exit__", remove)
        monkeypatch.setattr("ras_fast.patching.undo._remove_hook", remove)
    else:
        monkeypatch.setattr(SafeGenerator, "_prove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SafeGenerator(model, processor, profile)
    assert Patch.of(model) is handle
    assert state() == before
    if own:
        handle.unpatch()


@pytest.mark.parametrize("name", ["method", "generation_config"])
def test_ctrl_c_at_any_line_of_a_change_to_the_model_undoes_it(model, name):
    def change():
        return replaced(model, "generate", lambda method: None) if name == "method" else _own_config_set_aside(model)

    def at_line(frame, event, argument):
        nonlocal left
        if frame.f_code in codes:
            left -= event == "line"
            if left < 0:
                raise KeyboardInterrupt
            return at_line

    codes = {replaced.__wrapped__.__code__, _own_config_set_aside.__wrapped__.__code__}
    config, before, entered, lines = model.generation_config, sys.gettrace(), False, 0
    while not entered:
        left = lines
        sys.settrace(at_line)
        try:
            with change():
                sys.settrace(before)
                entered = True
        except KeyboardInterrupt:
            lines += 1
        finally:
            sys.settrace(before)
        assert model.generation_config is config
        assert "generate" not in vars(model)
    assert lines > 4


class Asking(LogitsProcessor):
    """Runs the model in the middle of an answer, as a processor or as a streamer."""

    def __init__(self, ask):
        self.ask, self.answers = ask, []

    def __call__(self, input_ids, scores):
        self.ask()
        return scores

    def put(self, tokens):
        self.answers += self.ask()

    def end(self):
        pass


@pytest.mark.parametrize("inner", ["guard", "generate"])
@pytest.mark.parametrize("outer", [SafeGenerator, SequentialPipeline])
def test_a_processor_that_asks_the_same_model_is_stopped(model, processor, outer, inner):
    """Its answer would be steered by the risk of another prompt."""
    steered = make_profile(model, processor, s_base=-0.5, k=50.0)
    pipeline, guard = outer(model, processor, steered), SafeGenerator(model, processor, make_profile(model, processor))
    (expected,) = pipeline.generate(["w1 w2"], [random_image(0)], max_new_tokens=4)
    ids = torch.tensor([[2, 20, 21]])
    own = {"guard": lambda: guard.generate(["w3"], max_new_tokens=2), "generate": lambda: model.generate(ids, max_new_tokens=2)}
    with pytest.raises(RuntimeError, match="Asking runs the model in the middle of an answer"):
        pipeline.generate(["w1 w2"], [random_image(0)], max_new_tokens=4, logits_processors=[Asking(own[inner])])
    assert pipeline.generate(["w1 w2"], [random_image(0)], max_new_tokens=4)[0].tokens == expected.tokens
    assert len(own[inner]())
    guard.close()
    if outer is SafeGenerator:
        pipeline.close()


def test_a_streamer_may_ask_between_steps_but_not_within_one(model, processor):
    steered = make_profile(model, processor, s_base=-0.5, k=50.0)
    pipeline, reference = SafeGenerator(model, processor, steered), SequentialPipeline(model, processor, steered)
    guard = SafeGenerator(model, processor, make_profile(model, processor))
    (expected,) = guard.generate(["w3"], max_new_tokens=2)
    asking = Asking(lambda: guard.generate(["w3"], max_new_tokens=2))
    (output,) = pipeline.generate(["w1 w2"], [random_image(0)], max_new_tokens=4, streamer=asking)
    assert {tuple(answer.tokens) for answer in asking.answers} == {tuple(expected.tokens)}
    (wanted,) = reference.generate(["w1 w2"], [random_image(0)], max_new_tokens=4)
    assert output.tokens == wanted.tokens
    with pytest.raises(RuntimeError, match="Asking runs the model"):
        reference.generate(["w1 w2"], [random_image(0)], max_new_tokens=4, streamer=asking)
    guard.close()
    pipeline.close()


@pytest.mark.parametrize("make", PROFILES)
def test_a_streamer_that_asks_the_same_model_is_stopped(model, processor, make):
    """What it asks would be steered, and so would its risk. Nor may it close the generator."""
    staged = make_profile(model, processor)
    others = [
        make(model, processor),
        staged,
        replace(staged, tensors=staged.tensors | {"region_bias": torch.full((2, 4), 3.0)}),
    ]
    own, *inner = (SafeGenerator(model, processor, profile) for profile in others)
    expected = own.generate(["w1 w2"], [random_image(0)], max_new_tokens=4)[0].tokens
    asked = [partial(guard.generate, ["w3"], max_new_tokens=2) for guard in (own, *inner)]
    for ask in [*asked, own.close]:
        streamer = Asking(ask)
        with pytest.raises(RuntimeError, match="Asking runs the model in the middle of an answer"):
            own.generate(["w1 w2"], [random_image(0)], max_new_tokens=4, streamer=streamer)
        assert own.generate(["w1 w2"], [random_image(0)], max_new_tokens=4)[0].tokens == expected
        assert ask == own.close or len(ask())
    for guard in (own, *inner):
        guard.close()


@pytest.mark.parametrize("change", ["forward", "hook", "hook of the text model", "hook of the base model"])
def test_steps_are_steered_whatever_is_done_to_the_fused_last_norm(processor, change):
    """Kernels of the hub put another forward in the place of the fused one, which steers; what a hook gives is steered."""
    model = tiny_llava(processor)
    profile, norm = make_profile(model, processor, gate=0.7), model.model.language_model.norm
    queries = [random_words(i, 4) for i in range(4)], [random_image(i) for i in range(4)]
    with SafeGenerator(model, processor, profile) as guard:
        guard.generate(*queries, max_new_tokens=6)
        if change == "forward":
            norm.forward = MethodType(type(norm).forward, norm)
        elif change == "hook":
            norm.register_forward_hook(lambda module, args, output: output * 1.5)
        else:
            around = model.model.language_model if "text" in change else model.model

            def louder(module, args, output):
                output.last_hidden_state = output.last_hidden_state * 1.5
                return output

            around.register_forward_hook(louder)
        expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6)
        assert_same(guard.generate(*queries, max_new_tokens=6), expected)
        assert any(output.rejected_at is not None for output in expected)


def test_a_users_own_patch_is_used_and_left(model, processor, profile):
    with ras_fast.patch(model) as handle:
        with SafeGenerator(model, processor, profile) as guard:
            guard.generate(["w1"], max_new_tokens=2)
        assert Patch.of(model) is handle
    assert Patch.of(model) is None


def broken_image(kind):
    return np.full((8, 8, 3), np.nan if kind == "nan" else np.inf)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_pixels_that_are_not_finite_fail_closed_for_their_query_alone(model, processor, profile, reference, kind):
    prompts, images = [random_words(i, 4) for i in range(3)], [random_image(i) for i in range(3)]
    guard = SafeGenerator(model, processor, profile, fused=False)
    before = guard.generate(prompts, images, max_new_tokens=6)
    images[1] = broken_image(kind)
    outputs = guard.generate(prompts, images, max_new_tokens=6)
    assert_same([outputs[0], outputs[2]], [before[0], before[2]])
    assert_same(outputs, reference.generate(prompts, images, max_new_tokens=6))
    assert outputs[1].risk == 1
    assert np.isnan(outputs[1].similarity)
    assert "NaN or infinite pixels" in outputs[1].failed_closed
    head = model.lm_head(profile.tensors["prototypes"]).argmax(-1).tolist()
    assert outputs[1].tokens[:3] == head
    assert guard.counters["failed_closed"] == 1


@pytest.mark.parametrize("fused", [False, True])
def test_an_answer_that_goes_on_alone_beside_a_longer_prompt(model, processor, monkeypatch, fused):
    """A step of a single answer takes no mask: it must not see as far as the images of a row that has ended."""
    profile = make_profile(model, processor, gate=0.0, max_context_tokens=2)
    prompts, images = ["w1 w2 w3", "w4"], [[random_image(1), random_image(2)], []]
    plain = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=20)
    end = next(token for token in plain[0].tokens[7:] if token not in plain[0].tokens[:7] + plain[1].tokens)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=20)
    assert 7 < len(expected[0].tokens) < len(expected[1].tokens) == 20
    with SafeGenerator(model, processor, profile, batch_size=2, fused=fused) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=20), expected)


@pytest.mark.parametrize(("value", "fused"), [(float("nan"), False), (float("nan"), True), (float("inf"), True)])
def test_a_model_that_overflows_fails_closed_for_its_row_alone(model, processor, profile, monkeypatch, value, fused):
    """NaN in the keys of one query's prefix: every later state of that query is NaN."""
    prompts, images = [random_words(i, 4) for i in range(3)], [random_image(i) for i in range(3)]
    guard = SafeGenerator(model, processor, profile, fused=fused)
    before = guard.generate(prompts, images, max_new_tokens=6)
    prefill = batch.Batch.prefill

    def overflowing(self, *args):
        prefill(self, *args)
        self.pool.layers[0].values[1, :, self.origin + 4] = value

    monkeypatch.setattr(batch.Batch, "prefill", overflowing)
    outputs = guard.generate(prompts, images, max_new_tokens=6)
    assert_same([outputs[0], outputs[2]], [before[0], before[2]])
    assert outputs[1].risk == 1
    assert outputs[1].failed_closed == "the risk could not be computed"
    refusal = model.lm_head(profile.tensors["prototypes"]).argmax(-1).tolist()
    assert outputs[1].tokens == [*refusal, processor.tokenizer.eos_token_id]
    guard.close()


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_rejected_draft_left_does_not_reach_the_answer(model, processor, monkeypatch, fused):
    """Beside a longer row, steps run over the slots of tokens that the draft was fed beyond the one it fell at."""
    profile = make_profile(model, processor, gate=1.0)
    prompts, images = [random_words(i, 3 + 4 * i) for i in range(3)], [random_image(i) for i in range(3)]
    rewind, fallen = batch.Batch.rewind, []

    def not_finite(self, row, prompt, length):
        for layer in self.pool.layers:
            layer.keys[row, :, self.origin + length :] = layer.values[row, :, self.origin + length :] = torch.nan
        fallen.append(row)
        return rewind(self, row, prompt, length)

    with SafeGenerator(model, processor, profile, fused=fused) as guard:
        expected = guard.generate(prompts, images, max_new_tokens=6)
        monkeypatch.setattr(batch.Batch, "rewind", not_finite)
        assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)
    assert fallen == [0, 1, 2]


@pytest.fixture
def endless(processor):
    """A model without an end-of-sequence token, in which the word w77 is NaN."""
    model = endless_llava(processor, layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("w77")] = torch.nan
    return model


OPTIONS = [{}, SAMPLING]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampling"])
@pytest.mark.parametrize(("fused", "sync_every"), [(False, 1), (False, 4), (True, 3)])
def test_without_an_end_token_a_query_that_is_not_finite_ends_alone(endless, processor, options, fused, sync_every):
    profile = make_profile(endless, processor)
    prompts, images = ["w1 w2", "w3 w77 w4", "w5"], [random_image(i) for i in range(3)]
    pipeline = SequentialPipeline(endless, processor, profile)
    expected = pipeline.generate(prompts, images, max_new_tokens=7, **options)
    with SafeGenerator(endless, processor, profile, fused=fused, sync_every=sync_every) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=7, **options)
    expected[1].context = outputs[1].context  # which shares forwards with the draft
    assert_same(outputs, expected)
    assert [len(output.tokens) for output in outputs] == [7, 3, 7]  # the refusal, and nothing after it
    assert [output.risk == 1 for output in outputs] == [False, True, False]
    assert [output.failed_closed is not None for output in outputs] == [False, True, False]
    assert guard.counters["failed_closed"] == 1


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampling"])
@pytest.mark.parametrize("step", [5, 8])
@pytest.mark.parametrize("end", ["none", "one", "one that is forbidden"])
def test_an_answer_ends_where_it_is_no_longer_finite_and_says_so(processor, options, step, end):
    """After a word of its own that is NaN, and after the last step that the draft shared with the other stages."""
    model = endless_llava(processor, layers=2)
    profile = make_profile(model, processor, gate=0.0, context_prompt="w1", safety_prompt="w1", max_context_tokens=1)
    prompts, images = ["w1", "w2", "w3"], [random_image(i) for i in range(3)]
    guard = SafeGenerator(model, processor, profile, fused=False)
    plain = guard.generate(prompts, images, max_new_tokens=10, **options)
    others = [{*plain[i - 1].tokens, *plain[i - 2].tokens, *plain[i].tokens[:step]} for i in range(3)]
    broken = next(i for i in range(3) if plain[i].tokens[step] not in others[i])
    with torch.no_grad():
        model.get_input_embeddings().weight[plain[broken].tokens[step]] = torch.nan
    last = [next(i for i in range(4, 100) if all(i not in output.tokens for output in plain))] if end != "none" else []
    model.generation_config.eos_token_id = last or None
    if end == "one that is forbidden":
        options = options | {"logits_processors": SuppressTokensLogitsProcessor(last)}
    outputs = guard.generate(prompts, images, max_new_tokens=10, **options)
    assert_same(outputs, SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=10, **options))
    plain[broken].tokens = plain[broken].tokens[: step + 1] + last
    assert [output.tokens for output in outputs] == [output.tokens for output in plain]
    assert [i for i, output in enumerate(outputs) if output.failed_closed] == [broken]
    assert guard.counters["failed_closed"] == 1


def test_without_an_end_token_a_risk_stage_that_is_not_finite_from_its_second_step_on_fails_closed(processor, monkeypatch):
    """The first step alone would give a risk."""
    model = endless_llava(processor, layers=2)
    profile = make_profile(model, processor, max_context_tokens=1)
    pipeline, stages = SequentialPipeline(model, processor, profile), []
    similarity = pipeline.moras.similarity
    monkeypatch.setattr(pipeline.moras, "similarity", lambda logits: stages.append(logits) or similarity(logits))
    plain = pipeline.generate(["w1", "w2", "w3"], max_new_tokens=6)
    first = [logits[0, 0].argmax().item() for logits in stages]
    number = next(i for i, output in enumerate(plain) if first[i] not in output.tokens)
    with torch.no_grad():
        model.get_input_embeddings().weight[first[number]] = torch.nan
    pipelines = pipeline, SafeGenerator(model, processor, profile, fused=False)
    expected, found = (one.generate([f"w{number + 1}"], max_new_tokens=6) for one in pipelines)
    assert stages[-1].isfinite().all(-1).tolist() == [[True, False]]
    assert (expected[0].risk, found[0].risk) == (1, 1)
    assert found[0].failed_closed
    assert found[0].tokens[:3] == expected[0].tokens[:3]


def test_a_similarity_that_is_not_finite_fails_closed(model, processor, profile, monkeypatch):
    guard = SafeGenerator(model, processor, profile, fused=False)
    prompts = ["w1", "w2", "w3"]
    before = guard.generate(prompts, max_new_tokens=5)
    similarity = guard.plan.moras.similarity

    def broken(logits, steps):
        s = similarity(logits, steps)
        s[2] = float("nan")
        return s

    monkeypatch.setattr(guard.plan.moras, "similarity", broken)
    outputs = guard.generate(prompts, max_new_tokens=5)
    assert_same(outputs[:2], before[:2])
    assert (outputs[2].risk, outputs[2].failed_closed is None) == (1, False)


def test_images_seen_again_come_from_the_cache(model, processor, profile):
    prompts, images = [random_words(i, 4) for i in range(4)], [random_image(i % 2) for i in range(4)]
    expected = SafeGenerator(model, processor, profile, fused=False).generate(prompts, images, max_new_tokens=8)
    guard = SafeGenerator(model, processor, profile, fused=False, batch_size=1, cache_bytes=10**7)
    assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert guard.counters["cache_hits"] == 2
    assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert guard.counters["cache_hits"] == 6
    assert 0 < guard.cache.nbytes <= 10**7
    guard.close()
    assert len(guard.cache) == guard.cache.nbytes == 0


def test_a_cache_belongs_to_one_generator(model, processor, profile):
    """Another profile's context prompt would find the first one's prefix, another model's numbers would be wrong."""
    other = make_profile(model, processor, context_prompt="w9 w8", s_base=0.05)
    prompts, images = [random_words(i, 4) for i in range(3)], [random_image(0)] * 3
    first, second = (SafeGenerator(model, processor, p, fused=False, cache_bytes=10**7) for p in (profile, other))
    expected = SafeGenerator(model, processor, other, fused=False).generate(prompts, images, max_new_tokens=5)
    first.generate(prompts, images, max_new_tokens=5)
    assert len(second.cache) == 0
    assert_same(second.generate(prompts, images, max_new_tokens=5), expected)


def test_a_cache_too_small_for_one_image_keeps_none_and_stays_right(model, processor, profile):
    prompts, images = [random_words(i, 4) for i in range(3)], [random_image(0)] * 3
    expected = SafeGenerator(model, processor, profile, fused=False).generate(prompts, images, max_new_tokens=5)
    guard = SafeGenerator(model, processor, profile, fused=False, batch_size=1, cache_bytes=2000)
    assert_same(guard.generate(prompts, images, max_new_tokens=5), expected)
    assert 0 < guard.cache.nbytes <= 2000
    assert guard.counters["cache_hits"] == 0


CHANGES = {
    "hook": lambda model: model.model.language_model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5),
    "adapter": lambda model: [layer.set_adapter("b") for layer in lora_layers(model)],
    "adapters off": lambda model: [layer.enable_adapters(False) for layer in lora_layers(model)],
    "weights": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.detach())),
    "data": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight * 1),
    "values": lambda model: model.lm_head.weight[70:].mul_(-1),
    "buffers": lambda model: model.model.language_model.rotary_emb.inv_freq.mul_(1.5),
    "bias": lambda model: Patch.of(model).set_region_bias(torch.ones(4)),
    "steering": lambda model: Patch.of(model).set_steering(0, torch.ones(1, 32)),
    "steered rows": lambda model: Patch.of(model).steering.set_rows(torch.zeros(1, dtype=torch.int32), torch.ones(1)),
    "backend": lambda model: ras_fast.set_backend("torch"),
    "patch": lambda model: Patch.of(model).unpatch(),
    "module": lambda model: setattr(model, "lm_head", copy.deepcopy(model.lm_head)),
}


@pytest.fixture
def backend_restored():
    before = forced_backend()
    yield
    ras_fast.set_backend(before)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
@pytest.mark.usefixtures("backend_restored")
def test_a_change_of_the_model_is_noticed(processor, change):
    model = tiny_llava(processor)
    if change.startswith("adapter"):
        _, model = with_adapters(model)
    patch = ras_fast.patch(model)
    if change == "steered rows":
        patch.set_steering(0, torch.ones(1, 32))
        patch.steering.set_rows(torch.tensor([-1]), torch.zeros(1))
    watch = Watch(model)
    assert watch.changed()
    watch.note()
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert not watch.changed()
    CHANGES[change](model)
    assert watch.changed()
    watch.note()
    assert not watch.changed()


@torch.no_grad()
def test_what_a_batch_writes_into_buffers_is_no_change(processor):
    """Transformers' "longrope" picks its frequencies, in place, in every forward."""
    model = tiny_llava(processor)
    watch, buffer = Watch(model), model.model.language_model.rotary_emb.inv_freq
    for _ in range(2):
        watch.changed()
        buffer.copy_(buffer.clone())
        watch.note()
        assert not watch.changed()
    model.model.language_model.rotary_emb.inv_freq = buffer.clone()
    watch.note()
    assert watch.changed()
    watch.note()
    model.model.language_model.rotary_emb.inv_freq.mul_(1.5)
    assert watch.changed()


def test_to_look_at_a_model_of_inference_tensors(processor):
    """They do not count how often they were written."""
    model = tiny_llava(processor)
    with torch.inference_mode():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    watch = Watch(model)
    watch.note()
    assert not watch.changed()


@pytest.mark.parametrize("change", ["hook", "values", "bias", "steered rows"])
def test_nothing_is_found_in_the_cache_that_another_model_put_there(processor, change):
    model = tiny_llava(processor)
    profile, (prompts, images) = make_profile(model, processor), make_queries(1)
    patch = ras_fast.patch(model)
    if change == "steered rows":
        patch.set_steering(0, 3 * torch.randn(1, 32))
        patch.steering.set_rows(torch.tensor([-1]), torch.zeros(1))
    guard = SafeGenerator(model, processor, profile, cache_bytes=10**7)
    before = guard.generate(prompts, images, max_new_tokens=8)
    assert_same(guard.generate(prompts, images, max_new_tokens=8), before)
    assert guard.counters["cache_hits"] == 1
    if change == "hook":
        model.model.language_model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    elif change == "values":
        with torch.no_grad():  # not of the first rows, which are part of the fingerprint
            model.model.language_model.layers[0].self_attn.v_proj.weight[1:].mul_(-1)
    elif change == "bias":
        patch.set_region_bias(torch.tensor([5.0, -5.0, 5.0, 0.0]))
    else:
        patch.steering.set_rows(torch.zeros(1, dtype=torch.int32), torch.ones(1))
    expected = SafeGenerator(model, processor, profile).generate(prompts, images, max_new_tokens=8)
    outputs = guard.generate(prompts, images, max_new_tokens=8)
    assert outputs[0].risk != before[0].risk
    assert_same(outputs, expected)
    assert guard.counters["cache_hits"] == 1
    assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert guard.counters["cache_hits"] == 2


@pytest.mark.parametrize("change", ["values", "module"])
@pytest.mark.parametrize("pipeline", [SafeGenerator, SequentialPipeline])
@torch.no_grad()
def test_another_head_gives_the_tokens_and_the_words_of_the_prototypes(processor, pipeline, change):
    model = tiny_llava(processor)
    profile, (prompts, images) = make_profile(model, processor), make_queries(3)
    kept = pipeline(model, processor, profile)
    before = kept.generate(prompts, images, max_new_tokens=6)
    if change == "module":
        model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight[66:88].mul_(-1)  # not what is part of the fingerprint
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    outputs = kept.generate(prompts, images, max_new_tokens=6)
    assert_same(outputs, expected)
    assert outputs[0].risk != pytest.approx(before[0].risk, abs=1e-3)


@pytest.mark.parametrize("method", ["moras", "one pass"])
def test_a_hook_on_the_model_itself_is_noticed_when_it_comes_later(processor, method):
    """The engine calls the model's parts, so it would answer text as if the hook were not there."""
    model = tiny_llava(processor)
    profile = make_profile(model, processor) if method == "moras" else PROFILES[0](model, processor)
    guard = SafeGenerator(model, processor, profile)
    expected = guard.generate(["w1 w2"], max_new_tokens=4)

    def other_logits(module, args, output):
        output.logits = -output.logits
        return output

    handle = model.register_forward_hook(other_logits)
    for _ in range(2):
        with pytest.raises(ValueError, match="engine's logits differ from the model's own"):
            guard.generate(["w1 w2"], max_new_tokens=4)
    handle.remove()
    assert_same(guard.generate(["w1 w2"], max_new_tokens=4), expected)


def test_a_context_that_another_query_broke_is_not_kept(processor):
    """They share forwards. The next question about that image would be judged without its description."""
    model = tiny_llava(processor)
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("w77")] = torch.inf
    profile = make_profile(model, processor)
    asked = ["w5 w6"], [random_image(3)]
    expected = SequentialPipeline(model, processor, profile).generate(*asked, max_new_tokens=6)
    guard = SafeGenerator(model, processor, profile, cache_bytes=10**7)
    assert guard.generate(["w77 w1"], [random_image(3)], max_new_tokens=6)[0].failed_closed
    assert_same(guard.generate(*asked, max_new_tokens=6), expected)
    guard.close()


def test_a_model_unpatched_by_a_streamer_gives_no_answer(model, processor, profile):
    biased = replace(profile, tensors=profile.tensors | {"region_bias": torch.full((2, 4), 3.0)})
    with (
        SafeGenerator(model, processor, biased) as guard,
        pytest.raises(RuntimeError, match="unpatched in the middle of an answer"),
    ):
        guard.generate(["w1 w2"], [random_image(0)], streamer=Asking(lambda: [guard._unpatch_model()]))


def test_a_model_unpatched_among_the_steered_steps_gives_no_answer(model, processor):
    """As by the end of another thread's block."""
    profile, lost = make_profile(model, processor, gate=0.9), 0

    class Unpatching(LogitsProcessor):
        def __init__(self, calls: int):
            self.calls = calls

        def __call__(self, input_ids, scores):
            self.calls -= 1
            if not self.calls:
                Patch.of(model).unpatch()
            return scores

    def answer(calls: int) -> list[int]:
        with ras_fast.patch(model), SafeGenerator(model, processor, profile) as guard:
            (output,) = guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=6, logits_processors=[Unpatching(calls)])
            return output.tokens

    expected = answer(0)
    for calls in range(1, 20):
        try:
            assert answer(calls) == expected
        except RuntimeError as error:
            lost += "lost its steering" in str(error)
    assert lost


@pytest.mark.parametrize("make", [SequentialPipeline, SafeGenerator])
def test_what_is_no_streamer_is_refused(model, processor, profile, make):
    with pytest.raises(ValueError, match=r"streamer is a list; it needs the methods put\(tokens\) and end\(\)"):
        make(model, processor, profile).generate(["w1"], streamer=[])


def test_a_prefix_counts_all_that_it_takes(model, processor, profile):
    guard = SafeGenerator(model, processor, profile, fused=False, cache_bytes=10**7)
    guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=2)
    ((prefix, counted),) = (entry for entry in guard.cache._entries.values() if isinstance(entry[0], batch.Prefix))
    assert counted > sum(tensor.nbytes for layer in prefix.states for tensor in layer) + 5 * batch.TENSOR_BYTES


def test_a_progress_bar_for_several_batches(model, processor, profile, capsys):
    guard = SafeGenerator(model, processor, profile, fused=False, batch_size=1)
    guard.generate(["w1", "w2"], max_new_tokens=1)
    assert "2/2" in capsys.readouterr().err
    guard.generate(["w1", "w2"], max_new_tokens=1, progress=False)
    guard.generate(["w1"], max_new_tokens=1)
    assert capsys.readouterr().err == ""


def test_the_cache_is_off_by_default(model, processor, profile):
    guard = SafeGenerator(model, processor, profile, fused=False)
    guard.generate(["w1", "w2"], [random_image(0)] * 2, max_new_tokens=2)
    assert len(guard.cache) == 0
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        SafeGenerator(model, processor, profile, cache_bytes=-1)


def test_one_pool_for_all_stages_and_no_other_allocation(model, processor, profile, monkeypatch):
    allocations = []
    allocate = kv_cache.PoolLayer.lazy_initialization
    monkeypatch.setattr(kv_cache.PoolLayer, "lazy_initialization", lambda *args: allocations.append(1) or allocate(*args))
    guard = SafeGenerator(model, processor, profile, fused=False)
    monkeypatch.setattr(guard, "_prove", lambda: None)  # it has a small pool of its own
    for new_tokens, layers in ((20, 2), (30, 0), (200, 2), (25, 0)):
        allocations.clear()
        (output,) = guard.generate(["w1 w2"], [random_image(1)], max_new_tokens=new_tokens)
        assert len(output.tokens) == min(new_tokens, 58)
        assert len(allocations) == layers  # one in each, or those of the call before


def test_out_of_memory_splits_the_batch(model, processor, profile, monkeypatch):
    prompts, images = make_queries(5)
    guard = SafeGenerator(model, processor, profile, fused=False)
    expected = guard.generate(prompts, images, max_new_tokens=4, **SAMPLING)
    answer = guard._answer

    def tight(batch, *args):
        if len(batch) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return answer(batch, *args)

    monkeypatch.setattr(guard, "_answer", tight)
    with pytest.warns(UserWarning, match="out of memory with 5 queries in a batch: going on with 2"):
        assert_same(guard.generate(prompts, images, max_new_tokens=4, **SAMPLING), expected)
    assert guard.counters["memory_splits"] == 2
    monkeypatch.setattr(guard, "_answer", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        guard.generate(["w1"])


def test_two_generators_of_one_model_in_two_threads(model, processor, profile):
    """Each patches the model and unpatches it again; they take turns."""
    (expected,) = SafeGenerator(model, processor, profile, fused=False).generate(["w1 w2"], max_new_tokens=6)
    answers, errors = [], []

    def work():
        try:
            for _ in range(4):
                with SafeGenerator(model, processor, profile) as guard:
                    answers.extend(guard.generate(["w1 w2"], max_new_tokens=6))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [output.tokens for output in answers] == [expected.tokens] * 8
    assert Patch.of(model) is None


PIPELINES = {"reference": SequentialPipeline, "engine": partial(SafeGenerator, fused=False)}


def test_ctrl_c_at_the_end_of_an_answer_lets_others_in(model):
    """Python heeds Ctrl-C where a function of its own begins: one that lets go of the lock would not come to it."""

    def at_call(frame, event, argument):
        raise KeyboardInterrupt

    before, entered = sys.gettrace(), threading.Event()

    def enter():
        with lock_of(model):
            entered.set()

    try:
        with lock_of(model):
            sys.settrace(at_call)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert entered.wait(10)


def test_a_wrapped_model_has_the_lock_of_the_model_inside(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    for wrapped, inside in ((torch.compile(model), model), (torch.compile(adapted), adapted.get_base_model())):
        assert lock_of(wrapped) is lock_of(inside)
    assert lock_of(adapted) is not lock_of(model)


def in_a_child(task) -> int:
    """The exit status of a forked process that runs ``task``, which is killed where it waits for long."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(20)
    try:
        task()
        os._exit(0)
    except RuntimeError as error:
        os._exit(7 if "was forked while another thread was answering" in str(error) else 1)
    finally:
        os._exit(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_does_not_wait_for_an_answer_that_is_not_in_it(model):
    def enter():
        with lock_of(model), lock_of(model):
            pass

    assert in_a_child(enter) == 0
    with lock_of(model):
        assert in_a_child(enter) == 0
    held, over = threading.Event(), threading.Event()

    def hold():
        with lock_of(model):
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_a_child(enter) == 7
        assert in_a_child(lambda: in_a_child(enter) == 7 or 1 / 0) == 0
    finally:
        over.set()
        thread.join()
    enter()


def test_a_compiled_model_answers_as_the_model_inside(model, processor, profile):
    (expected,) = SequentialPipeline(model, processor, profile).generate(["w1 w2"], [random_image(0)], max_new_tokens=6)
    for make in PIPELINES.values():
        (output,) = make(torch.compile(model, backend="eager"), processor, profile).generate(
            ["w1 w2"], [random_image(0)], max_new_tokens=6
        )
        assert output.tokens == expected.tokens


@pytest.mark.parametrize("first", PIPELINES)
@pytest.mark.parametrize("second", PIPELINES)
def test_the_reference_and_the_engine_take_turns(model, processor, first, second):
    """Both hook the head or count steps in it: in between, an answer would be steered at another step, or not at all."""
    profile = make_profile(model, processor, gate=1.0)
    pipelines = [PIPELINES[name](model, processor, profile) for name in (first, second)]
    expected = [pipeline.generate(["w1 w2"], [random_image(0)], max_new_tokens=6)[0].tokens for pipeline in pipelines]
    answers, order, others = {}, [], []

    def answer(number):
        answers[number] = pipelines[number].generate(["w1 w2"], [random_image(0)], max_new_tokens=6)[0].tokens

    def begin(module, args):
        order.append(threading.current_thread())
        if len(order) == 2:
            others.append(threading.Thread(target=answer, args=(1,)))
            others[0].start()
            others[0].join(timeout=0.5)  # it cannot end before this thread's answer does

    with model.lm_head.register_forward_pre_hook(begin):
        answer(0)
        others[0].join()
    assert [answers[number] for number in range(2)] == expected
    turns = [thread for i, thread in enumerate(order) if i == 0 or thread is not order[i - 1]]
    assert turns == [threading.current_thread(), *others]


def test_a_forward_of_another_thread_is_no_step_of_the_reference(model, processor):
    """Nor is it steered."""
    pipeline = SequentialPipeline(model, processor, make_profile(model, processor, gate=1.0))
    (expected,) = pipeline.generate(["w1 w2"], max_new_tokens=6)
    ids, logits, others = torch.tensor([[20, 21, 22]]), [], []
    with torch.no_grad():
        plain = model(input_ids=ids).logits

    def forward():
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)

    def begin(module, args):
        if threading.current_thread() is threading.main_thread():
            others.append(threading.Thread(target=forward))
            others[-1].start()
            others[-1].join()

    with model.lm_head.register_forward_pre_hook(begin):
        (output,) = pipeline.generate(["w1 w2"], max_new_tokens=6)
    assert output.tokens == expected.tokens
    assert output.rejected_at is not None
    assert len(logits) > 6
    assert all(torch.equal(found, plain) for found in logits)


def test_two_threads_get_what_each_would_alone(model, processor, profile):
    guard = SafeGenerator(model, processor, profile)
    calls = [make_queries(4, seed=seed) for seed in (0, 20)]
    alone = [guard.generate(*call, max_new_tokens=8) for call in calls]
    together = [None, None]

    def work(i):
        together[i] = guard.generate(*calls[i], max_new_tokens=8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, expected in zip(together, alone, strict=True):
        assert_same(outputs, expected)
    guard.close()


def test_region_mass_is_what_eager_attention_pays_to_the_images(model, processor, profile):
    prompts = [random_words(i, 3 + 4 * i) for i in range(3)]
    images = [[random_image(0)], [random_image(1), random_image(2)], None]
    with SafeGenerator(model, processor, profile, region_mass=True) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=4)
        plain = SafeGenerator(model, processor, profile, fused=False).generate(prompts, images, max_new_tokens=4)
        assert_same(outputs, plain)
    implementation = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    for output, query in zip(outputs, inputs.make_queries(prompts, images, processor), strict=True):
        batch, _ = inputs.encode(processor, query, "cpu", torch.float32)
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions
        last = torch.stack([layer[0, :, -1] for layer in attentions])
        at = (batch["input_ids"][0] == processor.image_token_id).nonzero()[:, 0].split(16)
        wanted = torch.stack([last[..., tokens].sum(-1) for tokens in at], -1) if query.images else last.new_zeros(2, 4, 0)
        torch.testing.assert_close(output.region_mass, wanted, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation({"text_config": implementation})
    with pytest.raises(ValueError, match="region_mass=True, needs the patched model"):
        SafeGenerator(model, processor, profile, fused=False, region_mass=True)


def test_explain_and_timings(model, processor, profile):
    guard = SafeGenerator(model, processor, profile, fused=False)
    assert "nothing run yet" in guard.explain()
    (output,) = guard.generate(["w1"], [random_image(0)], max_new_tokens=3)
    stages = ["prefix", "context and draft", "risk", "check", "answer"]
    assert list(output.timings) == [*stages, "first_token", "total"]
    assert sum(output.timings[stage] for stage in stages) == pytest.approx(output.timings["total"])
    assert "queries 1" in guard.explain()
    assert "prompts that shared a prefix 2, that could not 0" in guard.explain()


def test_what_cannot_be_used_is_refused(model, processor, profile):
    with pytest.raises(ValueError, match="calibrated on another model"):
        SafeGenerator(tiny_llava(processor, seed=5), processor, profile)
    with pytest.raises(ValueError, match="model is a str; it needs to be a transformers model"):
        SafeGenerator("tiny", processor, profile)
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "3"}, "batch_size is '3'; it needs to be an integer"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"sync_every": 1.5}, "sync_every is 1.5"),
        ({"batch_size": True}, "batch_size is True; it needs to be an integer"),
        ({"cache_bytes": True}, "cache_bytes is True; it needs to be an integer"),
        ({"fused": "no"}, "fused is 'no'; it needs to be True or False"),
        ({"region_mass": None}, "region_mass is None; it needs to be True or False"),
        ({"cache_bytes": "1GB"}, "cache_bytes is '1GB'; it needs to be an integer"),
        ({"profile": None}, "profile is a NoneType; it needs to be a RasProfile"),
        ({"profile": "folder"}, "profile is a str"),
        ({"processor": None}, "processor is a NoneType"),
        ({"model": None}, "model is a NoneType; it needs to be a transformers model"),
    ):
        with pytest.raises(ValueError, match=message):
            SafeGenerator(**{"model": model, "processor": processor, "profile": profile} | options)
        if not options.keys() - {"model", "processor", "profile"}:
            with pytest.raises(ValueError, match=message):
                SequentialPipeline(**{"model": model, "processor": processor, "profile": profile} | options)
    model.train()
    try:
        with pytest.raises(ValueError, match="model is in training mode"):
            SafeGenerator(model, processor, profile, fused=False)
    finally:
        model.eval()
    guard = SafeGenerator(model, processor, profile, fused=False)
    for wrong in (0, 1 << 62):  # memory for so many would overflow before it is too much
        with pytest.raises(ValueError, match=f"max_new_tokens is {wrong}"):
            guard.generate(["w1"], max_new_tokens=wrong)
    with pytest.raises(ValueError, match="stop_strings"):
        guard.generate(["w1"], stop_strings=[""])
    with pytest.raises(TypeError, match="beams"):
        guard.generate(["w1"], beams=3)
    assert guard.generate([]) == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("part", "where"), [("", ";"), ("model.vision_tower", " at model.vision_tower;")])
def test_a_model_that_is_set_to_training_later_does_not_answer(model, processor, profile, fused, part, where):
    pipelines = SafeGenerator(model, processor, profile, fused=fused), SequentialPipeline(model, processor, profile)
    pipelines[0].generate(["w1"], max_new_tokens=2)
    model.get_submodule(part).train()
    try:
        for pipeline in pipelines:
            with pytest.raises(ValueError, match=f"model is in training mode{where}"):
                pipeline.generate(["w1"], max_new_tokens=2)
    finally:
        model.eval()
    assert pipelines[0].generate(["w1"], max_new_tokens=2)[0].tokens
    pipelines[0].close()


def test_a_processor_that_comes_to_make_other_prompts_is_refused():
    processor = tiny_processor()
    model = tiny_llava(processor)
    pipelines = [kind(model, processor, make_profile(model, processor)) for kind in (SafeGenerator, SequentialPipeline)]
    before = processor.chat_template
    for template, refused in ((before, False), (before + " w1", True), (before, False)):
        processor.chat_template = template
        for pipeline in pipelines:
            with pytest.raises(ValueError, match="tokenizer: profile") if refused else nullcontext():
                pipeline.generate(["w1 ?"], max_new_tokens=1)
    processor.tokenizer.add_tokens(["w1000"])
    for pipeline in pipelines:
        with pytest.raises(ValueError, match="tokenizer: profile"):
            pipeline.generate(["w1 ?"], max_new_tokens=1)


def test_a_prompt_beyond_the_models_positions_has_no_answer(model, processor, profile, monkeypatch):
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 60)
    for pipeline in (SafeGenerator(model, processor, profile, fused=False), SequentialPipeline(model, processor, profile)):
        assert pipeline.generate(["w1"], max_new_tokens=2)[0].tokens
        message = r"prompts\[1\]: a prompt has \d+ tokens; LlavaForConditionalGeneration has 60 positions"
        with pytest.raises(ValueError, match=message):
            pipeline.generate(["w1", "w1 " * 61], max_new_tokens=2)


@pytest.mark.parametrize(("context_prompt", "safety_prompt"), [("w1", "w4 " * 40), ("w1 " * 60, "w4")], ids=["risk", "context"])
def test_a_stage_beyond_the_models_positions_fails_closed_for_its_query_alone(
    model, processor, monkeypatch, context_prompt, safety_prompt
):
    """The query with an image has a prompt of its own that fits."""
    profile = make_profile(model, processor, context_prompt=context_prompt, safety_prompt=safety_prompt)
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 64)
    prompts, images = ["w1", "w2 w3", "w4"], [None, random_image(0), None]
    guard = SafeGenerator(model, processor, profile, fused=False)
    outputs = guard.generate(prompts, images, max_new_tokens=6)
    assert_same(outputs, SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6))
    assert [output.failed_closed is None for output in outputs] == [True, False, True]
    assert "64 positions" in outputs[1].failed_closed
    assert (outputs[1].risk, guard.counters["failed_closed"]) == (1, 1)
    assert_same(guard.generate(prompts[1:2], images[1:2], max_new_tokens=6), outputs[1:2])


def test_a_head_the_engine_does_not_know_is_refused(model, processor, profile, monkeypatch):
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="engine's logits differ from the model's own"):
        SafeGenerator(model, processor, profile)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_gate_that_also_looks_at_attention(model, processor, batch_size):
    profile = make_profile(model, processor, risk="moras+attention", heads=[[0, 1], [1, 0], [1, 3]])
    profile.tensors |= {
        "attention_weights": torch.tensor([30.0, -20.0, 4.0, 10.0, -15.0, -3.0, 5.0, 8.0, 2.0]),
        "attention_bias": torch.tensor([-1.0]),
        # Without an image, the gate of MoRAS alone.
        "similarity_weight": torch.tensor([profile.config["k"]]),
        "similarity_bias": torch.tensor([-profile.config["k"] * profile.config["s_base"]]),
    }
    prompts, images = make_queries(9)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    with SafeGenerator(model, processor, profile, batch_size=batch_size, region_mass=batch_size > 1) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)
    alone = SequentialPipeline(model, processor, make_profile(model, processor)).generate(prompts, images, max_new_tokens=6)
    changed = [abs(a.risk - b.risk) > 1e-3 for a, b in zip(alone, expected, strict=True)]
    assert changed == [image is not None for image in images]
    with pytest.raises(ValueError, match=r"this profile.*needs the patched model"):
        SafeGenerator(model, processor, profile, fused=False)


def test_steps_below_n_are_steered_inside_the_fused_last_norm(model, processor, profile, monkeypatch):
    prompts, images = make_queries(12)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    assert 0 in {output.rejected_at for output in expected}
    by_hand = []
    with SafeGenerator(model, processor, profile, batch_size=5) as guard:
        check, steer = guard.plan._check_drafts, guard.plan.moras.steer

        def checked(*args):
            check(*args)
            monkeypatch.setattr(guard.plan.moras, "steer", lambda *args: by_hand.append(args) or steer(*args))

        def start(*args):
            monkeypatch.setattr(guard.plan.moras, "steer", steer)
            return prepare(*args)

        prepare = guard.plan._encode_prefixes
        monkeypatch.setattr(guard.plan, "_check_drafts", checked)
        monkeypatch.setattr(guard.plan, "_encode_prefixes", start)
        assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)
        assert by_hand == []
        assert Patch.of(model).steers("final")


def test_images_are_looked_at_once_a_query(model, processor, profile, reference, monkeypatch):
    prompts, images = [random_words(i, 3) for i in range(4)], [random_image(i) for i in range(4)]
    expected = reference.generate(prompts, images, max_new_tokens=5)
    guard = SafeGenerator(model, processor, profile, fused=False, batch_size=1)
    looked, preprocess = [], type(processor.image_processor).preprocess
    monkeypatch.setattr(type(processor.image_processor), "preprocess", lambda *a, **k: looked.append(1) or preprocess(*a, **k))
    assert_same(guard.generate(prompts, images, max_new_tokens=5), expected)
    assert len(looked) == 6  # twice more, for the first query, to see that an image is the same tokens in each stage's prompt


def test_a_processor_whose_image_tokens_depend_on_the_prompt_is_asked_each_time(model, profile, monkeypatch):
    """Long prompts get the image's tokens twice."""
    processor = tiny_processor()
    call = type(processor).__call__

    def moody(self, text, **kwargs):
        if "w4 w5 w6" in text[0] or "w1 w2 w3" in text[0]:
            text = [text[0].replace("<image>", "<image><image>")]
            kwargs["images"] = kwargs["images"] and [image for image in kwargs["images"] for _ in range(2)]
        return call(self, text=text, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", moody)
    prompts, images = [random_words(i, 3) for i in range(3)], [random_image(i) for i in range(3)]
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=5)
    guard = SafeGenerator(model, processor, profile, fused=False)
    assert_same(guard.generate(prompts, images, max_new_tokens=5), expected)
    assert guard.counters["not_shared"] == 6


def test_the_same_image_twice_in_a_batch_is_encoded_once(model, processor, profile, reference, monkeypatch):
    prompts, images = [random_words(i, 3 + i) for i in range(4)], [random_image(i // 3) for i in range(4)]
    expected = reference.generate(prompts, images, max_new_tokens=5)
    guard = SafeGenerator(model, processor, profile, fused=False)
    monkeypatch.setattr(guard, "_prove", lambda: None)  # it has a prefix of its own
    encoded, prefill = [], batch.Batch.prefill
    monkeypatch.setattr(batch.Batch, "prefill", lambda self, row, *args: encoded.append(row) or prefill(self, row, *args))
    assert_same(guard.generate(prompts, images, max_new_tokens=5), expected)
    assert encoded == [0, 3]
    assert len(guard.cache) == 0


def test_neighbours_whose_prefixes_fit_together_are_encoded_in_one_forward(model, processor, profile, reference, monkeypatch):
    """Other questions about other images; a query without one, and one with two, stand between."""
    images = [random_image(0), random_image(1), None, [random_image(2), random_image(3)], random_image(4), random_image(5)]
    prompts = [random_words(i, 3 + i) for i in range(6)]
    expected = reference.generate(prompts, images, max_new_tokens=5)
    guard = SafeGenerator(model, processor, profile, fused=False, batch_size=6)
    monkeypatch.setattr(guard, "_prove", lambda: None)  # it has a prefix of its own
    encoded, prefill = [], batch.Batch.prefill

    def noted(self, row, inputs, *args):
        encoded.append([*range(row, row + len(inputs))])
        prefill(self, row, inputs, *args)

    monkeypatch.setattr(batch.Batch, "prefill", noted)
    assert_same(guard.generate(prompts, images, max_new_tokens=5), expected)
    assert encoded == [[0, 1], [2], [3], [4, 5]]


def test_a_profiles_region_bias_holds_in_every_stage(model, processor):
    profile = make_profile(model, processor)
    prompts, images = make_queries(7)
    plain = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    profile.tensors["region_bias"] = torch.tensor([[2.0, -1.0, 0.0, 3.0], [0.0, 1.5, 2.0, -2.0]])
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    assert [output.tokens for output in expected] != [output.tokens for output in plain]
    with SafeGenerator(model, processor, profile, batch_size=3) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=6), expected)


def test_weights_that_are_offloaded_between_two_answers(processor):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llava(processor)
    with SafeGenerator(model, processor, make_profile(model, processor)) as guard:
        guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=3)
        accelerate.cpu_offload(model.model.vision_tower, "cpu")  # the model's first weights
        with pytest.raises(ValueError, match="weights are not in memory"):
            guard.generate(["w1 w2"], [random_image(0)], max_new_tokens=3)
