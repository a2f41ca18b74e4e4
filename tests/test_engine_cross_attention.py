"""The engine on Mllama, whose images are the keys of cross-attention layers: tiles, several pictures, and none."""

import pytest
import torch
from processors import with_processor
from tape import Graphs
from test_engine_families import PICTURES, SAMPLED, TURNS, asked, autosteer, conditional, summary, with_profile
from test_engine_families import attention as attention_risk
from test_engine_one_pass import NEW_TOKENS, attached
from tiny_random import random_words

import ras_fast
from ras_fast.batching import SIGHT, batches, fit, left_padded
from ras_fast.engine import SafeGenerator, batch, workspace
from ras_fast.engine.kv_cache import KVPool
from ras_fast.engine.workspace import Workspace
from ras_fast.inputs import encode, make_queries
from ras_fast.sequential import SequentialPipeline

# One picture of one tile or two, none, two beside each other or with words between, and conversations.
QUERIES = (
    ["w20 w21", "w22", "w23 w24", "w25", [*TURNS, asked("w44")], [*TURNS, asked("w45 w46", 1)]],
    [PICTURES[0], PICTURES[1], None, PICTURES[2:], PICTURES[3], PICTURES[1:3]],
)


def opened(seed=2):
    """A model that looks at its images well, and a profile that steers some answers from their first token on, some from a
    later one, and some not."""
    model, processor = with_processor("mllama")
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
    model, processor, profile = with_profile(model, processor)
    torch.manual_seed(seed)
    tokens = torch.randint(3, 60, (3,))
    profile.tensors["prototypes"] = model.get_output_embeddings().weight[tokens].detach().float() / 4
    profile.config["k"] = 3.0
    return model, processor, profile


def same(outputs, expected):
    assert summary(outputs) == summary(expected)
    for field in ("risk", "similarity"):
        wanted = [getattr(output, field) for output in expected]
        assert [getattr(output, field) for output in outputs] == pytest.approx(wanted, abs=1e-5, nan_ok=True)
    assert [output.failed_closed for output in outputs] == [output.failed_closed for output in expected]


@pytest.mark.parametrize("decoding", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("captured", [False, True])
def test_exact(captured, decoding, monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(batch, "capture", graphs)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"} if captured else set())
    model, processor, profile = opened()
    expected = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=8, **decoding)
    if not decoding:
        assert {output.rejected_at for output in expected} == {None, 0, 1, 2}
    for batch_size, every in ((1, 1), (3, 2), (6, 8)):
        options = {"batch_size": batch_size, "sync_every": every, "fused": batch_size > 1, "cache_bytes": 10**6}
        with SafeGenerator(model, processor, profile, **options) as guard:
            for _ in range(2):  # in pools that hold others' keys
                same(guard.generate(*QUERIES, max_new_tokens=8, **decoding), expected)
            assert guard.counters["cache_hits"] == 5
            assert guard.counters["shared"] > guard.counters["not_shared"] > 0
    assert graphs.replays > graphs.made > 0 or not captured


def test_what_is_in_a_picture_decides():
    """Else the other tests would show nothing."""
    model, processor, profile = opened()
    texts, pictures = ["w20 w21"] * 5, [*PICTURES, None]
    with SafeGenerator(model, processor, profile, batch_size=5) as guard:
        outputs = guard.generate(texts, pictures, max_new_tokens=8)
    assert len({output.similarity for output in outputs}) == 5
    assert len({tuple(output.tokens) for output in outputs}) >= 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_picture_seen_again_is_found_in_a_pool_of_another_size(fused):
    """Alone, then beside more pictures, twice; and one of two pictures beside one of one."""
    model, processor, profile = opened()
    pipeline = SequentialPipeline(model, processor, profile)
    calls = [
        (["w20"], [PICTURES[1]]),
        (["w21 w22", "w23", "w24", "w26"], [PICTURES[1], PICTURES[2:], None, PICTURES[1]]),
        (["w27", "w28 w29"], [PICTURES[2:], PICTURES[0]]),
    ]
    with SafeGenerator(model, processor, profile, fused=fused, cache_bytes=10**6) as guard:
        for queries, hits in zip(calls, (0, 2, 3), strict=True):
            same(guard.generate(*queries, max_new_tokens=6), pipeline.generate(*queries, max_new_tokens=6))
            assert guard.counters["cache_hits"] == hits


def test_a_picture_twice_in_a_batch_is_encoded_once():
    model, processor, profile = opened()
    queries = ["w20", "w21 w22"], [PICTURES[1]] * 2
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6)
    with SafeGenerator(model, processor, profile) as guard:
        same(guard.generate(*queries, max_new_tokens=6), expected)
        assert guard.counters["cache_hits"] == 1


