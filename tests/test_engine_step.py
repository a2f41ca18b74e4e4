"""The engine's steps as CUDA graphs would hold them, on the CPU: static buffers, no wait, the same tokens.

The capture itself is tested on a GPU: tests/cuda/test_engine_cuda.py.
"""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tape import Graphs, HostReads
from test_engine import SAMPLING, assert_same, make_profile, make_queries
from test_engine_one_pass import NEW_TOKENS, PROFILES, attached, queries
from tiny_random import random_image, random_words, tiny_llava

import ras_fast
from ras_fast.decoding import Decoding
from ras_fast.engine import SafeGenerator, batch, workspace
from ras_fast.engine.answer import Sequence
from ras_fast.engine.branch import SCRATCH
from ras_fast.engine.graphs import HostRead, UsedStorages
from ras_fast.engine.runner import Runner
from ras_fast.methods import attach
from ras_fast.patching import Patch
from ras_fast.patching.cache_values import keep
from ras_fast.patching.tracking import REGIONS
from ras_fast.profile import RasProfile
from ras_fast.regions import RegionMap
from ras_fast.sequential import SequentialPipeline


@pytest.fixture
def graphs(monkeypatch):
    made = Graphs()
    monkeypatch.setattr(batch, "capture", made)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"})
    monkeypatch.setattr("ras_fast.engine.runner.WIDTH", 8)
    return made


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_in_graphs_give_the_same_tokens(model, processor, graphs, options, fused):
    profile, (prompts, images) = make_profile(model, processor), make_queries(12)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=14, **options)
    with SafeGenerator(model, processor, profile, batch_size=5, fused=fused, sync_every=4) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=14, **options), expected)
    assert graphs.made >= 4
    assert graphs.replays > 3 * graphs.made


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_graphs_are_kept_for_later_queries(model, processor, graphs, monkeypatch, options):
    """Shorter and longer ones, other batch sizes, without images, with two, accepted and refused, in turn."""
    monkeypatch.setattr(workspace, "BUCKET", 256)
    profile = make_profile(model, processor)
    calls = [make_queries(count, seed) for count, seed in ((1, 14), (3, 7), (1, 0), (1, 12), (3, 30), (1, 3), (3, 41))]
    pipeline = SequentialPipeline(model, processor, profile)
    expected = [pipeline.generate(*call, max_new_tokens=9 + 5 * (i % 2), **options) for i, call in enumerate(calls)]
    assert len({output.rejected_at for outputs in expected for output in outputs}) > 1
    made = []
    with SafeGenerator(model, processor, profile, batch_size=3, sync_every=4) as guard:
        for _ in range(2):
            for i, (call, outputs) in enumerate(zip(calls, expected, strict=True)):
                assert_same(guard.generate(*call, max_new_tokens=9 + 5 * (i % 2), **options), outputs)
            made.append(graphs.made)
        assert 0 < len(guard._runner.workspaces) <= workspace.KEPT
    assert len(guard._runner.workspaces) == 0
    assert made[1] == made[0]


def test_the_second_query_captures_nothing(model, processor, graphs, monkeypatch):
    monkeypatch.setattr("ras_fast.engine.runner.WIDTH", 32)
    profile = make_profile(model, processor, gate=0.0)
    with SafeGenerator(model, processor, profile) as guard:
        guard.generate([random_words(1, 3)], [random_image(1)], max_new_tokens=12)
        made = graphs.made
        assert made
        for seed in range(2, 5):
            guard.generate([random_words(seed, seed)], [random_image(seed)], max_new_tokens=10 + seed)
    assert graphs.made == made


