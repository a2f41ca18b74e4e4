"""Which class applies a profile, and what holds for every one-pass method attached to a model."""

import copy
import gc
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import MethodType, SimpleNamespace

import pytest
import torch
from families import FAMILIES
from tiny_random import endless_llava
from transformers import (
    AutoConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    MistralConfig,
    StaticCache,
)

import ras_fast
from ras_fast.fingerprint import fingerprint
from ras_fast.methods.moras import PRESETS
from ras_fast.methods.projection import Condition, Projection, from_vectors
from ras_fast.methods.prompt_state import PromptState, replaced
from ras_fast.patching import range_mask
from ras_fast.profile import RasProfile
from ras_fast.regions import RegionMap
from ras_fast.sequential import SequentialPipeline

D = 32


@pytest.fixture(scope="module")
def model(processor):
    return endless_llava(processor, 3)


def sliding_llava(processor, window):
    """Of which every layer slides, so that no mask shows all that is valid."""
    config = endless_llava(processor, 3).config
    values = config.text_config.to_dict() | {"model_type": "mistral", "sliding_window": window}
    config.text_config = MistralConfig.from_dict(values)
    return LlavaForConditionalGeneration(config).eval()


def autosteer(model, processor):
    d = model.config.get_text_config().hidden_size
    shapes = {"in.weight": (8, d), "in.bias": (8,), "out.weight": (2, 8), "out.bias": (2,)}
    tensors = {f"prober_{name}": torch.randn(shape) for name, shape in shapes.items()} | {"refusal": torch.randn(d, d)}
    return RasProfile("autosteer", {"layer": 1, "strength": 1.0, "threshold": 0.5}, tensors, fingerprint(model))


def attention(model, processor):
    """Of which no risk is 1 by itself."""
    tensors = {"prototypes": torch.randn(3, D), "attention_weights": torch.randn(6), "attention_bias": torch.zeros(1)}
    return RasProfile("attention", {"heads": [[0, 1], [2, 3]]}, tensors, fingerprint(model))


def projection(model, processor, per="sequence"):
    """Whose condition does not hold."""
    condition = Condition(0, torch.randn(D), threshold=1e9, measure="projection", per=per)
    return from_vectors(model, processor, torch.randn(D), layers=[1, 2], condition=condition)


def moras_profile(model, processor):
    config = PRESETS["moras"] | {"s_base": 0.5, "k": 4.0}
    return RasProfile("moras", config, {"prototypes": torch.randn(3, D)}, fingerprint(model, processor))


METHODS = [autosteer, attention, projection]


def prompts(processor, lengths=(6,)):
    """Of one image each, padded on the right."""
    rows = [[processor.image_token_id] * 16 + list(range(20 + i, 20 + i + length)) for i, length in enumerate(lengths)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(len(rows), 3, 16, 16)}


def generate(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": 3, "do_sample": False, **options})


def test_a_model_is_no_patch(model):
    with pytest.raises(ValueError, match="patch is a LlavaForConditionalGeneration"):
        ras_fast.methods.attach(model, SimpleNamespace(method="projection"))


def test_methods_with_stages_are_sent_to_the_engine():
    for method in ("moras", "ras"):
        profile = RasProfile(method, {}, {"prototypes": torch.zeros(3, 8)})
        with pytest.raises(ValueError, match="SafeGenerator"):
            ras_fast.methods.attach(None, profile)


@pytest.mark.parametrize("make", METHODS)
def test_other_defences_are_refused_inside_the_block(model, processor, make):
    profile = replace(make(model, processor), fingerprint=fingerprint(model, processor))
    moras = moras_profile(model, processor)
    guards = [ras_fast.SafeGenerator(model, processor, other) for other in (profile, moras)]
    guards.append(SequentialPipeline(model, processor, moras))
    inside = pytest.raises(ValueError, match=f"model is inside a block of ras_fast.methods.attach with a '{profile.method}'")
    with ras_fast.patch(model) as patch:
        with ras_fast.methods.attach(patch, profile):
            for guard in guards:
                with inside:
                    guard.generate(["w1 ?"], max_new_tokens=1)
            for other in (profile, moras):
                with inside:
                    ras_fast.SafeGenerator(model, processor, other)
            with inside:
                ras_fast.methods.projection.calibrate(model, processor, pairs=[(("w1", None), ("w2", None))])
        for guard in guards:
            assert len(guard.generate(["w1 ?"], max_new_tokens=1)) == 1


@pytest.mark.parametrize("make", [autosteer, attention, projection])
def test_a_profile_of_a_fine_tuned_sibling_is_refused(model, processor, make):
    profile = make(model, processor)
    sibling = copy.deepcopy(model)
    with torch.no_grad():
        sibling.get_output_embeddings().weight[0, 0] += 1
    with ras_fast.patch(sibling) as patch, pytest.raises(ValueError, match=r"calibrated on another model \(lm_head: "):
        ras_fast.methods.attach(patch, profile).__enter__()


@pytest.mark.parametrize("change", ["layer", "adapter"])
def test_a_profile_of_a_sibling_with_the_same_head_is_refused(model, processor, change):
    profile, sibling = projection(model, processor), copy.deepcopy(model)
    layers = sibling.model.language_model.layers
    if change == "layer":
        with torch.no_grad():
            layers[2].mlp.down_proj.weight[0, 0] += 1
    else:
        layers[0].register_module("adapter", torch.nn.Linear(D, 2).eval())
    # Through the class as well, which is how a strength for each sequence is given.
    for attach in (ras_fast.methods.attach, lambda patch, profile: Projection(profile).attach(patch)):
        with ras_fast.patch(sibling) as patch, pytest.raises(ValueError, match=r"calibrated on another model \(decoder: "):
            attach(patch, profile).__enter__()


@pytest.mark.parametrize("part", ["model.vision_tower", "model.language_model.layers.1.mlp"])
@pytest.mark.parametrize("make", [autosteer, attention, projection])
def test_a_part_in_training_mode_is_refused(model, processor, make, part):
    """Its dropout would make the risk of each call another one, and may close a gate."""
    inputs, trains = prompts(processor), pytest.raises(ValueError, match=f"model is in training mode at {part}")
    with ras_fast.patch(model) as patch:
        with ras_fast.methods.attach(patch, make(model, processor)):
            generate(model, inputs)
            model.get_submodule(part).train()
            with trains:
                generate(model, inputs)
        with trains:
            ras_fast.methods.attach(patch, make(model, processor)).__enter__()
        model.eval()


@pytest.mark.parametrize("make", METHODS)
def test_generate_calls_of_several_threads_take_turns(model, processor, make):
    """What a method keeps for the forward that runs must not be another thread's."""
    order, others, inputs = [], [], prompts(processor)

    def begin(module, args, kwargs):
        order.append(threading.current_thread())
        if len(order) == 1:
            others.append(threading.Thread(target=generate, args=(model, inputs)))
            others[0].start()
            others[0].join(timeout=0.5)  # it cannot end before this thread's answer does

    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)):
        handle = patch.text_model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            generate(model, inputs)
            others[0].join()
        finally:
            handle.remove()
        assert torch.equal(generate(copy.deepcopy(model), inputs), generate(model, inputs))  # the copy has turns of its own
    assert order == [threading.current_thread()] * 3 + others * 3


