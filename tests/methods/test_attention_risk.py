"""Attention risk: features against eager attention, steering against hooks on the unpatched model."""

import copy
import math
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_random import endless_llava, mixed_batch, random_image, random_words, skip_mixed_beams, tiny_llava
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import ras_fast
from ras_fast.fingerprint import fingerprint
from ras_fast.methods import moras
from ras_fast.methods.attention import CS, AttentionRisk, calibrate, check_gate, fisher_ratio, fit, select
from ras_fast.methods.attention_gate import features, features_so_far, rows_after_images
from ras_fast.methods.moras import PRESETS, Moras
from ras_fast.output_head import output_head
from ras_fast.profile import RasProfile

D, LAYERS, STEPS = 32, 3, 3
HEADS = [(2, 1), (0, 3), (2, 0)]
PAIRS = [(random_image(i), random_words(50 + i, 6), random_words(90 + i, 4)) for i in range(12)]


@pytest.fixture(scope="module")
def model(processor):
    return endless_llava(processor, LAYERS)


@pytest.fixture(scope="module")
def batch(processor):
    return mixed_batch(processor)


def profile_of(model, scale=3.0, bias=0.0, steps=STEPS):
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "prototypes": torch.randn(steps, D, generator=generator),
        "attention_weights": scale * torch.randn(3 * len(HEADS), generator=generator),
        "attention_bias": torch.tensor([bias]),
    }
    return RasProfile("attention", {"heads": [list(head) for head in HEADS]}, tensors, fingerprint(model))


def eager_features(model, batch, heads=HEADS):
    """From the N × N probabilities of the unpatched model."""
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        probabilities = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "sdpa"})
    rows = []
    for b, ids in enumerate(batch["input_ids"]):
        image = ids == model.config.image_token_id
        first = int(image.nonzero().max()) + 1 if image.any() else 0
        looked = torch.stack([probabilities[layer][b, head, first:][:, image].sum(-1) for layer, head in heads])
        rows.append(torch.stack([looked.mean(-1), looked.amax(-1), looked[:, -1]], -1).flatten())
    return torch.stack(rows)


@contextmanager
def hooked(model, profile, risk):
    """The unpatched model whose states before the head, of the first steps, are moved to the prototypes by risk [B]."""
    step = 0

    def steer(module, args):
        nonlocal step
        hidden = args[0].clone()
        if step < len(profile.tensors["prototypes"]):
            r = risk.repeat_interleave(hidden.shape[0] // len(risk))[:, None]
            hidden[:, -1] = (1 - r) * hidden[:, -1] + r * profile.tensors["prototypes"][step]
        step += 1
        return (hidden,)

    handle = model.lm_head.register_forward_pre_hook(steer)
    try:
        yield
    finally:
        handle.remove()


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "several answers": {"num_beams": 3, "num_return_sequences": 2},
}


def generate(model, batch, **options):
    return model.generate(**batch, **{"max_new_tokens": 6, "do_sample": False, **options})


def expected_risk(model, batch, profile):
    logit = eager_features(model, batch) @ profile.tensors["attention_weights"] + profile.tensors["attention_bias"]
    return torch.where((batch["input_ids"] == model.config.image_token_id).any(1), logit.sigmoid(), 0)


def test_features_are_those_of_eager_attention(model, batch):
    expected = eager_features(model, batch)
    with torch.no_grad(), ras_fast.patch(model) as patch, patch.collect(rows=None) as statistics:
        model(**batch)
        rows, has_images = rows_after_images(patch.region_map.ids, 0, batch["input_ids"].shape[1])
    assert has_images.tolist() == [True, False, True]
    assert torch.allclose(features(statistics.mass, HEADS, rows), expected, atol=1e-5)
    assert (expected[1] == 0).all()


def test_rows_of_a_later_forward():
    """The image was in an earlier forward; or is in this one, after some of its text."""
    ids = torch.tensor([[0, 0, -1, -1, -1], [-1, -1, -1, 0, -1], [-1] * 5], dtype=torch.int32)
    rows, has_images = rows_after_images(ids, 2, 3)
    assert rows.tolist() == [[True] * 3, [False, False, True], [True] * 3]
    assert has_images.tolist() == [True, True, False]
    assert torch.equal(rows_after_images(ids, torch.tensor(2), 3)[0], rows)
    assert rows_after_images(ids[:, :0], 0, 2)[1].tolist() == [False] * 3


