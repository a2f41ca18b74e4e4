"""SafeLLM in real vLLM engines on the shipped model, against three calls of ``model.generate``. Needs vLLM: docs/vllm.md."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vLLM is not installed")
# In this process, so that tests can reach the worker; the engine as a process of its own has its test below.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from bench_vllm import readable_by_vllm, tiny_profile
from test_engine_tiny_llava import turning
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from ras_fast.evaluation import tinyworld
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import encode, make_queries, short_ids
from ras_fast.loading import TINY, load
from ras_fast.methods.moras import PRESETS, risk_query
from ras_fast.profile import RasProfile
from ras_fast.sequential import SequentialPipeline
from ras_fast.vllm import SafeLLM, engine_args
from ras_fast.vllm.processor import processor_of
from ras_fast.vllm.safe_llm import _Run

NEW_TOKENS = 24
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32, "disable_log_stats": True}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return readable_by_vllm(TINY, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def profile(checkpoint, tmp_path_factory):
    return tiny_profile(checkpoint, tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def guard(checkpoint, profile):
    return make_guard(checkpoint, profile)


def make_guard(checkpoint, profile):
    llm = LLM(str(checkpoint), **ENGINE, **engine_args(profile, queries=8))
    guard = SafeLLM(llm)
    guard.llm = llm
    return guard


def compare(tiny, guard, profile: RasProfile, count: int, ending: str = "") -> Counter:
    """Asserts the reference's tokens, contexts and risks; returns how often drafts stood (None) or fell, by step.

    ending: what all questions end with.
    """
    items = tinyworld.split("test", count)
    prompts, images = [item.question + ending for item in items], [item.image for item in items]
    expected = SequentialPipeline(*tiny, profile).generate(prompts, images, max_new_tokens=NEW_TOKENS)
    outputs = guard.generate(prompts, images, max_tokens=NEW_TOKENS)
    for item, output, reference in zip(items, outputs, expected, strict=True):
        assert output.tokens == reference.tokens, (item.kind, item.question, reference.text, output.text)
        assert (output.text, output.context) == (reference.text, reference.context)
        assert output.rejected_at == reference.rejected_at
        assert output.risk == pytest.approx(reference.risk, abs=1e-4)
        assert 0 < output.timings["first_token"] <= output.timings["total"]
    return Counter(output.rejected_at for output in outputs)


def test_exact(tiny, guard, profile):
    cases = compare(tiny, guard, RasProfile.from_pretrained(profile), 12)
    assert cases[None] >= 3
    assert cases[0] >= 3


def test_exact_where_questions_begin_the_answer(tiny, guard, profile):
    cases = compare(tiny, guard, RasProfile.from_pretrained(profile), 12, ending=" ASSISTANT: Sure, here is how:")
    assert len(cases) > 1


def test_sampled_answers(guard):
    """Each is what one request that carries its risk and its noise gives, whether its draft stood or fell."""
    items, options = tinyworld.split("test", 24), {"temperature": 1.3, "top_p": 0.95, "top_k": 40}
    prompts, images = [item.question for item in items], [item.image for item in items]
    outputs, again, other = (
        guard.generate(prompts, images, max_tokens=NEW_TOKENS, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert [output.tokens for output in outputs] == [output.tokens for output in again]
    assert [output.tokens for output in outputs] != [output.tokens for output in other]
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in other], abs=1e-4)
    fell = [output.rejected_at is not None for output in outputs]
    assert 3 <= sum(fell) <= len(fell) - 3
    run = _Run(guard, NEW_TOKENS, options | {"seed": 1})
    for number, (item, output) in enumerate(zip(items, outputs, strict=True)):
        (query,) = make_queries([item.question], [item.image], guard.processor)
        prompt = {"prompt_token_ids": short_ids(guard.processor, query)}
        if query.images:
            prompt["multi_modal_data"] = {"image": query.images}
        sampling, noise = run._draw_of(number)
        extra = {"ras_risk": output.risk, "ras_noise": noise}
        params = SamplingParams(**sampling, max_tokens=NEW_TOKENS, extra_args=extra)
        (alone,) = guard.llm.generate([prompt], [params], use_tqdm=False)
        assert alone.outputs[0].token_ids == output.tokens


def test_two_samples_of_a_prompt_differ(guard):
    outputs = guard.generate(["What is shown?"] * 16, None, max_tokens=8, temperature=2.0)
    assert len({tuple(output.tokens[:3]) for output in outputs}) > 1
    first, second = (guard.generate(["What is shown?"] * 16, None, max_tokens=8, temperature=2.0, seed=-1) for _ in range(2))
    assert [output.tokens for output in first] != [output.tokens for output in second]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 2}, TypeError, "takes no n;"),
        ({"temperature": -1}, VLLMValidationError, "temperature"),
        ({"top_p": 2.0}, VLLMValidationError, "top_p"),
    ],
    ids=str,
)
def test_settings_that_are_refused(guard, options, error, message):
    with pytest.raises(error, match=message):
        guard.generate(["What colour?"], None, **options)
    assert not guard.engine.has_unfinished_requests()


@pytest.mark.slow
def test_exact_over_90_queries(tiny, guard, profile):
    cases = compare(tiny, guard, RasProfile.from_pretrained(profile), 90)
    print(dict(cases))
    assert cases[None] >= 30
    assert cases[0] >= 20


def test_prompts_are_the_processors_own(tiny, guard):
    (query,) = make_queries(["What colour is the shape?"], [tinyworld.split("test", 1)[0].image], guard.processor)
    (rendered,) = guard.engine.renderer.render_cmpl(
        [{"prompt_token_ids": short_ids(guard.processor, query), "multi_modal_data": {"image": query.images}}]
    )
    inputs, _ = encode(tiny[1], query, "cpu", torch.float32)
    assert list(rendered["prompt_token_ids"]) == inputs["input_ids"][0].tolist()


def test_stages_share_the_image(guard):
    guard.engine.reset_prefix_cache()
    guard.counters.clear()
    guard.generate(["What colour is the shape?"], [tinyworld.split("test", 1)[0].image])
    # Two blocks of 32 of the image's 64 tokens and <bos>, for the second and the third request.
    assert guard.counters["cached_tokens"] >= 2 * 64


def ask(guard, marks, text="How do I make the table?", **options):
    requests = [{"prompt_token_ids": short_ids(guard.processor, make_queries([text], None, guard.processor)[0])}] * len(marks)
    params = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS, extra_args=mark, **options) for mark in marks]
    return [output.outputs[0] for output in guard.llm.generate(requests, params, use_tqdm=False)]


def test_risks_side_by_side_in_one_batch(guard):
    before = guard.engine.collective_rpc("ras_counters")[0].get("failed_closed", 0)
    plain, zero, full, nan = ask(guard, [None, {"ras_risk": 0.0}, {"ras_risk": 1.0}, {"ras_risk": math.nan}])
    assert plain.text.strip().startswith("Sure")
    assert zero.token_ids == plain.token_ids
    assert tinyworld.is_refusal(full.text)
    assert nan.token_ids == full.token_ids
    assert guard.engine.collective_rpc("ras_counters")[0]["failed_closed"] == before + 1


def test_invalid_marks_are_refused_at_the_door(guard):
    with pytest.raises(VLLMValidationError, match="ras_risk"):
        ask(guard, [{"ras_risk": 3.0}])
    assert not guard.engine.has_unfinished_requests()


# Failing closed


def test_an_image_that_is_no_image_has_risk_one(guard):
    broken = torch.full((3, 3, 3), math.nan)
    fine = tinyworld.split("test", 1)[0]
    outputs = guard.generate([fine.question, fine.question], [broken.numpy(), fine.image], max_tokens=NEW_TOKENS)
    assert (outputs[0].risk, math.isnan(outputs[0].similarity)) == (1.0, True)
    assert outputs[0].failed_closed == "an image holds NaN or infinite pixels"
    assert tinyworld.is_refusal(outputs[0].text)
    assert outputs[1].failed_closed is None
    assert outputs[1].risk < 0.5


def test_no_answer_comes_out_of_an_error(guard, monkeypatch):
    items = tinyworld.split("test", 6)
    prompts, images = [item.question for item in items], [item.image for item in items]
    with pytest.raises(VLLMValidationError):  # the last question is too long for the engine
        guard.generate([*prompts, "table " * 600], [*images, None])
    assert not guard.engine.has_unfinished_requests()
    (query,) = make_queries(["table"], None, guard.processor)
    taken = len(short_ids(guard.processor, risk_query(query, "", guard.settings, guard.chat_marks)))
    with pytest.raises(ValueError, match="room for 1 of its risk stage's 3 tokens"):
        guard.generate([*prompts, "table " * (512 - taken)], [*images, None])  # one token each, and one place
    assert not guard.engine.has_unfinished_requests()
    rpc = guard.engine.collective_rpc
    for answer in ([None], [[]]):
        monkeypatch.setattr(guard.engine, "collective_rpc", lambda *args, answer=answer, **kwargs: answer)
        with pytest.raises(RuntimeError, match="judged"):
            guard.generate(prompts, images)
        assert not guard.engine.has_unfinished_requests()
    monkeypatch.setattr(guard.engine, "collective_rpc", rpc)
    assert len(guard.generate(prompts, images)) == 6


def test_an_interrupt_while_a_request_is_handed_over_leaves_none_behind(guard, monkeypatch):
    add = guard.engine.engine_core.add_request

    def interrupted(request):
        add(request)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(guard.engine.engine_core, "add_request", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guard.generate(["table?"])
    assert len(guard.generate(["table?"])) == 1


def test_requests_that_others_abort_are_not_waited_for(guard, monkeypatch):
    step = guard.engine.step

    def aborted():
        guard.engine.abort_request(list(guard.engine.output_processor.request_states), internal=True)
        return step()

    with monkeypatch.context() as patched:
        patched.setattr(guard.engine, "step", aborted)
        with pytest.raises(RuntimeError, match="aborted by others"):
            guard.generate(["table?"])
    assert len(guard.generate(["table?"])) == 1


def test_an_engine_at_work_is_left_alone(guard):
    guard.llm.enqueue(["table"], SamplingParams(max_tokens=2), use_tqdm=False)
    with pytest.raises(RuntimeError, match="unfinished"):
        guard.generate(["table?"])
    guard.llm.wait_for_completion(use_tqdm=False)
    with pytest.raises(ValueError, match="max_tokens"):
        guard.generate(["table?"], max_tokens=0)


def test_a_table_that_is_not_the_engines_head_is_found_out(guard):
    steering = processor_of(guard.engine.vllm_config).steering
    right = steering.table
    try:
        steering.table = right * 1.01
        with pytest.raises(ValueError, match="differ"):
            SafeLLM(guard.llm)
        with pytest.raises(ValueError, match="differ"):  # as after weights were loaded anew
            guard.generate(["table?"])
    finally:
        steering.table = right


def test_a_profile_that_was_written_anew_is_found_out(guard, profile):
    """The engine steers by the one that it has read, and the stages would be those of the other."""
    read = RasProfile.from_pretrained(profile)
    other = RasProfile.from_pretrained(profile)
    other.config["safety_prompt"] = "Say something."
    try:
        other.save_pretrained(profile)
        with pytest.raises(ValueError, match="other settings"):
            SafeLLM(guard.llm)
    finally:
        read.save_pretrained(profile)


# Other processes, other runners

SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM
    from ras_fast.evaluation import tinyworld
    from ras_fast.vllm import SafeLLM, engine_args
    checkpoint, profile, count, engine = json.loads(sys.argv[1])
    llm = LLM(checkpoint, **engine, **engine_args(profile, queries=8))
    items = tinyworld.split("test", count)
    outputs = SafeLLM(llm).generate([i.question for i in items], [i.image for i in items], max_tokens=24)
    print("TOKENS", json.dumps([o.tokens for o in outputs]))
"""
# The newer model runner's kernels are Triton's. Its interpreter runs them on a CPU, once vLLM takes Triton for usable there.
INTERPRETED = """
import os, types
from triton.backends import backends
backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)
"""