@pytest.mark.parametrize("make", METHODS)
def test_the_block_waits_for_an_answer_of_another_thread(model, processor, make):
    """As where a streamer is read after the block that its thread was started in."""
    inputs, answers, steps, reading, ended = prompts(processor), [], [], threading.Event(), threading.Event()

    def begin(module, args, kwargs):
        reading.set()
        ended.wait(timeout=0.3)  # which comes after the answer
        steps.append(module)

    with ras_fast.patch(model) as patch:
        with ras_fast.methods.attach(patch, make(model, processor)) as method:
            expected = generate(model, inputs)
            method.risk = None
            handle = patch.text_model.register_forward_pre_hook(begin, with_kwargs=True)
            thread = threading.Thread(target=lambda: answers.append(generate(model, inputs)))
            thread.start()
            assert reading.wait(timeout=30)
        ended.set()
        assert len(steps) == 3
        thread.join()
        handle.remove()
    assert method.risk is not None
    assert torch.equal(answers[0], expected)


@pytest.mark.parametrize("make", METHODS)
def test_a_block_of_the_methods_own_is_one_as_well(model, processor, make):
    """As `Projection(profile).attach(patch, alpha)`."""
    profile = make(model, processor)
    profile.tensors["region_bias"] = torch.ones(3, 4)
    pipeline = SequentialPipeline(model, processor, moras_profile(model, processor))
    with ras_fast.patch(model) as patch:
        with ras_fast.methods.method_of(profile).attach(patch):
            assert patch.region_bias[0].tolist() == [1.0] * 4
            with pytest.raises(ValueError, match="model is inside a block"):
                pipeline.generate(["w1 ?"], max_new_tokens=1)
        assert not patch.region_bias
        pipeline.generate(["w1 ?"], max_new_tokens=1)


class Paused:
    """Another thread's answer, which stops in its first forward until `go` is set. answer: what it was, or its error."""

    def __init__(self, text_model, call):
        self.go, self.began, self.answer = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self._run, args=(call,))
        self.hook = text_model.register_forward_pre_hook(self._before)
        self.thread.start()
        assert self.began.wait(timeout=30)

    def _before(self, module, args):
        if threading.current_thread() is self.thread and not self.began.is_set():
            self.began.set()
            self.go.wait(timeout=30)

    def _run(self, call):
        try:
            self.answer = call()
        except (RuntimeError, ValueError) as error:
            self.answer = error

    def join(self):
        self.go.set()
        self.thread.join()
        self.hook.remove()
        return self.answer


@pytest.mark.parametrize("make", METHODS)
def test_a_block_begins_between_answers(model, processor, make):
    pipeline = SequentialPipeline(model, processor, moras_profile(model, processor))
    (expected,) = pipeline.generate(["w1 ?"], max_new_tokens=3)
    with ras_fast.patch(model) as patch:
        paused = Paused(patch.text_model, lambda: pipeline.generate(["w1 ?"], max_new_tokens=3))
        threading.Timer(0.3, paused.go.set).start()
        with ras_fast.methods.attach(patch, make(model, processor)):
            assert paused.go.is_set()
            (got,) = paused.join()
    assert (got.tokens, got.risk) == (expected.tokens, expected.risk)


@pytest.mark.parametrize("make", METHODS)
def test_nobody_is_let_in_while_a_block_waits(model, processor, make):
    """Who has waited longer for the model's turn than the end of the block is still inside."""
    pipeline, inside = SequentialPipeline(model, processor, moras_profile(model, processor)), []

    def answer():
        with suppress(ValueError):  # inside a block of …
            pipeline.generate(["w1 ?"], max_new_tokens=1)

    def note(module, args):
        if threading.current_thread() in waiting:
            inside.append("generate" in vars(model))  # where the block's own is

    waiting = [threading.Thread(target=answer) for _ in range(3)]
    with ras_fast.patch(model) as patch, patch.text_model.register_forward_pre_hook(note):
        with ras_fast.methods.attach(patch, make(model, processor)):
            paused = Paused(patch.text_model, lambda: generate(model, prompts(processor)))
            for thread in waiting:
                thread.start()
                thread.join(timeout=0.1)
            threading.Timer(0.2, paused.go.set).start()
        for thread in waiting:
            thread.join()
        assert isinstance(paused.join(), torch.Tensor)
    assert not any(inside)