def test_a_pool_that_has_to_grow(monkeypatch):
    model, processor, profile = opened()
    expected = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=8)
    monkeypatch.setattr(workspace, "_bucket", lambda slots: slots)
    grown, own = [], Workspace.grown
    monkeypatch.setattr(Workspace, "grown", lambda self, slots: grown.append(slots) or own(self, slots))
    with SafeGenerator(model, processor, profile, region_mass=True) as guard:
        slots = guard.plan._slots
        plain = guard.generate(*QUERIES, max_new_tokens=8)
        assert not grown
        monkeypatch.setattr(guard.plan, "_slots", lambda *args: (1, *slots(*args)[1:]))
        outputs = guard.generate(*QUERIES, max_new_tokens=8)
        assert grown
    same(outputs, expected)
    assert all(torch.equal(a.region_mass, b.region_mass) for a, b in zip(outputs, plain, strict=True))


def test_prompts_in_one_piece():
    model, processor, profile = opened()
    expected = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=8)
    for batch_size in (1, 6):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            guard.plan._cuts = False
            same(guard.generate(*QUERIES, max_new_tokens=8), expected)


def test_a_prompt_is_not_cut_before_its_tokens_see_what_the_last_one_sees(monkeypatch):
    """Where the processor says that the first words after a picture see less of it."""
    model, processor, profile = opened()
    made = type(processor).__call__

    def later(self, *args, **kwargs):
        inputs = made(self, *args, **kwargs)
        if SIGHT in inputs:
            (last,) = (inputs["input_ids"][0] == self.image_token_id).nonzero()[-1]
            inputs[SIGHT][:, last + 1 : last + 3, :, 0] = 0
        return inputs

    monkeypatch.setattr(type(processor), "__call__", later)
    expected = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=8)
    with SafeGenerator(model, processor, profile) as guard:
        same(guard.generate(*QUERIES, max_new_tokens=8), expected)
        assert guard.plan._cuts


@pytest.mark.parametrize("broken", [lambda inputs: inputs.pop(SIGHT), lambda inputs: inputs[SIGHT][:, -1].zero_()])
def test_a_prompt_whose_last_token_sees_no_picture_is_refused(broken, monkeypatch):
    model, processor, profile = opened()
    made = type(processor).__call__

    def blind(self, *args, **kwargs):
        inputs = made(self, *args, **kwargs)
        broken(inputs)
        return inputs

    monkeypatch.setattr(type(processor), "__call__", blind)
    message = r"prompts\[0\]: the processor's cross_attention_mask lets the last token see no image"
    with SafeGenerator(model, processor, profile) as guard, pytest.raises(ValueError, match=message):
        guard.generate(["w20"], [PICTURES[0]])


def test_pixels_that_are_not_finite_fail_closed_for_their_query_alone():
    model, processor, profile = opened()
    images = [*QUERIES[1]]
    images[1] = torch.full((16, 16, 3), torch.nan)
    expected = SequentialPipeline(model, processor, profile).generate(QUERIES[0], images, max_new_tokens=8)
    for batch_size in (1, 6):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            outputs = guard.generate(QUERIES[0], images, max_new_tokens=8)
        same(outputs, expected)
        assert [output.failed_closed is not None for output in outputs] == [False, True, *[False] * 4]


def test_keys_that_are_not_finite_fail_closed_for_their_query_alone(monkeypatch):
    """A tower that overflows on one picture: beside it, also without a picture, others answer as ever."""
    model, processor, profile = opened()
    tower = model.model.vision_model
    own = type(tower).forward
    (bad,) = make_queries(["w20"], [PICTURES[1]], processor)
    pixels = encode(processor, bad, "cpu", torch.float32)[0]["pixel_values"]

    def overflowing(self, pixel_values, **kwargs):
        output = own(self, pixel_values, **kwargs)
        for row, given in enumerate(pixel_values):
            if torch.equal(given, pixels[0]):
                output.last_hidden_state[row] = torch.inf
        return output

    monkeypatch.setattr(type(tower), "forward", overflowing)
    expected = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=8)
    with SafeGenerator(model, processor, profile) as guard:
        outputs = guard.generate(*QUERIES, max_new_tokens=8)
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-5)
    assert [output.failed_closed is not None for output in outputs] == [False, True, *[False] * 4]
    assert summary(outputs[:1] + outputs[2:]) == summary(expected[:1] + expected[2:])