@pytest.mark.parametrize("cut", [[1], [4], [6], [1, 2, 3, 4, 5, 6], [3, 5]])
def test_features_of_pieces_are_those_of_the_whole(cut):
    """A sequence without an image, and others with one whose last token is in the first piece, or in a later one."""
    mass, heads = {0: torch.rand(3, 2, 7, 2), 2: torch.rand(3, 2, 7, 2)}, [(0, 1), (2, 0)]
    ids = torch.tensor([[-1] * 7, [0] + [-1] * 6, [-1, 0, 0, 1, -1, -1, -1]], dtype=torch.int32)
    whole = features(mass, heads, rows_after_images(ids, 0, 7)[0])
    looks = None
    for begin, end in zip([0, *cut], [*cut, 7], strict=True):
        piece = {layer: each[:, :, begin:end] for layer, each in mass.items()}
        rows, _ = rows_after_images(ids[:, :end], begin, end - begin)
        got, looks = features_so_far(piece, heads, rows, looks)
    assert torch.allclose(got, whole)


@pytest.mark.parametrize("cached", [16, 17, 20, 23])
@pytest.mark.parametrize("size", [None, 2, 3, 4])
def test_a_prompt_in_pieces_is_at_the_risk_of_the_whole(model, processor, cached, size):
    """Which `generate` reads from a cache of its first tokens on, or a loop of one's own in pieces of several tokens."""
    ids, image = torch.tensor([[processor.image_token_id] * 16 + list(range(20, 29))]), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        model(input_ids=ids, pixel_values=image)
        expected = method.risk
        past = model(input_ids=ids[:, :cached], pixel_values=image, use_cache=True).past_key_values
        if size is None:
            generate(model, {"input_ids": ids}, past_key_values=past, max_new_tokens=1)
        else:
            last = cached + max((25 - cached) // size - 1, 0) * size  # where the last piece begins, which takes what is left
            for begin in range(cached, last + 1, size):
                model(input_ids=ids[:, begin : begin + size if begin < last else None], past_key_values=past)
    assert torch.allclose(method.risk, expected, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_a_further_question_in_pieces_is_judged_by_its_own_rows(model, processor, static):
    ids, image = torch.tensor([[processor.image_token_id] * 16 + [20, 21]]), torch.randn(1, 3, 16, 16)
    risks = []
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        for size in (4, 2):
            past = StaticCache(model.config.get_text_config(), max_cache_len=32) if static else None
            past = model(input_ids=ids, pixel_values=image, use_cache=True, past_key_values=past).past_key_values
            model(input_ids=torch.tensor([[40]]), past_key_values=past)  # the answer
            for piece in torch.tensor([[30, 31, 32, 33]]).split(size, 1):
                model(input_ids=piece, past_key_values=past)
            risks.append(method.risk)
        model(input_ids=torch.cat([ids, torch.tensor([[40, 30, 31, 32, 33]])], 1), pixel_values=image)
    assert torch.allclose(*risks, atol=1e-5)
    assert not torch.allclose(method.risk, risks[0], atol=1e-3)  # which counts the rows of the first as well


def test_what_was_cut_off_the_cache_does_not_count(model, processor):
    ids, image, risks = torch.tensor([[processor.image_token_id] * 16 + [20, 21]]), torch.randn(1, 3, 16, 16), []
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        for cut_off in ([30, 31], [40, 41]):
            past = model(input_ids=ids, pixel_values=image, use_cache=True).past_key_values
            model(input_ids=torch.tensor([cut_off]), past_key_values=past)
            past.crop(-2)
            model(input_ids=torch.tensor([[50, 51]]), past_key_values=past)
            risks.append(method.risk)
    assert torch.equal(*risks)


def cut(past, length, by):
    """Layer by layer, past the cache's own `crop` and `reset`."""
    for number, layer in enumerate(past.layers):
        if by == "layer's crop":
            layer.crop(length - layer.get_seq_length())
        elif by == "new layer":
            past.layers[number] = type(layer)()
        else:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


@pytest.mark.parametrize(
    ("length", "by"), [(0, "new layer"), (0, "slices"), (3, "layer's crop"), (3, "slices")]
)
def test_an_image_on_a_cache_that_was_cut_by_hand_is_seen(model, processor, length, by):
    """A map of the text that was there before would say that the prompt has no image: risk 0."""
    before, image = torch.randint(20, 90, (1, 40)), torch.randn(1, 3, 16, 16)
    question = torch.tensor([[processor.image_token_id] * 16 + [20, 21, 22]])
    whole = torch.cat([before[:, :length], question], 1)
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        model(input_ids=whole, pixel_values=image)
        expected = method.risk
        past = model(input_ids=before, use_cache=True).past_key_values
        cut(past, length, by)
        assert past.get_seq_length() == length
        model(input_ids=question, pixel_values=image, past_key_values=past)
        assert torch.allclose(method.risk, expected, atol=1e-5)
    assert expected > 0


def test_text_in_the_place_of_an_image_that_was_cut_off_by_hand_is_text(model, processor):
    ids, image = torch.tensor([[20] + [processor.image_token_id] * 16 + [21]]), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        past = model(input_ids=ids, pixel_values=image, use_cache=True).past_key_values
        cut(past, 1, "slices")
        model(input_ids=torch.arange(30, 50)[None], past_key_values=past)
        cached = method.risk
        model(input_ids=torch.cat([ids[:, :1], torch.arange(30, 50)[None]], 1))
    assert torch.equal(cached, method.risk)


def test_no_row_no_feature():
    mass = {0: torch.rand(2, 1, 3, 1)}
    rows = torch.tensor([[True, False, True], [False] * 3])
    got = features(mass, [(0, 0)], rows)
    looked = mass[0][0, 0, [0, 2], 0]
    assert torch.allclose(got[0], torch.stack([looked.mean(), looked.max(), looked[1]]))
    assert got[1].isnan().all()


def test_a_risk_stays_with_its_sequence_when_rows_are_chosen(model, batch):
    """Between the prompt and the steps."""
    token, mask = torch.full((3, 1), 30), torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        cache = model(**batch, use_cache=True).past_key_values
        assert len(set(method.risk.tolist())) == 3
        expected = model(input_ids=token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_select_indices(order)
        got = model(input_ids=token, attention_mask=mask[order], past_key_values=cache).logits
    assert torch.allclose(got, expected[order], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_generation_is_steered_by_the_risk_of_its_prompt(model, batch, mode):
    skip_mixed_beams(MODES[mode])
    profile = profile_of(model)
    risk = expected_risk(model, batch, profile)
    with hooked(model, profile, risk):
        expected = generate(model, batch, **MODES[mode])
    with ras_fast.patch(model) as patch:
        plain = generate(model, batch, **MODES[mode])
        with ras_fast.methods.attach(patch, profile) as method:
            got = generate(model, batch, **MODES[mode])
            beams = MODES[mode].get("num_beams", 1)
            assert torch.allclose(method.risk, risk.repeat_interleave(beams), atol=1e-5)
            assert not method.failed.any()
        assert torch.equal(generate(model, batch, **MODES[mode]), plain)
    assert torch.equal(got, expected)
    answers = MODES[mode].get("num_return_sequences", 1)
    assert (got != plain).any(1).view(3, answers)[[0, 2]].any()
    assert torch.equal(got.view(3, answers, -1)[1], plain.view(3, answers, -1)[1])  # no image, no risk


def test_full_risk_says_what_the_prototypes_say(model, batch):
    profile = profile_of(model, scale=0.0, bias=50.0, steps=2)
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile):
        got = generate(model, batch)[[0, 2], -6:]
    wanted = model.lm_head(profile.tensors["prototypes"]).argmax(-1)
    assert (got[:, :2] == wanted).all()


def test_low_risk_is_the_plain_answer(model, batch):
    with ras_fast.patch(model) as patch:
        plain = generate(model, batch)
        with ras_fast.methods.attach(patch, profile_of(model, scale=0.0, bias=-50.0)):
            assert torch.equal(generate(model, batch), plain)


def test_a_static_cache_that_is_used_again(model, batch):
    """Its length is a tensor then, which the layers count up while the forward runs."""
    cache = StaticCache(model.config.text_config, max_cache_len=96)
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)) as method:
        expected = model(**batch).logits
        risk = method.risk
        for _ in range(2):
            got = model(**batch, past_key_values=cache).logits
            assert torch.allclose(method.risk, risk, atol=1e-5)
            assert torch.allclose(got[:, -1], expected[:, -1], atol=1e-4)
            cache.reset()


def test_a_further_question_is_judged_anew(model, batch):
    """By its own rows, and from its last token on; a decode step in between reads nothing."""
    profile, first = profile_of(model), {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:1]}
    first["input_ids"] = first["input_ids"][:, batch["attention_mask"][0].bool()]
    answer, second = torch.tensor([[7]]), torch.tensor([[9, 30, 31]])
    whole = first | {"input_ids": torch.cat([first["input_ids"], answer, second], 1)}
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        probabilities = model(**whole, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "sdpa"})
    image = whole["input_ids"][0] == model.config.image_token_id
    looked = torch.stack([probabilities[layer][0, head, -3:][:, image].sum(-1) for layer, head in HEADS])
    wanted = torch.stack([looked.mean(-1), looked.amax(-1), looked[:, -1]], -1).flatten() @ profile.tensors["attention_weights"]
    with torch.no_grad(), ras_fast.patch(model) as patch:
        hidden = model.model(**whole).last_hidden_state[:, -1]
        with ras_fast.methods.attach(patch, profile) as method:
            cache = model(**first, use_cache=True).past_key_values
            risk = method.risk
            model(input_ids=answer, past_key_values=cache)
            assert method.risk is risk
            got = model(input_ids=second, past_key_values=cache).logits[:, -1]
    r = wanted.sigmoid()
    assert torch.allclose(method.risk, r, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(got, model.lm_head((1 - r) * hidden + r * profile.tensors["prototypes"][0]), atol=1e-4)


def test_assisted_decoding_is_refused(model, batch):
    row = {"input_ids": torch.tensor([[9, 30, 31, 9, 30, 31, 9, 30]])}
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile_of(model)):
        with pytest.raises(RuntimeError, match="assisted decoding"):
            generate(model, row, prompt_lookup_num_tokens=3)
        generate(model, row)


