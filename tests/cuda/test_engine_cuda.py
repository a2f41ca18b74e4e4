"""The engine on a GPU: decode steps in CUDA graphs, the reference's tokens."""

import pytest
import torch
from test_engine import SAMPLING, assert_same, make_profile, make_queries
from test_engine_families import hybrid, summary
from tiny_random import tiny_llava

import ras_fast
from ras_fast.engine import SafeGenerator, batch
from ras_fast.patching import Patch
from ras_fast.sequential import SequentialPipeline

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_captured_steps_give_the_reference_tokens(processor, monkeypatch, options, fused, batch_size):
    captured, capture = [], batch.capture
    monkeypatch.setattr(batch, "capture", lambda *step: captured.append(1) or capture(*step))
    model = tiny_llava(processor).to("cuda")
    profile, (prompts, images) = make_profile(model, processor), make_queries(12)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=24, **options)
    with SafeGenerator(model, processor, profile, batch_size=batch_size, fused=fused) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=24, **options), expected)
    assert captured


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_captured_steps_on_another_gpu_than_the_current_one(processor):
    model = tiny_llava(processor).to("cuda:1")
    profile, (prompts, images) = make_profile(model, processor), make_queries(3)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=24)
    with SafeGenerator(model, processor, profile) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=24), expected)
    assert torch.cuda.current_device() == 0


def test_a_decode_step_waits_for_nothing(processor):
    model = tiny_llava(processor).to("cuda")
    profile, (prompts, images) = make_profile(model, processor, gate=0.0), make_queries(1)
    with SafeGenerator(model, processor, profile) as guard:
        (expected,) = guard.generate(prompts, images, max_new_tokens=24)
        decode = guard.plan.decode

        def strict(batch, answer, streamer, shown):
            step = batch.step

            def without_waiting(branches, **options):
                for branch in branches:  # the looks every few steps are the only waits: put them off
                    branch.sync()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    step(branches, **options)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            batch.step = without_waiting
            decode(batch, answer, streamer, shown)

        guard.plan.decode = strict
        (output,) = guard.generate(prompts, images, max_new_tokens=24)
    assert output.tokens == expected.tokens


@pytest.mark.parametrize(("name", "seed"), [("qwen3_5", 47), ("lfm2_vl", 55)])
def test_states_in_captured_steps(name, seed):
    model, processor, profile, queries = hybrid(name, seed)
    model.to("cuda")
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=24))
    for batch_size in (1, 3):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            assert summary(guard.generate(*queries, max_new_tokens=24)) == expected


@pytest.mark.parametrize("batch_size", [1, 5])
def test_captured_steps_in_half_precision_are_the_uncaptured_ones(processor, monkeypatch, batch_size):
    """Where the linear layers' kernel runs, too: the same kernels over the same pool, so the same bits."""
    checked, capture = [], batch.capture

    def beside(function, device):
        replay = capture(function, device)
        first = replay().clone()  # a step more of it: both write what is there already
        checked.append(torch.equal(first, function()))
        return replay

    monkeypatch.setattr(batch, "capture", beside)
    model = tiny_llava(processor).to("cuda", torch.bfloat16)
    with SafeGenerator(model, processor, make_profile(model, processor), batch_size=batch_size) as guard:
        guard.generate(*make_queries(6), max_new_tokens=16)
        assert Patch.of(model).report().linears > 0
    assert len(checked) > 2
    assert all(checked)