@pytest.mark.parametrize("make", PROFILES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_pass_methods_in_graphs(model, processor, graphs, make, batch_size):
    profile, (prompts, images) = make(model, processor), queries()
    expected = [tokens for tokens, _ in attached(model, processor, profile, prompts, images)]
    with SafeGenerator(model, processor, profile, batch_size=batch_size, sync_every=3) as guard:
        for order in ([*range(7)], [4, 3, 1, 0, 6, 2, 5], [*range(7)]):
            before = graphs.made
            outputs = guard.generate([prompts[i] for i in order], [images[i] for i in order], max_new_tokens=NEW_TOKENS)
            assert [output.tokens for output in outputs] == [expected[i] for i in order]
    assert graphs.replays > 2 * graphs.made
    assert graphs.made == before or batch_size > 1  # batches of mixed prompts are cut into many sizes


def test_a_profiles_region_bias_in_graphs(model, processor, graphs):
    profile, (prompts, images) = make_profile(model, processor), make_queries(3)
    profile.tensors["region_bias"] = torch.tensor([[2.0, -1.0, 0.0, 3.0], [0.0, 1.5, 2.0, -2.0]])
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=8)
    with SafeGenerator(model, processor, profile, batch_size=3) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
        made = graphs.made
        assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert graphs.made == made


def test_nothing_of_a_query_stays_behind(model, processor, monkeypatch):
    profile, (prompts, images) = make_profile(model, processor), make_queries(5)
    guard = SafeGenerator(model, processor, profile, batch_size=5, fused=False)
    guard.generate(prompts, images, max_new_tokens=6)
    (space,) = guard._runner.workspaces._kept.values()
    layers = [tensor for layer in space.pool.layers for tensor in (layer.keys, layer.values)]
    feeds = [feed.ids for feed in space._feeds.values()]
    for tensor in (*layers, *feeds, space.shared, space.offset, space.region_ids + 1):
        assert not tensor.any()
    monkeypatch.setattr(guard.plan, "_finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard.generate(prompts, images, max_new_tokens=6)
    assert len(guard._runner.workspaces) == 0


def test_a_call_in_inference_mode_does_not_bind_the_next(model, processor, graphs):
    profile, (prompts, images) = make_profile(model, processor), make_queries(2)
    with SafeGenerator(model, processor, profile) as guard:
        with torch.inference_mode():
            first = guard.generate(prompts, images, max_new_tokens=6)
        assert_same(guard.generate(prompts, images, max_new_tokens=6), first)


@pytest.mark.parametrize("change", ["hook", "steering", "bias", "weights", "patch"])
def test_graphs_end_with_the_model_that_they_are_of(processor, graphs, change):
    model = tiny_llava(processor)
    profile, (prompts, images) = make_profile(model, processor, gate=0.0), make_queries(1)

    def answers(guard):
        return [output.tokens for output in guard.generate(prompts, images, max_new_tokens=8)]

    handle = ras_fast.patch(model)
    guard = SafeGenerator(model, processor, profile)
    before = answers(guard)
    if change == "hook":
        model.model.language_model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    elif change == "steering":
        handle.set_steering(0, 3 * torch.randn(1, 32))
        handle.steering.set_rows(torch.zeros(1, dtype=torch.int32), torch.ones(1))
    elif change == "bias":
        handle.set_region_bias(torch.tensor([5.0, -5.0, 5.0, 0.0]))
    elif change == "weights":
        projection = model.model.language_model.layers[0].mlp.up_proj
        sign = torch.tensor([1.0] + [-1.0] * (len(projection.weight) - 1))  # the first row is part of the fingerprint
        projection.weight = torch.nn.Parameter(projection.weight * sign[:, None])
    elif change == "patch":
        handle.unpatch()
        handle = ras_fast.patch(model, norms=False)
        handle.set_region_bias(torch.tensor([5.0, -5.0, 5.0, 0.0]))
    made = graphs.made
    changed = answers(guard)
    assert graphs.made > made
    assert changed != before
    assert changed == answers(SafeGenerator(model, processor, profile))


def test_steps_that_are_steered_inside_the_model_are_never_captured(model, processor, graphs, monkeypatch):
    """A graph of them would go on to steer, and one of other steps would not."""
    seen, capture = [], batch.capture
    monkeypatch.setattr(batch, "capture", lambda *step: seen.append(Patch.of(model).steers("final")) or capture(*step))
    profile, (prompts, images) = make_profile(model, processor, gate=1.0), make_queries(4)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=8)
    assert 0 in {output.rejected_at for output in expected}
    with SafeGenerator(model, processor, profile, batch_size=2) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert seen
    assert all(seen)