def test_a_broken_image_is_at_full_risk_alone(model, batch):
    profile = profile_of(model)
    broken = batch | {"pixel_values": batch["pixel_values"].clone()}
    broken["pixel_values"][0] = torch.nan
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
        whole = model(**batch).logits
        expected = method.risk.clone()
        logits = model(**broken).logits
        assert method.failed.tolist() == [True, False, False]
    assert method.risk.tolist() == [1.0, *expected[1:].tolist()]
    assert torch.equal(logits[1:], whole[1:])


def test_the_gate_reads_in_full_precision_under_autocast(model):
    method, found = AttentionRisk(profile_of(model)), torch.rand(4, 9)
    risk, _ = method.assess(found, torch.ones(4, dtype=torch.bool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = method.assess(found, torch.ones(4, dtype=torch.bool))
    assert got.dtype == torch.float32
    assert torch.equal(got, risk)


def test_other_statistics_are_not_disturbed(model, batch):
    """Whoever collects inside the block gets what it asked for, and the risk is the same."""
    profile = profile_of(model)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        with patch.collect(rows=2, scores=True) as alone:
            model(**batch)
        attentions = model(**batch, output_attentions=True).attentions
        with ras_fast.methods.attach(patch, profile) as method:
            model(**batch)
            risk = method.risk.clone()
            with patch.collect(rows=2, scores=True) as beside:
                model(**batch)
            assert torch.allclose(method.risk, risk, atol=1e-5)
            got = model(**batch, output_attentions=True).attentions
            assert torch.allclose(method.risk, risk, atol=1e-5)
    for layer in range(LAYERS):
        assert torch.allclose(beside.mass[layer], alone.mass[layer], atol=1e-6)
        assert torch.allclose(beside.scores[layer], alone.scores[layer], atol=1e-6)
        assert torch.equal(got[layer], attentions[layer])


def test_decode_steps_read_nothing(model, batch, monkeypatch):
    """After the prompt no mass is computed: attention runs as it does without statistics."""
    rows, original = [], ras_fast.ops.region_attention

    def counting(query, *args, **kwargs):
        rows.append(query.shape[2])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(ras_fast.ops, "region_attention", counting)
    with ras_fast.patch(model) as patch:
        rows.clear()
        with ras_fast.methods.attach(patch, profile_of(model)):
            generate(model, batch)
    assert rows == [batch["input_ids"].shape[1]] * 2  # of the two layers that the heads are in


def test_an_error_inside_leaves_nothing_behind(model, batch):
    profile = profile_of(model)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        before = model(**batch).logits
        with pytest.raises(KeyboardInterrupt), ras_fast.methods.attach(patch, profile):
            raise KeyboardInterrupt
        with ras_fast.methods.attach(patch, profile), pytest.raises(ValueError, match="steered by something else"):
            ras_fast.methods.attach(patch, profile).__enter__()
        assert torch.equal(model(**batch).logits, before)
        with ras_fast.methods.attach(patch, profile):
            assert not torch.equal(model(**batch).logits, before)


@pytest.mark.slow
def test_decoding_is_one_graph(model, batch):
    """A static cache and compiled steps: nothing waits for the device, and no step makes a graph of its own."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    profile = profile_of(model)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile):
        expected = generate(model, batch)
        got = generate(model, batch, cache_implementation="static", compile_config=config)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_prompt_is_one_graph(model, batch):
    profile, counter = profile_of(model), CompileCounter()
    torch._dynamo.reset()
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
        expected, risk = model(**batch, use_cache=False).logits, method.risk
        patch.region_map = patch.region_map
        got = torch.compile(model, fullgraph=True, backend=counter)(**batch, use_cache=False).logits
        assert torch.allclose(method.risk, risk, atol=1e-5)
    assert counter.frame_count == 1
    assert torch.allclose(got, expected, atol=1e-4)


# Calibration


def test_fisher_ratio_is_the_textbook_one():
    rng = np.random.default_rng(0)
    harmful = np.arange(40) < 15
    found = rng.normal(size=(40, 3, 2)) + harmful[:, None, None] * np.array([[0, 0], [1, 0], [2, 2]])
    got = fisher_ratio(torch.from_numpy(found), torch.from_numpy(harmful))
    for head in range(3):
        a, b = found[harmful, head], found[~harmful, head]
        spread = np.cov(a.T) + np.cov(b.T)
        difference = a.mean(0) - b.mean(0)
        assert got[head].item() == pytest.approx(difference @ np.linalg.solve(spread, difference), rel=0.01)
    assert got.argsort(descending=True).tolist() == [2, 1, 0]


def test_a_head_that_never_looks_ranks_last():
    found = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0))
    found[:, 1] = 0
    ratio = fisher_ratio(found, torch.arange(20) < 10)
    assert torch.isfinite(ratio).all()
    assert ratio[0] > ratio[1] == 0


def test_the_fit_is_that_of_standardised_inputs():
    generator = torch.Generator().manual_seed(0)
    harmful = torch.arange(60) % 2 == 0
    inputs = torch.randn(60, 4, generator=generator) * torch.tensor([1.0, 1e-3, 50.0, 0.1]) + harmful[:, None] * 0.05
    inputs = inputs.double()
    for c in (0.1, 3.0):
        made = fit(inputs.view(60, 2, 2), None, harmful, 2, c)
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=c)).fit(inputs.numpy(), harmful.numpy())
        got = torch.sigmoid(made.logit(inputs.view(60, 2, 2), None))
        assert np.allclose(got, reference.predict_proba(inputs.numpy())[:, 1], atol=0.01)


@pytest.mark.parametrize("rounding", [0.0, 6e-8, 1e-6])
def test_what_varies_by_rounding_alone_does_not_decide(rounding):
    """A head that looks at nothing but the image, and in use looks away a little."""
    found, _, harmful, _ = labelled(1.0)
    found[:, 1] = 0.9 + rounding * torch.randint(-1, 2, found[:, 1].shape, generator=torch.Generator().manual_seed(1))
    made = fit(found[:, :2], None, harmful, 2, 3.0)
    moved = found[:, :2] - torch.tensor([0.0, 0.01])[:, None]
    assert torch.allclose(made.logit(moved, None), made.logit(found[:, :2], None), atol=0.5)


def labelled(strength, pairs=60):
    """Features [n, 4, 3] of which the first head's tell harm with some strength, S that tells more, and the pair of each."""
    generator = torch.Generator().manual_seed(0)
    harmful = torch.arange(2 * pairs) % 2 == 0
    found = torch.randn(2 * pairs, 4, 3, generator=generator)
    found[:, 0] += strength * harmful[:, None]
    similarity = torch.sigmoid(torch.randn(2 * pairs, generator=generator) + 2.0 * harmful)
    return found, similarity, harmful, torch.arange(2 * pairs) // 2


def test_attention_has_a_say_beside_s_only_where_it_helps():
    found, similarity, harmful, pair = labelled(0.0)
    made, facts, _ = select(found, similarity, harmful, pair, 4)
    assert facts["C"] == 0
    assert (made.weights == 0).all()
    assert made.logit(found, similarity).argsort().tolist() == similarity.argsort().tolist()
    assert torch.allclose(made.similarity_bias, made.bias)
    found, similarity, harmful, pair = labelled(1.0)
    made, facts, _ = select(found, similarity, harmful, pair, 1)
    assert made.heads == [0]
    assert facts["C"] > 0
    assert facts["held_out_loss"][str(facts["C"])] < 0.8 * facts["held_out_loss"]["0.0"]
    average = found[:, [0]].flatten(1).double().mean(0) @ made.weights + made.bias
    assert torch.allclose(made.similarity_bias, average)


def test_the_freedom_is_chosen_by_held_out_pairs():
    """Where nothing is to be learned the least c is best. Both questions of a pair are held out together: items that are
    told apart by their pair alone cannot be learned."""
    found, _, harmful, pair = labelled(0.0)
    assert select(found, None, harmful, pair, 4)[1]["C"] in CS[:2]
    harmful = pair % 2 == 0
    found = torch.nn.functional.one_hot(pair).float()[:, None]
    losses = select(found, None, harmful, pair, 1)[1]["held_out_loss"]
    assert min(losses.values()) > 0.69
    found[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        select(found, None, harmful, pair, 1)


def checked(found, similarity, harmful, pair):
    check_gate(select(found, similarity, harmful, pair, 4)[2], harmful, pair)


def test_a_gate_at_chance_is_refused():
    """Of gates that were fitted to noise half have a held-out loss below ln 2; a gate that tells something passes."""
    harmful, pair, passed = torch.arange(60) % 2 == 0, torch.arange(60) // 2, 0
    for seed in range(8):
        found = torch.rand(60, 4, 3, generator=torch.Generator().manual_seed(seed))
        checked(found + 0.5 * harmful[:, None, None], None, harmful, pair)
        with suppress(ValueError):
            checked(found, None, harmful, pair)
            passed += 1
    assert passed <= 1
    constant = torch.full((60, 4, 3), 0.5)
    for similarity in (None, constant[:, 0, 0]):
        with pytest.raises(ValueError, match=r"has a loss of 0\.\d+, which is no better than chance \(0\.693\)"):
            checked(constant, similarity, harmful, pair)
    with pytest.raises(ValueError, match=r"chance \(0\.451\)"):  # that is to say "harmless" always
        checked(constant, None, torch.arange(60) % 6 == 0, pair)


def test_calibration_refuses_a_gate_at_chance(model, processor, every_answer_refuses):
    """Both questions of a pair are as long, and of words that say nothing: which is the unsafe one is a matter of chance."""
    pairs = [(random_image(i), random_words(50 + i, 5), random_words(90 + i, 5)) for i in range(10)]
    with pytest.raises(ValueError, match="no better than chance"):
        calibrate(model, processor, pairs=pairs, refused_texts=["w1"], min_refused=1, progress=False)


def test_calibration(model, processor, every_answer_refuses, tmp_path):
    texts = [random_words(i, 5) for i in range(4)]
    with torch.device("meta"):  # whatever torch.set_default_device says
        profile = calibrate(model, processor, pairs=PAIRS, refused_texts=texts, heads=3, min_refused=4, progress=False)
    assert ras_fast.Patch.of(model) is None
    profile.save_pretrained(tmp_path)
    loaded = RasProfile.from_pretrained(tmp_path)
    loaded.check(model, processor)
    method = AttentionRisk(loaded)
    prototypes = moras.refusal_prototypes(model, processor, texts, 3, 4, False)
    assert torch.equal(method.prototypes, prototypes)

    queries = ras_fast.inputs.make_queries([q for p in PAIRS for q in p[1:]], [p[0] for p in PAIRS for _ in (1, 2)], processor)
    every = [(layer, head) for layer in range(LAYERS) for head in range(4)]
    found = []
    for query in queries:
        inputs, _ = ras_fast.inputs.encode(processor, query, "cpu", torch.float32)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        found.append(eager_features(model, inputs, every)[0])
    found, harmful = torch.stack(found).view(len(queries), -1, 3), torch.tensor([True, False] * len(PAIRS))
    best = fisher_ratio(found, harmful).argsort(descending=True)[:3].tolist()
    assert method.gate.heads == [every[i] for i in best]
    chosen = found[:, best].flatten(1)
    c = loaded.config["C"]
    assert loaded.config["held_out_loss"][str(c)] == min(loaded.config["held_out_loss"].values())
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=c)).fit(chosen.numpy(), harmful.numpy())
    got, failed = method.assess(chosen, torch.ones(len(queries), dtype=torch.bool))
    assert np.allclose(got, reference.predict_proba(chosen.numpy())[:, 1], atol=0.02)
    assert not failed.any()


def test_questions_without_an_image_are_left_out(model, processor, every_answer_refuses):
    """And a fourth entry is the image of the safe question."""
    arguments = {"refused_texts": ["w1"], "heads": 2, "min_refused": 1, "progress": False}
    plain = calibrate(model, processor, pairs=PAIRS, **arguments)
    pairs = [(image, unsafe, safe, image) for image, unsafe, safe in PAIRS] + [(None, "w1", "w2"), (None, "w1", "w2", None)]
    got = calibrate(model, processor, pairs=pairs, **arguments)
    assert got.config == plain.config
    assert torch.equal(got.tensors["attention_weights"], plain.tensors["attention_weights"])
    pairs[0] = (*pairs[0][:3], random_image(77))
    other = calibrate(model, processor, pairs=pairs, **arguments)
    assert not torch.equal(other.tensors["attention_weights"], plain.tensors["attention_weights"])


def test_amplified_heads(model, processor, batch, every_answer_refuses):
    """The chosen heads get the bias, the gate is fitted to what they see with it, and `attach` sets it."""
    options = {"refused_texts": [random_words(1, 5)], "heads": 2, "min_refused": 1, "progress": False}
    plain, profile = (calibrate(model, processor, pairs=PAIRS, amplify=bias, **options) for bias in (0.0, 1.5))
    assert sorted(profile.config["heads"]) == sorted(plain.config["heads"])
    bias = torch.zeros(LAYERS, 4)
    for layer, head in profile.config["heads"]:
        bias[layer, head] = 1.5
    assert torch.equal(profile.tensors["region_bias"], bias)
    assert not torch.equal(profile.tensors["attention_weights"], plain.tensors["attention_weights"])
    with torch.no_grad(), ras_fast.patch(model) as patch:
        before = model(**batch).logits
        with ras_fast.methods.attach(patch, profile) as method:
            model(**batch)
            risk = method.risk
        assert torch.equal(model(**batch).logits, before)
        patch.set_region_bias(dict(enumerate(bias)))
        with patch.collect(rows=None) as statistics:
            model(**batch)
        rows, has_images = rows_after_images(patch.region_map.ids, 0, batch["input_ids"].shape[1])
        found = features(statistics.mass, profile.config["heads"], rows)
    assert torch.allclose(risk, AttentionRisk(profile).assess(found, has_images)[0], atol=1e-5)


def test_amplified_heads_are_not_chosen_by_what_is_held_out(model, processor, every_answer_refuses, monkeypatch):
    """Heads ranked by all pairs tell these apart even where features are noise; and some are all alike when amplified."""
    options = {"refused_texts": ["w1"], "heads": 4, "min_refused": 1, "progress": False}
    generator, heads = torch.Generator().manual_seed(1), LAYERS * 4
    noise, telling = torch.rand(24, heads, 3, generator=generator), torch.rand(24, heads, 3, generator=generator)
    telling += torch.tensor([2.0, 0.0]).repeat(len(PAIRS))[:, None, None]
    answers = {"noise": [noise, telling[:, :4]], "alike": [telling, torch.ones(24, 4, 3)]}
    for name, found in answers.items():
        found = iter(found)
        monkeypatch.setattr("ras_fast.methods.attention._features", lambda *arguments, found=found: next(found))
        with pytest.raises(ValueError, match="no better than chance"):
            calibrate(model, processor, pairs=PAIRS, amplify=1.5, **options)
        assert next(found, name) == name  # both were asked for


def test_a_bias_for_another_model(model):
    profile = profile_of(model)
    for shape, message in (((LAYERS - 1, 4), r"\(2, 4\); it needs to be \[3, Hq\]"), ((LAYERS, 5), "Hq = 4")):
        changed = replace(profile, tensors=profile.tensors | {"region_bias": torch.ones(shape)})
        with ras_fast.patch(model) as patch, pytest.raises(ValueError, match=message):
            ras_fast.methods.attach(patch, changed).__enter__()


def combined_profile(model):
    config = PRESETS["moras"] | {"s_base": 0.6, "k": math.log(99) / 0.4}
    config |= {"risk": "moras+attention", "heads": [list(head) for head in HEADS]}
    return RasProfile("moras", config, profile_of(model).tensors | {
        "similarity_weight": torch.tensor([5.0]), "similarity_bias": torch.tensor([-3.0])
    })  # fmt: skip


def test_combined_risk(model):
    profile = combined_profile(model)
    method = Moras(profile, output_head(model), "cpu", torch.float32)
    similarity = torch.tensor([0.2, 0.9, 0.5, math.nan, 0.5])
    found = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    found[4, 2] = math.nan
    has_images = torch.tensor([True, False, True, True, True])
    risk, failed = method.risk(similarity, found, has_images)
    logit = 5 * similarity + found @ profile.tensors["attention_weights"] + profile.tensors["attention_bias"]
    assert torch.allclose(risk[[0, 2]], logit[[0, 2]].sigmoid())
    assert torch.allclose(risk[1], torch.sigmoid(5 * similarity[1] - 3))  # nothing to look at: S alone
    assert risk[3:].tolist() == [1, 1]
    assert failed.tolist() == [False, False, False, True, True]
    with pytest.raises(ValueError, match="needs features and has_images"):
        method.risk(similarity)
    binary = replace(profile, config=profile.config | {"gate": "binary"})
    risk, _ = Moras(binary, output_head(model), "cpu", torch.float32).risk(similarity, found, has_images)
    assert risk[[0, 2]].tolist() == (logit[[0, 2]] > 0).float().tolist()


def test_calibration_beside_moras(model, processor, every_answer_refuses, monkeypatch):
    options = {"context_prompt": "w1 w2", "safety_prompt": "w4 w5", "max_context_tokens": 4, "min_refused": 2}
    told_apart = [(image, unsafe, safe) for image, safe, unsafe in PAIRS]  # by chance, the other way round
    base = moras.calibrate(
        model, processor, refused_texts=[random_words(i, 5) for i in range(2)], pairs=told_apart, progress=False, **options
    )
    profile = calibrate(model, processor, pairs=PAIRS, heads=2, combine_with=base, progress=False)
    assert profile.method == "moras"
    chosen = {name: profile.config[name] for name in ("heads", "C", "held_out_loss")}
    assert profile.config == base.config | chosen | {"risk": "moras+attention"}
    assert torch.equal(profile.tensors["prototypes"], base.tensors["prototypes"])
    profile.check(model, processor)
    method = Moras(profile, output_head(model), "cpu", torch.float32)
    assert method.attention.similarity_weight.shape == (1,)
    with pytest.raises(ValueError, match="calibrated on another model"):
        calibrate(tiny_llava(processor, layers=2), processor, pairs=PAIRS, combine_with=base, progress=False)
    lower_for_unsafe = torch.tensor([0.2, 0.8]).repeat(len(PAIRS)) + 0.1 * torch.rand(2 * len(PAIRS))
    monkeypatch.setattr("ras_fast.methods.attention._similarities", lambda *arguments: lower_for_unsafe)
    with pytest.raises(ValueError, match=r"S has the weight -.* it needs to be positive"):
        calibrate(model, processor, pairs=PAIRS, heads=2, combine_with=base, progress=False)


def test_profiles_whose_parts_do_not_fit(model):
    good, both = profile_of(model), combined_profile(model)
    for changes, message in (
        ({"attention_weights": torch.zeros(5)}, r"attention_weights has shape \(5,\); it needs to be \(9,\)"),
        ({"attention_bias": torch.zeros(2)}, "attention_bias"),
        ({"prototypes": torch.zeros(D)}, "prototypes have shape"),
        ({"prototypes": torch.zeros(3, D)}, "prototypes have shape .* none 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionRisk(replace(good, tensors=good.tensors | changes))
    with pytest.raises(ValueError, match="needs to be 'attention'"):
        AttentionRisk(both)
    for config in ({}, {"heads": []}, {"heads": "ab"}, {"heads": [[0.5, 0]] * 3}, {"heads": [[0, True]] * 3}, {"heads": [3]}):
        with pytest.raises(ValueError, match=r"'heads' is .*; it needs to be a list of at least one \[layer, head\]"):
            AttentionRisk(RasProfile("attention", config, good.tensors | {"attention_weights": torch.zeros(0)}))
    for tensors, config, message in (
        (good.tensors, {}, "similarity_weight has shape None"),
        (both.tensors, {"risk": "guess"}, "risk is 'guess'"),
        (both.tensors | {"similarity_weight": torch.tensor([-0.5])}, {}, "similarity_weight is -0.5; it needs to be positive"),
        (both.tensors | {"similarity_weight": torch.zeros(1)}, {}, "similarity_weight is 0.0; it needs to be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Moras(RasProfile("moras", both.config | config, tensors), output_head(model), "cpu", torch.float32)


def test_models_that_do_not_fit(model, processor):
    good = profile_of(model)
    with ras_fast.patch(model) as patch:
        for changed, message in (
            (replace(good, config={"heads": [[2, 1], [0, 3], [3, 0]]}), r"heads \[\[3, 0\]\] are not there"),
            (replace(good, config={"heads": [[2, 1], [0, 4], [1, 0]]}), "3 layers of 4 heads"),
            (replace(good, tensors=good.tensors | {"prototypes": torch.ones(3, D - 1)}), "d = 32"),
        ):
            with pytest.raises(ValueError, match=message):
                ras_fast.methods.attach(patch, changed).__enter__()
    with ras_fast.patch(model, regions=False) as patch, pytest.raises(ValueError, match="image statistics, which are off"):
        ras_fast.methods.attach(patch, good).__enter__()
    with ras_fast.patch(model, norms=False) as patch, pytest.raises(ValueError, match=r"last norm, which .* is not fused"):
        ras_fast.methods.attach(patch, good).__enter__()


def test_calibration_errors(model, processor):
    image, unsafe, safe = PAIRS[0]
    for pairs, message in (
        ([], "holds 0 questions with an image"),
        ([(None, unsafe, safe)], "holds 0 questions with an image"),
        ([(image, unsafe, safe, None)], "unsafe and safe ones are needed"),
        (PAIRS[:4], "holds 4 different pairs with an image; cross-validation needs at least 5"),
        (PAIRS[:4] * 2, "holds 4 different pairs"),
        ([*PAIRS[:4], *((*pair, None) for pair in PAIRS[4:])], "holds 4 different pairs .* 5 with one for the safe question"),
        ([(image, unsafe)], r"pairs\[0\] has 2 entries"),
        ([(np.full((16, 16, 3), np.nan), unsafe, safe)], "NaN or infinite pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, processor, pairs=pairs)
    for arguments, message in (
        ({"heads": 0}, "heads is 0; it needs to be an integer of at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"amplify": math.nan}, "amplify is nan; it needs to be a finite number"),
        ({"amplify": "2"}, "amplify is '2'; it needs to be a finite number"),
        ({"combine_with": "folder"}, "combine_with is 'folder'; it needs to be a profile of moras, ras"),
        ({"refused_texts": ["w1"], "min_refused": "1"}, "min_refused is '1'; it needs to be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, processor, pairs=PAIRS, **arguments)
    with pytest.raises(ValueError, match="combine_with is 'attention'; it needs to be a profile of"):
        calibrate(model, processor, pairs=PAIRS, combine_with=profile_of(model))
    with pytest.raises(ValueError, match="refuses 0 of 1"):
        calibrate(model, processor, pairs=PAIRS, refused_texts=["w1"], progress=False)