@pytest.mark.parametrize("make", METHODS)
def test_an_answer_does_not_go_on_where_a_block_does_not_wait_for_it(model, processor, make, monkeypatch):
    """As when Ctrl-C comes while it waits."""

    class Interrupted:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *exception):
            pass

    with ras_fast.patch(model) as patch:
        block = ras_fast.methods.attach(patch, make(model, processor))
        block.__enter__()
        paused = Paused(patch.text_model, lambda: generate(model, prompts(processor)))
        monkeypatch.setattr(ras_fast.methods, "lock_of", lambda model: Interrupted())
        with pytest.raises(RuntimeError, match="the rest of its answer would not be steered"):
            block.__exit__(None, None, None)
        monkeypatch.undo()
        assert "the rest of its answer would not be steered" in str(paused.join())
        generate(model, prompts(processor))


@pytest.mark.parametrize("make", METHODS)
def test_a_generate_that_outlives_its_block_is_refused(model, processor, make):
    inputs = prompts(processor)
    with ras_fast.patch(model) as patch:
        with ras_fast.methods.attach(patch, make(model, processor)):
            taken = model.generate
            with ras_fast.methods.attach(patch, autosteer(model, processor)):
                taken_inside = model.generate
            for each in (taken, model.generate):
                assert each(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1
        for each in (taken, taken_inside):
            with pytest.raises(RuntimeError, match="has ended before it began: its answer would not be steered"):
                each(**inputs, max_new_tokens=1)
        generate(model, inputs)


def test_a_stand_in_that_outlives_its_block_is_refused(model):
    """Whatever it stands for, and though nobody else says that the block has ended."""
    with replaced(model, "generate", lambda method: method):
        taken = model.generate
    assert "generate" not in vars(model)
    with pytest.raises(RuntimeError, match="has ended before it began: its answer would not be steered"):
        taken(input_ids=torch.arange(20, 26)[None], max_new_tokens=1)


def test_a_thread_that_waits_while_its_block_ends_is_refused(model, processor):
    """It was started inside, and has got no further than another's answer."""
    errors, lock = [], ras_fast.model_lock.lock_of(model)
    begun = threading.Event()

    def answer():
        begun.set()
        try:
            generate(model, prompts(processor))
        except RuntimeError as error:
            errors.append(str(error))

    with ras_fast.patch(model) as patch, lock:
        with ras_fast.methods.attach(patch, autosteer(model, processor)):
            thread = threading.Thread(target=answer)
            thread.start()
            begun.wait()
            thread.join(timeout=0.3)
            assert thread.is_alive()
        lock.__exit__(None, None, None)
        thread.join()
        lock.__enter__()
    assert "has ended before it began" in errors[0]


@pytest.mark.parametrize("make", METHODS)
def test_a_block_that_ends_inside_of_its_generate_is_an_error(model, processor, make):
    class Closing:
        def put(self, value):
            block.__exit__(None, None, None)

        def end(self):
            pass

    with ras_fast.patch(model) as patch:
        block = ras_fast.methods.attach(patch, make(model, processor))
        block.__enter__()
        with pytest.raises(RuntimeError, match="the rest of its answer would not be steered"):
            generate(model, prompts(processor), streamer=Closing())
        generate(model, prompts(processor))
    assert not {"generate", "_prefill", "_get_candidate_generator"} & set(vars(model))


@pytest.mark.parametrize("make", METHODS)
def test_a_block_that_ends_inside_of_the_last_forward_is_an_error(model, processor, make):
    """After which no other is stopped: its later layers ran without the method."""

    def close(module, args):
        with suppress(RuntimeError):  # which is lost
            block.__exit__(None, None, None)

    with ras_fast.patch(model) as patch:
        block = ras_fast.methods.attach(patch, make(model, processor))
        block.__enter__()
        with (
            model.model.language_model.layers[1].register_forward_pre_hook(close),
            pytest.raises(RuntimeError, match="the rest of its answer would not be steered"),
        ):
            generate(model, prompts(processor), max_new_tokens=1)
        generate(model, prompts(processor))


@pytest.mark.parametrize("make", [attention, projection])
def test_what_the_user_steers_ends_alone(model, processor, make):
    profile, inputs = make(model, processor), prompts(processor, (3, 6))  # the first ends in padding, at full risk
    with ras_fast.patch(model) as patch, torch.no_grad():
        undefended = model(**inputs).logits
        with ras_fast.methods.attach(patch, profile):
            expected = model(**inputs).logits
            assert not torch.equal(expected, undefended)
            patch.set_steering(0, torch.randn(1, D))
            patch.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.ones(2))
            assert not torch.equal(model(**inputs).logits, expected)
            patch.clear_steering()
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("bias", [torch.tensor(1.0), torch.ones(4), torch.ones(2, 4), torch.ones(3, 4, 1, 1)])
def test_a_region_bias_of_another_shape_is_refused(model, processor, bias):
    profile = attention(model, processor)
    profile.tensors["region_bias"] = bias
    with ras_fast.patch(model) as patch, pytest.raises(ValueError, match=r"region_bias has shape .*; it needs to be \[3, Hq\]"):
        ras_fast.methods.attach(patch, profile).__enter__()