def test_steps_over_several_devices_are_never_captured(processor, monkeypatch):
    """As accelerate places a model, or offloads a part of it."""
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"})
    model = tiny_llava(processor)
    assert Runner(model).captured
    model.model.language_model.layers[-1].to("meta")
    assert not Runner(model).captured


def dynamic_llava(processor, longest):
    """Its rotary frequencies follow the length beyond `longest` positions, as InternVL's."""
    model = tiny_llava(processor)
    text = model.model.language_model
    text.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    text.rotary_emb = type(text.rotary_emb)(text.config).eval()
    text.rotary_emb.original_max_seq_len = text.rotary_emb.max_seq_len_cached = longest
    return model, text.rotary_emb


def test_frequencies_that_follow_the_length_are_not_asked_for_it(processor, graphs):
    model, rotary = dynamic_llava(processor, longest=512)
    profile, (prompts, images) = make_profile(model, processor), make_queries(5)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=8)
    with SafeGenerator(model, processor, profile, batch_size=3) as guard:
        assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
        assert graphs.replays > graphs.made > 0
        rotary(torch.zeros(1), torch.tensor([[600]]))  # somebody's longer prompt changes them
        assert not torch.equal(rotary.inv_freq, rotary.original_inv_freq)
        assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert "forward" not in vars(rotary)


def longrope_llava(processor, longest):
    """Beyond `longest` positions it has other rotary frequencies, as Phi-3 and Phi-4."""
    model = tiny_llava(processor)
    text = model.model.language_model
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 7.0], "factor": 4.0}
    text.config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": longest, **factors,
    }  # fmt: skip
    text.rotary_emb = type(text.rotary_emb)(text.config).eval()
    return model, text.rotary_emb


def note_longest(places, module, args, given):
    places.append(given["position_ids"].max().item())


@pytest.mark.parametrize("make", [dynamic_llava, longrope_llava])
def test_a_length_at_which_frequencies_change_is_refused_and_never_reached_by_what_is_not(processor, make):
    """One row's length would change the others', and a prompt's own those of the prefix that its stages share."""
    model, rotary = make(processor, longest=51)
    # The longest prompt, of 41 tokens, keeps its draft, so that it ends before the others, which begin anew.
    profile, (prompts, images) = make_profile(model, processor, max_context_tokens=1), make_queries(3)
    pipeline, places = SequentialPipeline(model, processor, profile), []
    expected = pipeline.generate(prompts, images, max_new_tokens=10)
    with (
        rotary.register_forward_pre_hook(partial(note_longest, places), with_kwargs=True),
        SafeGenerator(model, processor, profile) as guard,
    ):
        assert_same(guard.generate(prompts, images, max_new_tokens=10), expected)
        with pytest.raises(ValueError, match=r"prompts\[\d\]: a prompt and its answer may take \d+ tokens; beyond 51 the"):
            guard.generate(prompts, images, max_new_tokens=40)
        assert max(places) < 51


@pytest.mark.parametrize("make", [dynamic_llava, longrope_llava])
def test_a_stage_at_whose_length_frequencies_change_fails_closed_for_its_query_alone(processor, make):
    model, _ = make(processor, longest=54)
    profile = make_profile(model, processor, safety_prompt="w4 " * 30)
    with SafeGenerator(model, processor, profile) as guard:
        alone = guard.generate(["w1"], max_new_tokens=4)
        outputs = guard.generate(["w1", "w2"], [None, random_image(0)], max_new_tokens=4)
    assert_same(outputs[:1], alone)
    assert outputs[1].risk == 1
    assert "beyond 54 the rotary frequencies" in outputs[1].failed_closed