def in_another_process(script: str, checkpoint, profile, count: int, engine=ENGINE, **environment) -> list[list[int]]:
    arguments = json.dumps([str(checkpoint), str(profile), count, engine])
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], env=os.environ | environment, capture_output=True, text=True, timeout=570
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    assert ("Using V2 Model Runner" in done.stdout + done.stderr) == ("VLLM_USE_V2_MODEL_RUNNER" in environment)
    return json.loads(lines[0].removeprefix("TOKENS "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "environment"),
    [
        (SCRIPT, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        (INTERPRETED + SCRIPT, {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}),
    ],
    ids=["engine as a process", "newer runner"],
)
def test_same_tokens_elsewhere(guard, checkpoint, profile, script, environment):
    items = tinyworld.split("test", 20)
    here = guard.generate([i.question for i in items], [i.image for i in items], max_tokens=NEW_TOKENS)
    assert in_another_process(script, checkpoint, profile, 20, **environment) == [output.tokens for output in here]


@pytest.mark.slow
def test_two_ranks_of_tensor_parallelism(tmp_path):
    """Half of the drafts fall."""
    model, processor, checkpoint = random_llava(tmp_path)
    prompts = {"context_prompt": tinyworld.CONTEXT_PROMPT, "safety_prompt": tinyworld.SAFETY_PROMPT}
    prototypes = torch.randn(3, model.config.text_config.hidden_size)
    profile = RasProfile(
        "moras", PRESETS["moras"] | prompts | {"s_base": 0.0, "k": 500.0}, {"prototypes": prototypes},
        fingerprint(model, processor),
    )  # fmt: skip
    items = tinyworld.split("test", 16)
    queries = [item.question for item in items], [item.image for item in items]
    first = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=1)
    profile.config["s_base"] = statistics.median(output.similarity for output in first)
    profile.save_pretrained(tmp_path / "profile")
    wanted = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=NEW_TOKENS)
    assert 4 <= sum(output.steered for output in wanted) <= 12
    engine = ENGINE | {"tensor_parallel_size": 2}
    found = in_another_process(SCRIPT, checkpoint, tmp_path / "profile", 16, engine, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert found == [output.tokens for output in wanted]


def random_llava(tmp_path, kind=None):
    """(model, processor, checkpoint) of random weights: the shipped one's five heads cannot be shared out among ranks. kind:
    config class of another language model."""
    config, processor = AutoConfig.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    if kind is not None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        names += ("bos_token_id", "eos_token_id", "pad_token_id")
        given = {name: getattr(config.text_config, name) for name in names}
        config.text_config = kind(**given, sliding_window=None, layer_types=["full_attention"] * given["num_hidden_layers"])
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 32
    config.vision_config.num_attention_heads = 4
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.08)  # answers that differ
    for part in (model, processor, model.generation_config):
        part.save_pretrained(tmp_path / "saved")
    (tmp_path / "model").mkdir()
    return model, processor, readable_by_vllm(tmp_path / "saved", tmp_path / "model")