def test_a_region_bias_from_before_comes_back(model, processor):
    """Also that of an outer method."""
    inputs, profile, outer = prompts(processor), attention(model, processor), autosteer(model, processor)
    profile.tensors["region_bias"], outer.tensors["region_bias"] = torch.ones(3, 4), torch.full((3, 4, 1), -2.0)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        plain = model(**inputs).logits
        patch.set_region_bias({1: torch.full((4,), 2.0)})
        biased = model(**inputs).logits
        with ras_fast.methods.attach(patch, outer):
            for _ in range(2):
                assert all(torch.equal(patch.region_bias[layer], torch.full((4, 1), -2.0)) for layer in range(3))
                with ras_fast.methods.attach(patch, profile):
                    assert torch.equal(patch.region_bias[0], torch.ones(4))
        assert list(patch.region_bias) == [1]
        assert torch.equal(model(**inputs).logits, biased)
        patch.clear_region_bias()
        with ras_fast.methods.attach(patch, profile):
            pass
        assert torch.equal(model(**inputs).logits, plain)


def test_modules_load_on_first_use():
    assert ras_fast.methods.moras.__name__ == "ras_fast.methods.moras"
    with pytest.raises(AttributeError, match="no attribute 'moras2'"):
        ras_fast.methods.moras2  # noqa: B018


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("cached", [16, 19, 21])
def test_the_last_piece_of_a_prompt_is_judged_however_short(model, processor, make, cached):
    """`generate` goes on from a cache of the first tokens; at the last, one token is left."""
    inputs = prompts(processor)
    first = inputs | {name: inputs[name][:, :cached] for name in ("input_ids", "attention_mask")}
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        past = model(**first, use_cache=True).past_key_values
        before = method.risk
        generate(model, rest, past_key_values=past, max_new_tokens=1)
        assert method.risk is not before
    assert not method.failed.any()


def test_a_generate_without_a_part_that_reads_prompts_is_refused(model, processor, monkeypatch):
    """As of another version of transformers: a prompt's last piece of one token would pass for a decode step."""
    monkeypatch.delattr(GenerationMixin, "_prefill")
    with ras_fast.patch(model) as patch, pytest.raises(RuntimeError, match="has no _prefill, which this method relies on"):
        ras_fast.methods.attach(patch, autosteer(model, processor)).__enter__()
    assert "generate" not in vars(model)


@pytest.mark.parametrize("make", [*METHODS, lambda model, processor: projection(model, processor, per="token")])
def test_each_chunk_of_a_prompt_is_judged_and_no_decode_step_is(model, processor, make):
    text = {"input_ids": torch.arange(20, 29)[None]}
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        seen = []
        handle = patch.text_model.register_forward_hook(lambda module, args, output: seen.append(method.risk))
        generate(model, text, prefill_chunk_size=4, past_key_values=DynamicCache())
        handle.remove()
    assert len({id(risk) for risk in seen[:3]}) == 3
    assert seen[2] is seen[3] is seen[4]


@pytest.mark.parametrize("make", METHODS)
def test_a_prompt_beyond_the_models_positions_is_refused(model, processor, make, monkeypatch):
    """Whose risk means nothing. Padding before a prompt is no part of it."""
    inputs, text = prompts(processor, (6,)), {"input_ids": torch.arange(20, 52)[None]}
    whole = {"input_ids": text["input_ids"][:, :30], "attention_mask": torch.ones(1, 30, dtype=torch.long)}
    padded = [
        given | {name: torch.nn.functional.pad(given[name], (20, 0)) for name in ("input_ids", "attention_mask")}
        for given in (inputs, whole)
    ]
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 30)
        for given in (inputs, whole, *padded):
            generate(model, given)
        assert not method.failed.any()
        static = {"cache_implementation": "static", "disable_compile": True}  # its length is on the device
        for options in ({}, {"prefill_chunk_size": 4, "past_key_values": DynamicCache()}, {"prefill_chunk_size": 4} | static):
            with pytest.raises(ValueError, match="a prompt has 32 tokens; LlavaForConditionalGeneration has 30 positions"):
                generate(model, text, **options)


def test_an_image_takes_no_more_positions_than_its_rope_gives_it(monkeypatch):
    """By M-RoPE fewer than it has tokens, and not as many in each channel: of a prompt that ends in one the fewest count."""
    family = FAMILIES["qwen2_5_vl"]
    model, positions = family.model("qwen2_5_vl"), []
    inputs = family.inputs(model, ["tII"])
    del inputs["regions"]
    shape = inputs["input_ids"].shape
    inputs = {name: tensor[:, :-1] if tensor.shape == shape else tensor for name, tensor in inputs.items()}  # the end's mark
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, autosteer(model, None)):
        with patch.text_model.register_forward_pre_hook(lambda m, a, k: positions.append(k["position_ids"]), with_kwargs=True):
            model(**inputs)
        fewest, *_, most = sorted(1 + positions[0].flatten(1).amax(1))
        assert fewest < most < shape[1]
        monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", int(fewest))
        model(**inputs)
        monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", int(fewest) - 1)
        with pytest.raises(ValueError, match=f"a prompt has {fewest} tokens"):
            model(**inputs)


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("cached", [4, 8])
def test_guessed_tokens_on_a_cache_are_refused(model, processor, make, cached):
    ids = torch.tensor([[9, 30, 31, 9, 30, 31, 9, 30, 31]])
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)):
        past = model(input_ids=ids[:, :cached], use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="assisted decoding"):
            generate(model, {"input_ids": ids}, past_key_values=past, prompt_lookup_num_tokens=3)
        with pytest.raises(RuntimeError, match="assisted decoding"):
            model(input_ids=ids[:, cached - 3 :], past_key_values=past, logits_to_keep=2)