def test_steps_that_the_host_takes_part_in_run_without_graphs(processor, monkeypatch):
    model = tiny_llava(processor)
    model.model.language_model.layers[0].register_forward_hook(lambda module, args, output: output if output.sum() else None)
    profile, (prompts, images) = make_profile(model, processor), make_queries(3)
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=8)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"})

    def capture(function, device):
        for inside in (nullcontext(), UsedStorages("cpu")):
            with inside:
                function()

    monkeypatch.setattr(batch, "capture", capture)
    guard = SafeGenerator(model, processor, profile, batch_size=3)
    with pytest.warns(UserWarning, match="without CUDA graphs, as aten.*waits for the device"):
        assert_same(guard.generate(prompts, images, max_new_tokens=8), expected)
    assert not guard._runner.captured


def test_what_a_capture_refuses_is_noticed_before_it_is_run():
    on_device, mask = torch.zeros(3, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    with UsedStorages("meta"):
        assert torch.arange(3)[torch.ones(3, dtype=torch.bool)].tolist() == [0, 1, 2]  # the host's own
        on_device[torch.zeros(2, dtype=torch.long, device="meta")] += on_device.to(torch.float64).sum() * torch.tensor(2.0)
        for read in (
            lambda: on_device[mask], mask.nonzero, on_device[0].item, lambda: bool(mask.all()), on_device.cpu,
            lambda: torch.zeros(3).to("meta"), lambda: on_device.copy_(torch.zeros(3)), lambda: on_device.equal(on_device),
            lambda: on_device.index_select(0, torch.zeros(1, dtype=torch.long)),
        ):  # fmt: skip
            with pytest.raises(HostRead):
                read()


def test_what_a_graph_reads_lives_as_long():
    """Not what is made inside of it, which is the graph's own."""
    given, written = torch.ones(3), torch.zeros(3)
    with UsedStorages("meta") as inputs:
        written.copy_((given + 1) * 2)
    assert inputs.storages.keys() == {tensor.untyped_storage()._cdata for tensor in (given, written)}


def test_a_grown_workspace_holds_the_same():
    space = workspace.Workspace(["full_attention"], 2, 4, 12, torch.device("cpu"), 3)
    for tensor in (space.shared, space.offset, space.sees, space.region_ids):
        tensor.copy_(torch.arange(1, 1 + tensor.numel()).view(tensor.shape))
    grown = space.grown(5)
    assert (grown.origin, grown.capacity) == (9, 17)
    assert all(torch.equal(getattr(grown, name), getattr(space, name)) for name in ("shared", "offset", "sees"))
    assert torch.equal(grown.region_ids[:, 5:], space.region_ids)
    assert (grown.region_ids[:, :5] == -1).all()


def test_the_workspaces_that_were_used_last_are_kept():
    spaces, lent = workspace.Workspaces(SimpleNamespace(device=torch.device("cpu")), ["full_attention"]), []
    for rows in (*range(1, workspace.KEPT + 1), 1, workspace.KEPT + 1, 1):
        with spaces.lend(rows, 1, 1, 0) as space:
            lent.append(space)
    assert len(spaces) == workspace.KEPT
    assert lent[0] is lent[-1]
    with spaces.lend(2, 1, 1, 0) as space:
        assert space is not lent[1]


def to_meta(model):
    """The model on a device that has shapes and no values."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = tensor.detach().to("meta")
                    tensors[name] = torch.nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved


@pytest.mark.parametrize("make", [None, *PROFILES])
@pytest.mark.parametrize("kind", ["plain", "fused", "biased"])
def test_a_step_takes_nothing_from_the_host(processor, monkeypatch, make, kind):
    """No value is read and no tensor copied: steps of the answer alone and of two branches, of single tokens and of prompts."""
    model = tiny_llava(processor)
    profile = make(model, processor) if make else None
    if kind != "plain" or make:
        handle = ras_fast.patch(model)
    if kind == "biased":
        handle.set_region_bias(torch.randn(4))
        handle._state.biases = {layer: bias.to("meta") for layer, bias in handle._state.biases.items()}
    to_meta(model)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"meta"})
    monkeypatch.setattr(RasProfile, "check", lambda *args: None)  # of the LM head's values
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # does not know this device
    runner = Runner(model, sync_every=1000)
    steps = batch.Batch(runner, workspace.Workspace(runner.layers, 2, 48, 192, torch.device("meta")))
    prompts = torch.zeros(2, 9, dtype=torch.long, device="meta")
    regions = RegionMap(torch.zeros(2, 9, dtype=torch.int32, device="meta"), 1, validate=False)
    keep(steps.pool, REGIONS, regions if kind != "plain" or make else None)
    # A mask of padding would be looked at; that is no part of a step.
    places, mask = torch.arange(9, device="meta").expand(2, -1), torch.zeros(2, 1, 9, 9, device="meta")
    runner.prefill = lambda pool, ids, **extras: (runner(pool, ids, places, mask), 0)
    sequences = [Sequence([7] * 9, Decoding(40), i, [3], processor.tokenizer, "meta") for i in range(2)]
    with torch.no_grad(), attach(handle, profile) if make else nullcontext():
        for place in handle._fused.places if make else ():  # what is on the device of real weights
            if place.site is not None:
                place.site.vectors = place.site.vectors.to("meta")
            if getattr(place, "probe", None) is not None:
                place.probe.directions = place.probe.directions.to("meta")
        answer = steps.prompts(sequences, {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)})
        for _ in range(4):  # those of a method that are not alike come first
            steps.step([answer], captured=False)
        steps.prefixes, steps._after_prefix = [5, 5], {0: [], 1: []}
        steps.clear_scratch(12, [True, True])
        other = steps.branch(SCRATCH, sequences, [[1, 2, 3], [4, 5]], [5, 5])
        for branches in ([other, answer], [other, answer], [answer]):
            with HostReads() as reads:
                steps._compute(branches, 192, 192, masked=True)
                for branch in branches:
                    branch.advance(steps.space)
            assert reads.found == []


def test_a_tensor_of_the_host_is_noticed():
    on_device, on_host = torch.zeros(3, device="meta"), torch.tensor(2.0)
    with HostReads() as reads:
        on_device * 2.0
        assert reads.found == []
        on_device * on_host
    assert len(reads.found) == 1


@pytest.mark.parametrize("every", [1, 3, 8])
def test_the_host_looks_every_k_steps(model, processor, monkeypatch, every):
    looks, steps = [], []
    sync, step = batch.Branch.sync, batch.Batch.step
    monkeypatch.setattr(batch.Branch, "sync", lambda self: looks.append(len(self._recent)) or sync(self))
    monkeypatch.setattr(batch.Batch, "step", lambda self, *args, **kwargs: steps.append(1) or step(self, *args, **kwargs))
    profile = make_profile(model, processor, gate=0.0)
    guard = SafeGenerator(model, processor, profile, fused=False, sync_every=every)
    (output,) = guard.generate(["w1 w2"], [random_image(1)], max_new_tokens=40)
    assert len(output.tokens) == 40
    assert max(looks) == every
    assert sum(map(bool, looks)) <= 2 * (len(steps) // every) + 6
    with pytest.raises(ValueError, match="sync_every is 0"):
        SafeGenerator(model, processor, profile, sync_every=0)


@pytest.mark.parametrize("every", [2, 5])
def test_what_comes_after_an_end_is_dropped(model, processor, monkeypatch, every):
    profile, (prompts, images) = make_profile(model, processor), make_queries(9)
    plain = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [plain[0].tokens[4], plain[1].tokens[2], 5])
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=12)
    assert len({len(output.tokens) for output in expected}) > 2
    guard = SafeGenerator(model, processor, profile, batch_size=4, fused=False, sync_every=every)
    assert_same(guard.generate(prompts, images, max_new_tokens=12), expected)