@pytest.mark.parametrize("cut", [pytest.param(False, marks=pytest.mark.slow), True])
def test_region_mass_is_that_of_the_prompt_in_one_forward(cut):
    model, processor, profile = opened()
    found = []
    with ras_fast.patch(model) as patch:
        for query in make_queries(*QUERIES, processor):
            inputs, _ = encode(processor, query, "cpu", torch.float32)
            with torch.no_grad(), patch.collect(rows=1) as statistics:
                model(**inputs, use_cache=False)
            count = len(query.images)
            found.append(torch.stack([own[0, :, -1, :count] for _, own in sorted(statistics.mass.items())]))
    for batch_size in (1, 6):
        with SafeGenerator(model, processor, profile, batch_size=batch_size, region_mass=True) as guard:
            guard.plan._cuts = cut
            outputs = guard.generate(*QUERIES, max_new_tokens=2)
        for output, mass in zip(outputs, found, strict=True):
            if mass.shape[-1]:  # else layers may have been skipped
                torch.testing.assert_close(output.region_mass, mass, atol=1e-5, rtol=1e-4)
            assert output.region_mass.shape[1:] == mass.shape[1:]
    assert found[3][1, :, 0].min() > 0 < found[3][1, :, 1].min()  # two pictures beside each other are seen together
    assert found[5][1, :, 0].max() == 0 < found[5][1, :, 1].min()  # the last of two


@pytest.mark.parametrize("captured", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_region_bias_holds_in_every_stage(captured, monkeypatch):
    monkeypatch.setattr(batch, "capture", Graphs())
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"} if captured else set())
    model, processor, profile = opened()
    plain = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=6)
    profile.tensors["region_bias"] = torch.tensor([[1.0, -2.0, 3.0, 0.5]] * 4)
    expected = SequentialPipeline(model, processor, profile).generate(*QUERIES, max_new_tokens=6)
    for batch_size in (1, 4):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            for _ in range(2):
                same(guard.generate(*QUERIES, max_new_tokens=6), expected)
    assert [output.similarity for output in plain] != [output.similarity for output in expected]


@pytest.mark.parametrize(
    ("make", "captured"),
    [
        (conditional, True),
        (autosteer, False),
        pytest.param(conditional, False, marks=pytest.mark.slow),
        pytest.param(autosteer, True, marks=pytest.mark.slow),
    ],
)
def test_one_pass(make, captured, monkeypatch):
    monkeypatch.setattr(batch, "capture", Graphs())
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"} if captured else set())
    model, processor, _ = opened()
    torch.manual_seed(3)
    profile = make(model, processor)
    if make is autosteer:
        profile.config["layer"] = 2  # the one before is skipped where there is no picture
    prompts = [*QUERIES[0], *(random_words(60 + i, 3) for i in range(4))]
    images = [*QUERIES[1], *PICTURES[:3], None]
    expected = attached(model, processor, profile, prompts, images)
    assert len({round(risk, 3) for _, risk in expected}) > 1
    for batch_size in (1, 10):
        with SafeGenerator(model, processor, profile, batch_size=batch_size, region_mass=True) as guard:
            for _ in range(2):
                outputs = guard.generate(prompts, images, max_new_tokens=NEW_TOKENS)
                assert [output.tokens for output in outputs] == [tokens for tokens, _ in expected]
                assert [output.risk for output in outputs] == pytest.approx([risk for _, risk in expected], abs=1e-4)
        assert [output.region_mass.shape[-1] for output in outputs] == [1, 1, 0, 2, 1, 2, 1, 1, 1, 0]


