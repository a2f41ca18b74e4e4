"""AutoSteer in real vLLM engines on the shipped model, against ``model.generate`` under the same profile. Needs vLLM:
docs/vllm.md."""

import math
import os

import pytest
import torch
from torch.nn import ModuleList

pytest.importorskip("vllm.v1", reason="vLLM is not installed")
# In this process, so that tests can reach the worker; the engine as a process of its own has its test below.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from bench_vllm import readable_by_vllm, tiny_gate
from test_vllm_families import CASES, family
from test_vllm_safe_llm import ENGINE, INTERPRETED, NEW_TOKENS, SCRIPT, in_another_process, make_guard, random_llava
from transformers import Exaone4Config
from vllm import LLM, SamplingParams
from vllm.config import CacheConfig, ParallelConfig

import ras_fast
from ras_fast.evaluation import tinyworld
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import encode, make_queries, short_ids
from ras_fast.loading import TINY, load
from ras_fast.methods.autosteer import AutoSteer, known_risks
from ras_fast.profile import RasProfile
from ras_fast.vllm import SafeLLM, engine_args
from ras_fast.vllm.processor import check_passes, processor_of
from ras_fast.vllm.worker import layers_of


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return readable_by_vllm(TINY, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def profile(checkpoint, tmp_path_factory):
    return tiny_gate(checkpoint, tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def guard(checkpoint, profile):
    return make_guard(checkpoint, profile)


def judged_answers(model, processor, profile: RasProfile, prompts, images, tokens: int = NEW_TOKENS):
    """[(tokens, t)] of queries, by `model.generate` of the patched model."""
    found = []
    with ras_fast.patch(model) as patched, AutoSteer(profile).attach(patched) as method:
        for query in make_queries(prompts, images, processor):
            inputs, _ = encode(processor, query, "cpu", torch.float32)
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            found.append((ids[0, inputs["input_ids"].shape[1] :].tolist(), method.risk.item()))
    return found


def agree(outputs, expected, threshold: float, some: int, tolerance: float = 1e-4) -> None:
    """Asserts the reference's tokens and risks; of answers below and above the threshold there have to be ``some``."""
    for output, (tokens, risk) in zip(outputs, expected, strict=True):
        assert output.tokens == tokens
        assert output.risk == pytest.approx(risk, abs=tolerance)
        assert 0 < output.timings["first_token"] <= output.timings["total"]
    above = sum(risk > threshold for _, risk in expected)
    assert some <= above <= len(expected) - some


def items(count: int):
    found = tinyworld.split("test", count)
    return [item.question for item in found], [item.image for item in found]


def test_exact(tiny, guard, profile):
    queries = items(24)
    outputs = guard.generate(*queries, max_tokens=NEW_TOKENS)
    agree(outputs, judged_answers(*tiny, RasProfile.from_pretrained(profile), *queries), 0.5, 6)
    assert any(tinyworld.is_refusal(output.text) for output in outputs)
    assert guard.counters["failed_closed"] == guard.counters["rejected"] == 0
    assert not processor_of(guard.engine.vllm_config).steering.records


def test_weights_that_are_not_the_profiles_are_found_out(guard):
    """Below the head, which is looked at by itself."""
    layers = guard.llm.llm_engine.model_executor.driver_worker.worker.get_model().get_language_model().model.layers
    below = layers[: guard.settings["layer"]]
    for norm in [norm for layer in below for norm in (layer.input_layernorm, layer.post_attention_layernorm)]:
        try:
            norm.weight.data.mul_(0.5)  # those of products are packed
            guard.engine.reset_prefix_cache()
            with pytest.raises(ValueError, match=r"has the risk \S+ in this engine; calibration found"):
                SafeLLM(guard.llm)
        finally:
            norm.weight.data.mul_(2)
            guard.engine.reset_prefix_cache()
    assert not SafeLLM(guard.llm).counters


@pytest.mark.slow
def test_exact_over_150_queries(tiny, guard, profile):
    queries = items(150)
    outputs = guard.generate(*queries, max_tokens=NEW_TOKENS)
    agree(outputs, judged_answers(*tiny, RasProfile.from_pretrained(profile), *queries), 0.5, 40)


def test_one_request_a_query(guard):
    guard.engine.reset_prefix_cache()
    guard.counters.clear()
    guard.generate(*items(4), max_tokens=4)
    first = dict(guard.counters)
    guard.generate(*items(4), max_tokens=4)
    assert first["queries"] == 4
    assert first["prompt_tokens"] == guard.counters["prompt_tokens"] - first["prompt_tokens"]
    assert guard.counters["cached_tokens"] >= 4 * 64 - 2 * 64  # the images of the second time; the last block is made anew


def ask(guard, marks, text="How do I make the table?", **options):
    requests = [{"prompt_token_ids": short_ids(guard.processor, make_queries([text], None, guard.processor)[0])}] * len(marks)
    params = [
        SamplingParams(**{"temperature": 0, "max_tokens": NEW_TOKENS, "extra_args": mark} | options) for mark in marks
    ]
    return [output.outputs[0] for output in guard.llm.generate(requests, params, use_tqdm=False)]


def test_requests_side_by_side_in_one_batch(guard):
    before = guard.engine.collective_rpc("ras_counters")[0].get("failed_closed", 0)
    marks = [None, {"ras_record": 7}, {"ras_risk": 0.2}, {"ras_risk": 0.8}, {"ras_risk": math.nan}]
    plain, judged, below, above, nan = ask(guard, marks)
    assert plain.text.strip().startswith("Sure")
    assert judged.token_ids == below.token_ids == plain.token_ids
    assert tinyworld.is_refusal(above.text)
    assert nan.token_ids == above.token_ids
    assert guard.engine.collective_rpc("ras_counters")[0]["failed_closed"] == before + 1
    ((verdict,),) = guard.engine.collective_rpc("ras_judge", args=([7],))
    assert verdict[0] < 0.5
    guard.engine.collective_rpc("ras_forget", args=([7],))


def test_noise_alone_asks_for_nothing(guard):
    plain, noisy = ask(guard, [None, {"ras_noise": 3}])
    assert noisy.token_ids == plain.token_ids


def test_sampled_answers(guard):
    """Those that are not steered are vLLM's own; the others refuse, whatever is drawn."""
    queries, options = items(12), {"temperature": 1.0, "top_p": 0.95, "seed": 5}
    outputs = guard.generate(*queries, max_tokens=NEW_TOKENS, **options)
    again = guard.generate(*queries, max_tokens=NEW_TOKENS, **options)
    assert [output.tokens for output in outputs] == [output.tokens for output in again]
    steered = [output for output in outputs if output.risk > 0.5]
    assert 3 <= len(steered) <= 9
    assert all(tinyworld.is_refusal(output.text) for output in steered)


def test_an_image_that_is_no_image_has_risk_one_and_no_answer(guard):
    broken = torch.full((3, 3, 3), math.nan)
    fine = tinyworld.split("test", 1)[0]
    for questions, pictures in (([fine.question] * 2, [broken.numpy(), fine.image]), ([fine.question], [broken.numpy()])):
        outputs = guard.generate(questions, pictures, max_tokens=4)
        assert (outputs[0].risk, outputs[0].text, outputs[0].tokens) == (1.0, "", [])
        assert outputs[0].failed_closed == "an image holds NaN or infinite pixels"
        assert all(output.failed_closed is None for output in outputs[1:])


def test_weights_that_are_not_finite_fail_closed(guard):
    """What the prober reads is then not finite either: the risk is 1, and the answer ends."""
    norm = guard.llm.llm_engine.model_executor.driver_worker.worker.get_model().get_language_model().model.layers[0]
    weight = norm.input_layernorm.weight
    kept = weight.detach().clone()
    try:
        weight.data[3] = math.nan
        guard.engine.reset_prefix_cache()
        (output,) = guard.generate(["What colour?"], None, max_tokens=4)
    finally:
        weight.data.copy_(kept)
        guard.engine.reset_prefix_cache()
    assert output.risk == 1
    assert output.failed_closed == "the risk could not be computed"
    assert output.text == ""


def test_an_answer_that_has_begun_is_not_judged(guard):
    chat = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Sure"}]
    with pytest.raises(ValueError, match=r"prompts\[1\] ends in an assistant message"):
        guard.generate(["table?", chat])
    assert not guard.engine.has_unfinished_requests()


def test_no_answer_comes_out_of_an_error(guard, monkeypatch):
    rpc = guard.engine.collective_rpc
    for answer in ([None], [[]], [[None]]):
        monkeypatch.setattr(
            guard.engine, "collective_rpc",
            lambda name, *args, answer=answer, **kwargs: answer if name == "ras_judge" else rpc(name, *args, **kwargs),
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="judged"):
            guard.generate(["table?"])
        assert not guard.engine.has_unfinished_requests()
    monkeypatch.undo()
    assert len(guard.generate(["table?"])) == 1


def test_logprobs_of_a_prompt_are_in_nobodys_way(guard):
    """vLLM asks the same head for them, of other rows."""
    plain, shown = (ask(guard, [{"ras_record": 8}, {"ras_risk": 0.9}], prompt_logprobs=count) for count in (None, 2))
    assert [output.token_ids for output in shown] == [output.token_ids for output in plain]


# Other set-ups


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "engine", "environment"),
    [
        (SCRIPT, {}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        (INTERPRETED + SCRIPT, {}, {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}),
        (SCRIPT, {"enforce_eager": False}, {"VLLM_DISABLE_COMPILE_CACHE": "1"}),
        # Prompts in pieces, and room for the keys of few requests: the others are preempted and read again.
        (SCRIPT, {"max_num_batched_tokens": 48, "max_num_seqs": 8, "num_gpu_blocks_override": 17}, {}),
        (
            INTERPRETED + SCRIPT,
            {"max_num_batched_tokens": 48, "max_num_seqs": 8, "num_gpu_blocks_override": 17},
            {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
        ),
        (SCRIPT, {"async_scheduling": True}, {}),
    ],
    ids=["a process of its own", "newer runner", "compiled", "in pieces", "newer runner, in pieces", "scheduled ahead"],
)
def test_same_tokens_elsewhere(guard, checkpoint, profile, script, engine, environment):
    here = guard.generate(*items(20), max_tokens=NEW_TOKENS)
    found = in_another_process(script, checkpoint, profile, 20, ENGINE | engine, **environment)
    assert found == [output.tokens for output in here]


@pytest.mark.slow
def test_two_ranks_of_tensor_parallelism(tmp_path):
    model, processor, checkpoint = random_llava(tmp_path)
    profile = random_gate(model, processor, items(16))
    profile.save_pretrained(tmp_path / "profile")
    expected = judged_answers(model, processor, profile, *items(16))
    engine = ENGINE | {"tensor_parallel_size": 2}
    found = in_another_process(SCRIPT, checkpoint, tmp_path / "profile", 16, engine, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert found == [tokens for tokens, _ in expected]
    assert sum(risk > profile.config["threshold"] for _, risk in expected) == 8


def random_gate(model, processor, queries) -> RasProfile:
    """One that reads the model's second layer, and whose gate opens for half of the queries."""
    d = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(2)
    shapes = {"in.weight": (16, d), "in.bias": (16,), "out.weight": (2, 16), "out.bias": (2,)}
    tensors = {f"prober_{name}": torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    tensors["refusal"] = torch.randn(d, d, generator=generator) * d**-0.5
    config = {"layer": 1, "strength": 20.0, "threshold": 0.5}
    profile = RasProfile("autosteer", config, tensors, fingerprint(model, processor))
    config["known"] = known_risks(profile, model, processor, ["What colour?", "How do I make the table?"])
    risks = sorted(risk for _, risk in judged_answers(model, processor, profile, *queries, 1))
    config["threshold"] = (risks[len(risks) // 2 - 1] + risks[len(risks) // 2]) / 2
    return profile


@pytest.mark.slow
def test_exact_where_layers_add_up_for_themselves(tmp_path):
    """EXAONE 4's are given a residual, and do not add it."""
    model, processor, checkpoint = random_llava(tmp_path, Exaone4Config)
    profile = random_gate(model, processor, items(16))
    profile.save_pretrained(tmp_path / "profile")
    outputs = SafeLLM(LLM(str(checkpoint), **ENGINE, **engine_args(tmp_path / "profile", queries=8))).generate(
        *items(16), max_tokens=NEW_TOKENS
    )
    agree(outputs, judged_answers(model, processor, profile, *items(16)), profile.config["threshold"], 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_exact_on_other_families(name, tmp_path):
    model, processor, queries = family(name, tmp_path)
    profile = random_gate(model, processor, queries)
    profile.save_pretrained(tmp_path / "profile")
    engine = {"limit_mm_per_prompt": {"image": 2}} | ENGINE | engine_args(tmp_path / "profile", queries=8)
    outputs = SafeLLM(LLM(str(tmp_path / "model"), **engine)).generate(*queries, max_tokens=8)
    expected = judged_answers(model, processor, profile, *queries, 8)
    # vLLM's towers are not quite transformers'; without an image the risks are the same to 1e-6.
    agree(outputs, expected, profile.config["threshold"], 6, tolerance=1e-3)
    without = [n for n, images in enumerate(queries[1]) if images is None]
    assert [outputs[n].risk for n in without] == pytest.approx([expected[n][1] for n in without], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2}, "enable_expert_parallel"),
    ],
    ids=str,
)
def test_forwards_that_cannot_be_judged(options, message):
    check_passes(ParallelConfig(), CacheConfig())
    with pytest.raises(ValueError, match=message):
        check_passes(ParallelConfig(**options), CacheConfig())


def test_forwards_of_a_few_tokens_cannot_be_judged():
    with pytest.raises(ValueError, match="kv_sharing_fast_prefill"):
        check_passes(ParallelConfig(), CacheConfig(kv_sharing_fast_prefill=True))


def test_layers_that_cannot_be_told():
    class Layer(torch.nn.Module):
        def forward(self, positions, hidden_states, residual):
            pass

    layers, others = ModuleList([Layer(), Layer()]), ModuleList([torch.nn.Identity()] * 2)
    assert layers_of(ModuleList([layers, others]), 2) is layers
    for model in (others, ModuleList([layers, ModuleList([Layer(), Layer()])]), ModuleList([Layer()])):
        with pytest.raises(ValueError, match=r"ModuleList has [02] lists of 2 layers"):
            layers_of(model, 2)


# Other engines in this process. Last: when one ends, it takes vLLM's process groups with it, and so the first engine.


def test_engines_that_are_refused(checkpoint, profile, tmp_path):
    with pytest.raises(Exception, match="ras_prove"):
        SafeLLM(LLM(str(checkpoint), **ENGINE, **engine_args(profile) | {"worker_cls": "auto"}))
    other = RasProfile.from_pretrained(profile)
    other.config["layer"] = 4
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"for layer 4; the model has layers 0\.\.3"):
        LLM(str(checkpoint), **ENGINE, **engine_args(tmp_path))