OPTIONS = [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]


@pytest.mark.parametrize("make", [*METHODS, lambda model, processor: projection(model, processor, per="token")])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_that_ends_in_padding_is_at_full_risk(model, processor, make, options):
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        generate(model, prompts(processor, (3, 6, 5)), max_new_tokens=1, **options)
    expected = torch.tensor([True, False, True]).repeat_interleave(options.get("num_beams", 1))
    assert torch.equal(method.failed, expected)
    assert torch.equal(method.risk == 1, expected)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_row_that_ends_in_padding_is_at_full_risk_where_image_tokens_see_each_other(name):
    """The masks come to the text model ready made, as ranges of each token's own."""
    family = FAMILIES[name]
    model = family.model(name)
    left = family.inputs(model, ["tItt", "tIttttttttt", "ttIttt"])
    del left["regions"]
    order = left["attention_mask"].argsort(dim=1, descending=True, stable=True)
    right = {key: value.gather(1, order) if value.shape == order.shape else value for key, value in left.items()}
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, autosteer(model, None)) as method:
        for inputs, expected in ((left, [False, False, False]), (right, [True, False, True])):
            model(**inputs)
            assert method.failed.tolist() == expected


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("to_come", [0, 1])
def test_a_padding_mask_may_be_as_long_as_the_cache(model, processor, make, static, to_come):
    """What it says about tokens to come is not what it says about the last one; what it does not reach is hidden."""
    ids, mask = torch.full((3, 8), 9), torch.full((3, 24), to_come)
    mask[:, :8] = torch.tensor([[1] * 8, [1] * 4 + [0] * 4, [0] * 6 + [1] * 2])
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        for pieces in ([8], [4, 4]):
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=24) if static else DynamicCache()
            for piece in ids.split(pieces, 1):
                model(input_ids=piece, attention_mask=mask, past_key_values=cache, use_cache=True)
            assert method.failed.tolist() == [False, True, False]
        model(input_ids=ids, attention_mask=mask[:, :7])
        assert method.failed.all()


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("pieces", [[8], [4, 4], [6, 2]], ids=str)
def test_ranges_of_each_querys_own_that_end_before_padding_are_at_full_risk(model, processor, make, pieces):
    lengths, place = torch.tensor([8, 5]), torch.arange(8)
    ends = torch.minimum(place + 1, lengths[:, None])
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        cache = DynamicCache()
        for ids, end in zip(torch.full((2, 8), 9).split(pieces, 1), ends.split(pieces, 1), strict=True):
            model(input_ids=ids, attention_mask=range_mask(torch.zeros_like(end), end), past_key_values=cache, use_cache=True)
    assert method.failed.tolist() == [False, True]


PIECES = [{"prefill_chunk_size": 3}, {"prefill_chunk_size": 3, "cache_implementation": "static", "disable_compile": True}]


@pytest.mark.parametrize("make", [*METHODS, lambda model, processor: projection(model, processor, per="token")])
@pytest.mark.parametrize("options", [{}, *PIECES, PIECES[1] | {"num_beams": 2}], ids=str)
def test_padding_that_reaches_beyond_a_window_is_at_full_risk(processor, make, options):
    """In the later pieces of the first row every key that a position may see is padding, and so it is in the first pieces of
    the second."""
    model = sliding_llava(processor, window=3)
    ids, mask = torch.full((4, 14), 9), torch.zeros(4, 14, dtype=torch.long)
    mask[0, :2] = mask[1, 12:] = mask[2] = mask[3, 4:6] = 1
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        generate(model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=1, **options)
    expected = torch.tensor([True, False, False, True]).repeat_interleave(options.get("num_beams", 1))
    assert torch.equal(method.failed, expected)
    assert torch.equal(method.risk == 1, expected)


def test_a_static_cache_that_counts_on_another_device_than_the_last_norm():
    """As under a device map; "meta" stands for the norm's, and takes no tensor [1] of another."""
    state = PromptState(None, "state")
    state.past = torch.tensor([3])
    assert state.note_prompt(2, 4, torch.device("meta"))
    assert (state.begun.device.type, state.begun.shape) == ("meta", (2,))


@pytest.mark.parametrize("make", METHODS)
def test_a_row_that_ends_in_padding_is_steered_wherever_it_is_answered_from(model, processor, make):
    """A loop of one's own reads each row at its last token: there it is as steered as at the last position of all."""
    inputs = prompts(processor, (3, 6))
    with torch.no_grad(), ras_fast.patch(model) as patch:
        plain = model(**inputs).logits
        with ras_fast.methods.attach(patch, make(model, processor)):
            steered = model(**inputs).logits
    moved = (steered - plain).abs().amax(-1) > 1e-3
    assert moved[0].all()
    assert not moved[1, :-1].any()


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("additive", [False, True])
def test_padding_that_sees_nothing_is_at_full_risk(model, processor, make, additive):
    """By a mask of four dimensions, of one's own."""
    inputs = prompts(processor, (3, 6))
    valid = inputs.pop("attention_mask").bool()
    seen = valid[:, None, None] & valid[:, None, :, None] & torch.ones(22, 22, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        model(**inputs, attention_mask=mask)
    assert method.failed.tolist() == [True, False]
    assert method.risk[0] == 1


def test_an_answer_to_nothing_but_padding_is_steered(model, processor):
    """Nor is there anything to judge it by."""
    ids = torch.arange(20, 26).repeat(2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 6, [1] * 6])}
    with ras_fast.patch(model) as patch:
        plain = generate(model, inputs, max_new_tokens=6)
        profile = autosteer(model, processor)
        profile.config["threshold"] = 1 - 1e-6  # the prober's word opens no gate
        with ras_fast.methods.attach(patch, profile):
            steered = generate(model, inputs, max_new_tokens=6)
    assert (steered != plain).any(1).tolist() == [True, False]