def test_gates_that_read_attention_in_the_prompt_are_refused():
    model, processor, profile = opened()
    with pytest.raises(ValueError, match="this model has its images in cross-attention"):
        SafeGenerator(model, processor, attention_risk(model, processor))
    profile.config |= {"risk": "moras+attention", "heads": [[1, 1], [3, 0]]}
    profile.tensors |= {
        "attention_weights": torch.ones(6), "attention_bias": torch.zeros(1), "similarity_weight": torch.ones(1),
        "similarity_bias": torch.zeros(1),
    }  # fmt: skip
    with pytest.raises(ValueError, match="this model has them in cross-attention"):
        SafeGenerator(model, processor, profile)
    with pytest.raises(ValueError, match="this model has its images in cross-attention"):
        SequentialPipeline(model, processor, profile).generate(["w20"], [PICTURES[0]])


def test_keys_of_pictures_move_with_their_rows():
    pool = KVPool(["full_attention", "cross_attention"], 3, 6, image_keys=5)
    layer, given = pool.layers[1], torch.randn(2, 2, 4, 3, 8)  # keys and values of two rows, four keys each
    pool.aim(torch.zeros(2, 1, dtype=torch.long), rows=slice(1, 3))
    assert all(torch.equal(*pair) for pair in zip(layer.update(*given), given, strict=True))
    pool.aim(torch.zeros(1, 1, dtype=torch.long), rows=slice(0, 1))
    assert (layer.is_initialized, layer.get_seq_length()) == (False, 0)  # nothing for another prompt to attend to
    pool.aim(torch.zeros(3, 1, dtype=torch.long), (0, 6))
    assert (layer.is_initialized, layer.get_seq_length(), layer.keys.shape) == (True, 5, (3, 4, 5, 8))
    assert torch.equal(layer.values[1:, :, :3], given[1])
    assert not layer.keys[0].any()
    assert not layer.keys[:, :, 3:].any()
    assert pool.read(0, 0, 0)[1] is None
    entry = [None, pool.read(2, 0, 4)[1]]
    assert torch.equal(torch.stack(entry[1]), given[:, 1])
    other = KVPool(pool.kinds, 1, 9, image_keys=3)
    other.write(0, 5, entry)
    assert torch.equal(torch.stack(other.read(0, 1, 2)[1]), given[:, 1])
    pool.keep_rows([0, 2])
    new = pool.grown(4)
    new.aim(torch.zeros(2, 1, dtype=torch.long), (0, 10), slice(0, 2))
    assert torch.equal(new.layers[1].keys[1, :, :3], given[0, 1])
    assert new.read(0, 0, 0)[1] is None
    new.reset()
    new.aim(torch.zeros(2, 1, dtype=torch.long), (0, 10), slice(0, 2))
    assert not new.layers[1].keys.any()
    assert new.read(1, 0, 0)[1] is None


def test_masks_of_pictures_are_padded_as_the_tokens_are():
    _, processor = with_processor("mllama")
    queries = make_queries(["w20 w21 w22", "w23", "w24", "w25"], [PICTURES[0], PICTURES[1], PICTURES[2:], None], processor)
    inputs = [encode(processor, query, "cpu", torch.float32)[0] for query in queries]
    assert [numbers for numbers, _ in batches(inputs, 4)] == [[0, 1], [2], [3]]
    assert fit(inputs[0]) == fit(inputs[1])
    joined = left_padded(inputs[:2], 0, answer=[7, 8])
    sight, lengths = joined[SIGHT], [one["input_ids"].shape[1] for one in inputs[:2]]
    assert sight.shape == (2, max(lengths) + 2, 1, 2)
    for row, length in enumerate(lengths):
        assert not sight[row, : max(lengths) - length].any()
        assert torch.equal(sight[row, -length - 2 : -2], inputs[row][SIGHT][0])
        assert torch.equal(sight[row, -2:], sight[row, -3].expand(2, -1, -1))


@pytest.mark.parametrize(("words", "region_mass"), [(93, False), (3, True)])
def test_a_step_that_is_fed_nearly_all_that_it_sees(words, region_mass, monkeypatch):
    """Beside no context, as that is kept. Were its tokens padded, they would be as many as its slots, or more."""
    monkeypatch.setattr(batch, "capture", Graphs())
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"})
    model, processor, profile = opened()
    queries = [" ".join(["w20"] * words)], [PICTURES[0]]
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=1)
    options = {"cache_bytes": 10**6, "sync_every": 8, "region_mass": region_mass}
    with SafeGenerator(model, processor, profile, **options) as guard:
        for _ in range(2):
            same(guard.generate(*queries, max_new_tokens=1), expected)