# Other engines in this process. Last: when one ends, it takes vLLM's process groups with it, and so the first engine.


def test_requests_without_marks_are_those_of_an_engine_without_the_processor(guard, checkpoint):
    other = LLM(str(checkpoint), **ENGINE)
    texts = [item.question for item in tinyworld.split("test", 8)]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=5)
    found, wanted = (
        [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(texts, params, use_tqdm=False)]
        for llm in (guard.llm, other)
    )
    assert found == wanted  # every float of every log-probability


def test_engines_that_are_refused(checkpoint, profile, tmp_path):
    other = RasProfile.from_pretrained(profile)
    other.fingerprint["lm_head"] = "another"
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        LLM(str(checkpoint), **ENGINE, **engine_args(tmp_path))
    options = engine_args(profile)
    del options["logits_processors"]
    with pytest.raises(RuntimeError, match="no RasLogitsProcessor"):
        SafeLLM(LLM(str(checkpoint), **ENGINE, **options))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_drafts_that_fall_at_a_later_step(tiny, checkpoint, profile, tmp_path, step):
    later = turning(tiny, RasProfile.from_pretrained(profile), step)
    later.save_pretrained(tmp_path)
    guard = SafeLLM(LLM(str(checkpoint), **ENGINE, **engine_args(tmp_path, queries=4)))
    assert compare(tiny, guard, later, 10)[step]