@pytest.mark.parametrize("make", METHODS)
def test_padding_before_a_prompt_is_no_failure(model, processor, make):
    """Nor where chunks of a prompt that is read in pieces hold nothing else."""
    ids = torch.tensor([[0] * 10 + [20, 21, 22], list(range(20, 33))])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        failed = []
        handle = patch.text_model.register_forward_hook(lambda module, args, output: failed.append(method.failed.any().item()))
        generate(model, inputs, prefill_chunk_size=4, past_key_values=DynamicCache())
        handle.remove()
    assert len(failed) == 6
    assert not any(failed)


@pytest.mark.parametrize("options", [{"past_key_values": DynamicCache}, OPTIONS[2]], ids=["dynamic", "static"])
def test_a_piece_of_mere_padding_is_not_judged(model, processor, monkeypatch, options):
    """A row of AutoSteer's is steered once any piece of its prompt was risky; here all rows are in the first piece alone."""
    ids = torch.tensor([[0] * 6 + [20, 21, 22], list(range(20, 29))])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assess, gated_linear, judged, gates = ras_fast.methods.autosteer.assess, ras_fast.ops.gated_linear, [], []

    def risky_at_first(*args):
        risk, failed = assess(*args)
        judged.append(risk)
        return torch.full_like(risk, float(len(judged) == 1)), failed

    def noted(x, weight, gate, **kwargs):
        gates.append(gate)
        return gated_linear(x, weight, gate, **kwargs)

    monkeypatch.setattr(ras_fast.methods.autosteer, "assess", risky_at_first)
    monkeypatch.setattr(ras_fast.methods.autosteer.ops, "gated_linear", noted)
    options = {name: value() if isinstance(value, type) else value for name, value in options.items()}
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, autosteer(model, processor)):
        generate(model, inputs, prefill_chunk_size=4, **options)
    assert len(judged) == 3
    assert (gates[-1] > 0).tolist() == [False, True]


def test_layers_that_would_run_for_the_last_positions_alone_run_for_all():
    """Gemma 4's last ones, where few logits are asked for, as by `generate`. A risk is read from layers of either kind."""
    family = FAMILIES["gemma4"]
    model = family.model("gemma4")
    inputs = family.inputs(model, ["tItttt"])
    del inputs["regions"]
    tensors = {"prototypes": torch.randn(3, 64), "attention_weights": torch.randn(6), "attention_bias": torch.zeros(1)}
    profile = RasProfile("attention", {"heads": [[0, 1], [3, 3]]}, tensors, fingerprint(model))
    risks = []
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
        for kept in (0, 1):
            model(**inputs, logits_to_keep=kept)
            risks.append(method.risk)
    assert not method.failed.any()
    assert torch.allclose(*risks)


@pytest.mark.parametrize("make", METHODS)
def test_an_unpatched_model_does_not_answer_undefended(model, processor, make):
    patch = ras_fast.patch(model)
    profile = make(model, processor)
    profile.tensors["region_bias"] = torch.ones(3, 4)
    with ras_fast.methods.attach(patch, profile):
        patch.unpatch()
        with pytest.raises(RuntimeError, match="unpatched while a method defends it"):
            generate(model, prompts(processor))
        with pytest.raises(RuntimeError, match="unpatched while a method defends it"):
            ras_fast.patch(model)  # nor would it be steered through another handle
    generate(model, prompts(processor))
    assert "_prefill" not in model.__dict__


@pytest.mark.parametrize(
    ("how", "make"),
    [
        pytest.param(how, make, marks=() if i == j else pytest.mark.slow)
        for i, how in enumerate(["call", "forward", "module"])
        for j, make in enumerate(METHODS)
    ],
)
def test_a_text_model_that_was_compiled_by_itself_is_refused(processor, make, how):
    """Hooks that it gets after it was traced are not run: the answer would not be defended."""
    model = endless_llava(processor, 3)
    with ras_fast.patch(model) as patch:
        text_model = patch.text_model
        if how == "call":
            text_model.compile(backend="eager")
        elif how == "forward":
            text_model.forward = torch.compile(text_model.forward, backend="eager")
        else:
            model.model.language_model = torch.compile(text_model, backend="eager")
        generate(model, prompts(processor), max_new_tokens=1)
        with pytest.raises(ValueError, match="was compiled by itself"), ras_fast.methods.attach(patch, make(model, processor)):
            generate(model, prompts(processor))


def test_a_whole_model_that_was_compiled_before_is_defended(processor):
    model = endless_llava(processor, 3)
    profile, inputs = autosteer(model, processor), prompts(processor)
    profile.config["threshold"] = 0.0
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), ras_fast.patch(model) as patch:
        plain = compiled(**inputs, use_cache=False).logits
        with ras_fast.methods.attach(patch, profile):
            expected, found = (one(**inputs, use_cache=False).logits for one in (model, compiled))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found[:, -1], plain[:, -1], atol=1e-2)


@pytest.mark.parametrize("make", [autosteer, projection])
def test_continuous_batching_is_refused(model, processor, make):
    """Which has all sequences in one row: it would be judged at each step, by the last of them."""
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with ras_fast.patch(model, regions=False) as patch, ras_fast.methods.attach(patch, make(model, processor)):
        results = model.generate_batch([[21, 22, 23]], options, ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64))
    assert [(result.generated_tokens, "without rows" in result.error) for result in results.values()] == [([], True)]


@pytest.mark.parametrize("make", METHODS)
def test_a_block_that_only_the_garbage_collector_ends(model, processor, make):
    """As of a generator that streams an answer, and is left half-way with its exception's traceback around it."""

    def stream():
        with ras_fast.methods.attach(patch, profile):
            yield

    def hooks():
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
        return [list(getattr(module, kind)) for module in model.modules() for kind in kinds], set(vars(model))

    with ras_fast.patch(model) as patch:
        before, profile = hooks(), make(model, processor)
        cycle = [stream()]
        cycle.append(cycle)
        next(cycle[0])
        assert hooks() != before
        del cycle
        gc.collect()
        assert hooks() == before


def test_arguments_without_names_count(model, processor):
    """The mask and the cache among them: or a row that ends in padding would pass, and each step would be judged anew."""
    ids, mask = torch.tensor([[21, 22, 23, 0]]), torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, autosteer(model, processor)) as method:
        cache = DynamicCache()
        patch.text_model(ids, mask, None, cache)
        assert method.failed.tolist() == [True]
        patch.text_model(ids[:, :1], None, None, cache)
        assert method.risk.tolist() == [1.0]


@pytest.mark.parametrize("make", METHODS)
def test_a_cache_that_the_output_does_not_name_is_judged(model, processor, make):
    """As in a tuple."""
    ids, cache = torch.arange(20, 26)[None], DynamicCache()
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)) as method:
        patch.region_map = RegionMap(torch.full((1, 8), -1, dtype=torch.int32), 0)
        assert isinstance(patch.text_model(ids, past_key_values=cache, return_dict=False), tuple)
        before = method.risk
        patch.text_model(ids[:, :1], past_key_values=cache)
        assert method.risk is before


def test_the_generate_of_a_part_is_followed():
    """InstructBLIP's own calls that of its language model."""
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_attention_heads": 4}
    vision = sizes | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    text = sizes | {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 100, "pad_token_id": 0, "eos_token_id": None}
    config = AutoConfig.for_model(
        "instructblip", vision_config=vision, text_config=text, num_query_tokens=4, image_token_index=99,
        qformer_config=sizes | {"num_hidden_layers": 1, "vocab_size": 100, "encoder_hidden_size": D},
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config).eval()
    ids = torch.tensor([[99] * 4 + [21, 22, 23]])
    asked = {"input_ids": ids, "qformer_input_ids": ids[:, -2:], "pixel_values": torch.randn(1, 3, 16, 16)}
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, autosteer(model, None)):
        generate(model, asked)
        with pytest.raises(RuntimeError, match="guessed tokens"):
            generate(model, asked, prompt_lookup_num_tokens=2)
    assert not any(name in module.__dict__ for module in model.modules() for name in ("generate", "_prefill"))


# Another profile, another model


def constant(model, processor, alpha=5.0):
    return from_vectors(model, processor, torch.randn(D), alpha, layers=[1, 2])


def later(cache):
    """A further question on this cache."""
    ids = torch.cat([torch.ones(1, cache.get_seq_length(), dtype=torch.long), torch.tensor([[40, 41, 42]])], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}


SWITCHES = {
    "never to always": lambda model, processor: (projection(model, processor), constant(model, processor)),
    "token to always": lambda model, processor: (projection(model, processor, per="token"), constant(model, processor)),
    "weak to strong": lambda model, processor: (constant(model, processor, 1e-6), constant(model, processor)),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_cache_that_another_profile_judged_is_judged_anew(model, processor, switch):
    before, after = SWITCHES[switch](model, processor)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        cache = DynamicCache()
        with ras_fast.methods.attach(patch, before):
            model(**prompts(processor), past_key_values=cache)
        fresh = copy.deepcopy(cache)
        del fresh.__dict__["_ras_fast_kept"][next(n for n in fresh.__dict__["_ras_fast_kept"] if n != "regions")]
        with ras_fast.methods.attach(patch, after) as method:
            found = generate(model, later(cache))
            assert method.risk.tolist() == [1.0]
            assert torch.equal(found, generate(model, later(fresh)))


def test_a_cache_that_was_judged_with_another_alpha_is_judged_anew(model, processor):
    method = Projection(constant(model, processor))
    with torch.no_grad(), ras_fast.patch(model) as patch:
        cache = DynamicCache()
        for alpha in (0.0, 5.0):
            with method.attach(patch, alpha=torch.tensor([alpha])):
                model(**(later(cache) if alpha else prompts(processor) | {"past_key_values": cache}))
            assert method.risk.tolist() == [float(alpha != 0)]


@pytest.mark.parametrize("make", METHODS)
def test_a_cache_stays_judged_in_a_later_block_of_the_same_profile(model, processor, make):
    profile = make(model, processor)
    loaded = RasProfile(profile.method, dict(profile.config), {n: t.clone() for n, t in profile.tensors.items()})
    loaded.fingerprint = profile.fingerprint
    with torch.no_grad(), ras_fast.patch(model) as patch:
        cache = DynamicCache()
        with ras_fast.methods.attach(patch, profile):
            model(**prompts(processor), past_key_values=cache)
        with ras_fast.methods.attach(patch, loaded) as method:
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
            assert method.risk is None  # a decode step judges nothing


@pytest.mark.parametrize("make", METHODS)
def test_a_model_that_becomes_another_one_inside_the_block_is_refused(processor, make):
    """It may become itself again."""
    model = endless_llava(processor, 3)
    inputs, weights = prompts(processor), copy.deepcopy(model.state_dict())
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)):
        generate(model, inputs)
        model.load_state_dict({name: tensor + 1 for name, tensor in weights.items()})
        with pytest.raises(ValueError, match="calibrated on another model"):
            generate(model, inputs)
        model.load_state_dict(weights)
        generate(model, inputs)


def twin(module, *arguments):
    """Another module with its weights."""
    made = type(module)(*arguments).eval()
    made.load_state_dict(module.state_dict())
    return made


def replace_part(model, part):
    text = model.model.language_model
    if part == "model":
        model.model = twin(model.model, model.config)
    elif part == "text model":
        model.model.language_model = twin(text, text.config)
    elif part == "layer":
        text.layers[1] = twin(text.layers[1], text.config, 1)
    elif part == "norm":
        text.norm = twin(text.norm, D)
    else:
        for module in (text.layers[1], text.norm):  # as kernels of the hub are put there
            module.forward = MethodType(type(module).forward, module)


@pytest.mark.parametrize("part", ["model", "text model", "layer", "norm"])
@pytest.mark.parametrize("make", METHODS)
def test_a_part_that_is_replaced_inside_the_block_is_refused(processor, make, part):
    """By another one with its weights, so that the model stays the profile's, but without the method's hooks."""
    model, inputs = endless_llava(processor, 3), prompts(processor)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)):
        generate(model, inputs)
        replace_part(model, part)
        with pytest.raises(RuntimeError, match="was replaced"):
            generate(model, inputs)


@pytest.mark.parametrize("make", [attention, projection])
def test_a_forward_that_is_replaced_inside_the_block_is_refused(processor, make):
    model, inputs = endless_llava(processor, 3), prompts(processor)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, make(model, processor)):
        generate(model, inputs)
        replace_part(model, "forward")
        with pytest.raises(RuntimeError, match="or its forward, was replaced"):
            generate(model, inputs)


@pytest.mark.parametrize(("part", "error"), [("model", RuntimeError), ("text model", RuntimeError), ("forward", ValueError)])
@pytest.mark.parametrize("make", [attention, projection])
def test_what_was_replaced_since_the_patch_is_not_taken_for_steered(processor, make, part, error):
    model = endless_llava(processor, 3)
    with ras_fast.patch(model) as patch:
        replace_part(model, part)
        with pytest.raises(error, match=r"was replaced|still in the model|replaced since"):
            ras_fast.methods.attach(patch, make(model, processor)).__enter__()


def test_an_adapter_that_is_switched_inside_the_block_is_refused(processor):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(endless_llava(processor, 3), lora, adapter_name="one").eval()
    model.add_adapter("two", lora)
    with ras_fast.patch(model.eval()) as patch, ras_fast.methods.attach(patch, constant(model, processor)):
        generate(model, prompts(processor))
        model.set_adapter("two")
        with pytest.raises(ValueError, match="adapters: profile 'one"):
            generate(model, prompts(processor))


def test_a_model_is_compared_again_only_where_it_changed(model, processor, monkeypatch):
    checks, check = [], RasProfile.check
    monkeypatch.setattr(RasProfile, "check", lambda *arguments: checks.append(check(*arguments)))
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, autosteer(model, processor)):
        for lengths in ((6,), (6, 6), (6,)):
            generate(model, prompts(processor, lengths))
    assert len(checks) == 1


def test_a_profile_may_be_at_work_twice(model, processor):
    """Each judges the prompt, and none takes another's word for its own."""
    profile = autosteer(model, processor)
    with torch.no_grad(), ras_fast.patch(model) as patch, ExitStack() as blocks:
        methods = [blocks.enter_context(ras_fast.methods.attach(patch, profile)) for _ in range(3)]
        cache = model(**prompts(processor), use_cache=True).past_key_values
        assert all(method.risk is not None for method in methods)
    assert len(cache.__dict__["_ras_fast_kept"]) == 8  # the images, up to where; of each method its gates and what had begun


def test_blocks_may_end_in_any_order(model, processor):
    """What is left is a method at work, and then a model as it was."""
    inputs = prompts(processor)
    first, last = ({name: inputs[name][:, cut] for name in ("input_ids", "attention_mask")} for cut in (slice(-1), slice(None)))
    outer, inner = autosteer(model, processor), projection(model, processor)
    outer.tensors["region_bias"], inner.tensors["region_bias"] = torch.ones(3, 4), torch.full((3, 4), 2.0)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        blocks = [ras_fast.methods.attach(patch, profile) for profile in (outer, inner)]
        _, method = (block.__enter__() for block in blocks)
        blocks[0].__exit__(None, None, None)
        cache = model(**first, pixel_values=inputs["pixel_values"], use_cache=True).past_key_values
        assert patch.region_bias[0].tolist() == [2.0] * 4
        method.risk = None
        generate(model, last, past_key_values=cache)
        assert method.risk is not None
        blocks[1].__exit__(None, None, None)
        assert not patch.region_bias
    assert not {"generate", "_prefill", "_get_candidate_generator"} & set(vars(model))


def test_a_profile_that_is_a_path_is_refused_in_words(model):
    with ras_fast.patch(model) as patch, pytest.raises(ValueError, match="profile is a str; it needs to be a RasProfile"):
        ras_fast.methods.attach(patch, "folder")
