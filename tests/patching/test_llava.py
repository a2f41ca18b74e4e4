"""The promise of `ras_fast.patch`, on LLaVA: the same answers, image statistics, nothing left behind."""

import copy
import gc
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from packaging import version
from tiny_models import IMAGE, image_sums, inputs, llava, relative_error, valid_rows
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache

import ras_fast
from ras_fast.backend import forced_backend
from ras_fast.patching import Patch
from ras_fast.patching.layers import FusedNorm, Sum
from ras_fast.regions import RegionMap

CHUNKS_IMAGES = version.parse(transformers.__version__) >= version.parse("5.23")
ROWS = ["ttItttt", "tItt", "tttt", "tIItItt"]  # one, one, no and three images, all of different lengths


@pytest.fixture
def model():
    return llava()


def eager(model, batch, **kwargs):
    """What the unpatched model says with eager attention, and its N × N probabilities."""
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        output = model(**batch, output_attentions=True, **kwargs)
    model.set_attn_implementation({"text_config": "sdpa"})
    return output


def snapshot(model):
    """Every attribute of every module and config, by identity; parameters by value."""
    state = {}
    for name, module in model.named_modules():
        state[name] = {k: v for k, v in module.__dict__.items() if not isinstance(v, dict)}
        state[name] |= {k: dict(v) for k, v in module.__dict__.items() if isinstance(v, dict)}
    configs = {name: dict(m.config.__dict__) for name, m in model.named_modules() if hasattr(m, "config")}
    return state, configs, {k: v.clone() for k, v in model.state_dict().items()}


def same(before, after):
    modules, configs, weights = before
    assert modules.keys() == after[0].keys()
    for name, attributes in modules.items():
        assert attributes.keys() == after[0][name].keys(), name
        for key, value in attributes.items():
            other = after[0][name][key]
            assert other is value or (isinstance(value, (dict, int, str, float, tuple)) and other == value), (name, key)
    assert repr(configs) == repr(after[1])
    assert all(torch.equal(weights[k], v) for k, v in after[2].items())
    assert weights.keys() == after[2].keys()


# The same answers


def test_every_add_is_fused(model):
    with ras_fast.patch(model) as patched:
        report = patched.report()
    assert (report.fused_layers, report.fused_norms, report.norms) == (3, 6, 6)
    assert report.unfused == {}
    assert report.regions is None
    assert "3 of 3 decoder layers fused" in str(report)


@pytest.mark.parametrize("rows", [["tItt"], ["ttt"], ["tIIt"], ROWS])
def test_logits(model, rows):
    batch = inputs(rows)
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model):
            got = model(**batch).logits
    assert relative_error(got[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_original(dtype):
    batch = inputs(ROWS)
    exact, model = llava(), llava(dtype=dtype)
    low = inputs(ROWS, dtype=dtype)
    with torch.no_grad():
        exact.load_state_dict(model.state_dict())
        truth = exact(**batch | {"pixel_values": low["pixel_values"].float()}).logits[valid_rows(batch)]
        before = model(**low).logits[valid_rows(batch)].float()
        with ras_fast.patch(model) as patched:
            after = model(**low).logits[valid_rows(batch)].float()
    assert patched.report().fused_norms == 6
    assert (after - truth).abs().max() <= 2 * (before - truth).abs().max() + 1e-3


def test_greedy_tokens_of_fifty_prompts(model):
    rows = [("t" * (1 + i % 5)) + "I" * (i % 3) + "t" * (1 + i % 7) for i in range(50)]
    batches = [inputs(rows[i : i + 10], seed=i) for i in range(0, 50, 10)]
    expected = [model.generate(**batch, max_new_tokens=6, do_sample=False) for batch in batches]
    with ras_fast.patch(model):
        got = [model.generate(**batch, max_new_tokens=6, do_sample=False) for batch in batches]
    assert all(map(torch.equal, got, expected))


def test_right_padding_and_holes(model):
    for batch in (inputs(ROWS, side="right"), inputs(ROWS)):
        batch["attention_mask"][0, 12] = 0
        with torch.no_grad():
            expected = model(**batch).logits
            with ras_fast.patch(model):
                got = model(**batch).logits
        assert relative_error(got[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5


def test_hidden_states_are_the_true_ones(model):
    batch = inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states
        with ras_fast.patch(model):
            got = model(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 4
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a[valid_rows(batch)], b[valid_rows(batch)]) < 1e-5


MODES = {
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_modes(model, mode):
    options = {"do_sample": False, "max_new_tokens": 6} | MODES[mode]
    batch = inputs(["ttItttt"] if mode == "prompt lookup" else ["ttItttt", "tItt", "tIIt"])

    def generate():
        torch.manual_seed(0)
        return model.generate(**batch, **options)

    expected = generate()
    with ras_fast.patch(model):
        assert torch.equal(generate(), expected)


def test_assisted_decoding(model):
    assistant, batch = llava(layers=1), inputs(["ttItttt"])
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    with ras_fast.patch(model), ras_fast.patch(assistant):
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False, assistant_model=assistant), expected)


def test_attention_alone_from_the_config():
    reference = llava()
    model = llava(attn_implementation={"text_config": "ras_fast"})
    model.load_state_dict(reference.state_dict())
    assert model.config.text_config._attn_implementation == "ras_fast"
    assert model.config.vision_config._attn_implementation == "sdpa"
    batch = inputs(ROWS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[valid_rows(batch)], reference(**batch).logits[valid_rows(batch)])
        with pytest.raises(ValueError, match=r"ras_fast\.patch"):
            model(**batch, output_attentions=True)


# Image statistics


@pytest.mark.parametrize("rows", [["tItt"], ["tIIt"], ROWS])
def test_attentions_are_the_image_sums_of_eager_attention(model, rows):
    batch = inputs(rows)
    expected = eager(model, batch).attentions
    with torch.no_grad(), ras_fast.patch(model) as patched:
        got = model(**batch, output_attentions=True).attentions
        regions = patched.region_map
    assert regions.num_regions == max(row.count("I") for row in rows)
    assert len(got) == 3
    for a, b in zip(got, expected, strict=True):
        sums = image_sums(b, regions.ids, regions.num_regions)
        assert (a - sums).transpose(1, 2)[valid_rows(batch)].abs().max() < 1e-5


def test_attentions_without_any_image(model):
    batch = inputs(["ttt", "tt"])
    with torch.no_grad(), ras_fast.patch(model):
        output = model(**batch, output_attentions=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 6, 3, 0)] * 3


def test_an_image_token_that_was_typed_is_no_image(model):
    batch = {"input_ids": torch.tensor([[5, IMAGE, 6, 7]])}
    with torch.no_grad(), ras_fast.patch(model) as patched:
        expected = model(**batch).logits
        assert patched.region_map.num_regions == 0
        patched.set_region_bias(torch.full((6,), 5.0))
        assert torch.equal(model(**batch).logits, expected)


def test_a_text_model_that_is_given_nothing_says_so_itself(model):
    with ras_fast.patch(model) as patched, pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        patched.text_model()


def test_an_eager_encoder_gives_its_attentions(model):
    model.set_attn_implementation({"vision_config": "eager"})
    pixels = inputs(["tIt"])["pixel_values"]
    with torch.no_grad(), ras_fast.patch(model):
        assert model.model.get_image_features(pixels, output_attentions=True).attentions is not None


def test_region_map(model):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        model(**inputs(ROWS))
        regions = patched.region_map
    length = 7 - 1 - 2 + 3 * 16
    expected = torch.full((4, length), -1, dtype=torch.int32)
    expected[0, -20:-4] = 0  # ttItttt
    expected[1, -18:-2] = 0  # tItt
    expected[3, 1:17], expected[3, 17:33], expected[3, 34:50] = 0, 1, 2  # tIItItt: adjacent images are told apart
    assert torch.equal(regions.ids, expected)
    assert regions.grids == [[(4, 4)], [(4, 4)], [], [(4, 4)] * 3]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}])
def test_statistics_follow_generation(model, options):
    batch = inputs(["tIItt", "tItttt"])
    options |= {"max_new_tokens": 4, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation({"text_config": "eager"})
    expected = model.generate(**batch, **options)
    model.set_attn_implementation({"text_config": "sdpa"})
    with ras_fast.patch(model):
        got = model.generate(**batch, **options)
    assert torch.equal(got.sequences, expected.sequences)
    beams = options.get("num_beams", 1)
    ids = torch.full((2, 64), -1)
    ids[0, 1:17], ids[0, 17:33], ids[1, 15:31] = 0, 1, 0
    ids = ids.repeat_interleave(beams, 0)
    assert len(got.attentions) == len(expected.attentions)
    for step, (a, b) in enumerate(zip(got.attentions, expected.attentions, strict=True)):
        for layer in range(3):
            sums = image_sums(b[layer], ids, 2)
            last = (a[layer] - sums)[:, :, -1]
            assert a[layer].shape[-1] == 2
            assert last.abs().max() < 1e-5, (step, layer)


@pytest.mark.skipif(not CHUNKS_IMAGES, reason="this transformers does not split prompts with images")
@pytest.mark.parametrize("size", [1, 4, 7, 18, 25])
@pytest.mark.parametrize("rows", [["ttItt"], ["tItItt", "ttt", "ttttIt"]])
def test_an_image_split_by_chunked_prefill_is_one_region(model, rows, size):
    """Also a chunk of one token, and whatever a chunk holds of the other rows."""
    batch = inputs(rows)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        model(**batch)
        whole = patched.region_map
        model.generate(**batch, max_new_tokens=1, prefill_chunk_size=size, past_key_values=DynamicCache())
        split = patched.region_map
    length = batch["input_ids"].shape[1]
    assert torch.equal(split.keys(length), whole.keys(length))
    assert split.grids == whole.grids
    assert split.num_regions == whole.num_regions


def test_a_cache_filled_before_the_patch_has_no_statistics(model):
    """Its images were not seen: no masses are better than wrong ones."""
    batch, step = inputs(["tItt"]), {"input_ids": torch.tensor([[5]])}
    with torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(past)).logits
        with ras_fast.patch(model) as patched:
            for more in (step, {"input_ids": torch.tensor([[5, 6, 7]])}):
                with pytest.raises(ValueError, match="a cache that was filled while the model was not patched"):
                    model(**more, past_key_values=copy.deepcopy(past), output_attentions=True)
            assert torch.allclose(model(**step, past_key_values=copy.deepcopy(past)).logits, expected, atol=1e-5)
            ids = torch.where(batch["input_ids"] == model.config.image_token_id, 0, -1).to(torch.int32)
            patched.region_map = RegionMap(ids, 1)
            assert model(**step, past_key_values=past, output_attentions=True).attentions[0].shape == (1, 6, 1, 1)


def test_a_map_of_another_batch_is_refused(model):
    embeddings = torch.randn(2, 6, model.config.get_text_config().hidden_size)
    with torch.no_grad(), ras_fast.patch(model) as patched, patched.collect():
        patched.region_map = RegionMap(torch.zeros(1, 6, dtype=torch.int32), 1)
        with pytest.raises(ValueError, match="the region map is of 1 rows; it must be of the batch's 2"):
            patched.text_model(inputs_embeds=embeddings)


def test_collect(model):
    batch = inputs(ROWS)
    expected = eager(model, batch)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        with patched.collect(rows=2, scores=True, layers=[0, 2]) as statistics:
            output = model(**batch)
        regions = patched.region_map
        model(**batch)  # not collected
    assert output.attentions is None
    assert set(statistics.mass) == set(statistics.scores) == {0, 2}
    for layer in (0, 2):
        probabilities = expected.attentions[layer][:, :, -2:]
        sums = image_sums(probabilities, regions.ids, 3)
        assert (statistics.mass[layer] - sums).abs().max() < 1e-5
        assert (statistics.scores[layer] - probabilities.mean(2)).abs().max() < 1e-5
    maps = regions.heat_maps(statistics.scores[2])
    assert [len(row) for row in maps] == [1, 1, 0, 3]
    assert torch.equal(maps[3][1], statistics.scores[2][3, :, 17:33].view(6, 4, 4))


def test_collect_takes_what_is_asked_for(model):
    batch = inputs(ROWS)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        with patched.collect(rows=None) as statistics:
            attentions = model(**batch, output_attentions=True).attentions
        assert patched.statistics is statistics
    assert not statistics.scores
    assert all(torch.equal(statistics.mass[layer], mass) for layer, mass in enumerate(attentions))


def test_collect_inside_collect(model):
    batch = inputs(["tItt"])
    with torch.no_grad(), ras_fast.patch(model) as patched, patched.collect(rows=3) as outer:
        with patched.collect(rows=1) as inner:
            model(**batch)
        model(**batch)
    assert outer.mass[0].shape[2] == 3
    assert inner.mass[0].shape[2] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": -1}, "rows is -1; it must be None or an integer of at least 0"),
        ({"rows": True}, "rows is True; it must be None or an integer of at least 0"),
        ({"rows": 1.5}, "rows is 1.5"),
        ({"scores": True, "reduce": "median"}, "reduce is 'median'; it must be one of mean, sum, max"),
        ({"layers": [3]}, r"layers is \[3\]; it must hold at least one index, of those in 0\.\.2"),
        ({"layers": [-1]}, r"layers is \[-1\]"),
        ({"layers": 1}, "layers is 1"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_cannot_be_collected_is_named(model, arguments, message, side):
    with ras_fast.patch(model) as patched, pytest.raises(ValueError, match=message), patched.collect(**arguments):
        model(**inputs(ROWS, side=side))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_an_attention_that_is_changed_after_the_patch(model, name):
    batch = inputs(["tItt"])
    with torch.no_grad(), ras_fast.patch(model) as patched:
        model.set_attn_implementation({"text_config": name})
        model(**batch)
        with pytest.raises(RuntimeError, match=f"the attention was changed to '{name}' after"), patched.collect():
            model(**batch)
        patched.set_region_bias(torch.ones(6))
        with pytest.raises(RuntimeError, match=f"the attention was changed to '{name}' after"):
            model(**batch)
        model.set_attn_implementation({"text_config": "ras_fast"})
        model(**batch)


def test_statistics_after_unpatch(model):
    patched = ras_fast.patch(model)
    patched.unpatch()
    with pytest.raises(RuntimeError, match="image statistics are off: the model is not patched"):
        patched.region_map  # noqa: B018


@pytest.mark.parametrize("hole", [False, True])
def test_statistics_under_right_padding(model, hole):
    batch = inputs(ROWS, side="right")
    if hole:
        batch["attention_mask"][:, 1] = 0
    expected = eager(model, batch)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        got = model(**batch, output_attentions=True).attentions
        ids = patched.region_map.ids
    for a, b in zip(got, expected.attentions, strict=True):
        assert (a - image_sums(b, ids, 3)).transpose(1, 2)[valid_rows(batch)].abs().max() < 1e-5


def test_second_turn_with_another_image(model):
    """A cache that saw one image is continued by a prompt with another: images keep counting."""
    first, second = inputs(["ttIt"]), inputs(["tItt"], seed=5)
    whole = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1)}
    whole["pixel_values"] = torch.cat([first["pixel_values"], second["pixel_values"]])
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected = eager(model, whole)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        past = model(**first, use_cache=True).past_key_values
        second["attention_mask"] = whole["attention_mask"]
        output = model(**second, past_key_values=past, output_attentions=True)
        regions = patched.region_map
    assert regions.num_regions == 2
    length = second["input_ids"].shape[1]
    assert relative_error(output.logits, expected.logits[:, -length:]) < 1e-5
    for a, b in zip(output.attentions, expected.attentions, strict=True):
        assert (a - image_sums(b, regions.ids, 2)[:, :, -length:]).abs().max() < 1e-5


def test_map_follows_the_rows_of_the_cache(model):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        past = model(**inputs(["tIt", "ttI"]), use_cache=True).past_key_values
        before = patched.region_map.ids
        past.reorder_cache(torch.tensor([1, 0]))
        copied = copy.deepcopy(past)
        past.batch_repeat_interleave(2)
        step = {"input_ids": torch.full((4, 1), 5), "attention_mask": torch.ones(4, 19, dtype=torch.long)}
        model(**step, past_key_values=past)
        assert torch.equal(patched.region_map.ids, before[[1, 1, 0, 0]])
        step = {name: value[:2] for name, value in step.items()}
        model(**step, past_key_values=copied)
        assert torch.equal(patched.region_map.ids, before[[1, 0]])


def test_map_follows_a_crop(model):
    """Another suffix of the same length after a crop: its image lies one position earlier."""
    first = inputs(["tItI"])
    suffix = torch.cat([torch.full((1, 16), IMAGE), torch.full((1, 1), 5)], 1)
    mask = torch.ones_like(first["input_ids"])
    with torch.no_grad(), ras_fast.patch(model) as patched:
        past = model(**first, use_cache=True).past_key_values
        past.crop(-17)
        model(input_ids=suffix, attention_mask=mask, pixel_values=first["pixel_values"][:1], past_key_values=past)
        expected = torch.full((1, 34), -1, dtype=torch.int32)
        expected[0, 1:17], expected[0, 17:33] = 0, 1
        assert torch.equal(patched.region_map.ids, expected)


def test_given_map_for_embeddings(model):
    batch = inputs(["tItt"])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), ras_fast.patch(model) as patched:
        with pytest.raises(ValueError, match="region_map"):
            model.model.language_model(inputs_embeds=embeddings, output_attentions=True)
        patched.region_map = RegionMap(torch.where(batch["input_ids"] == IMAGE, 0, -1).int(), 1)
        output = model.model.language_model(inputs_embeds=embeddings, output_attentions=True)
    assert output.attentions[0].shape == (1, 6, 19, 1)


# Nothing left behind


def test_unpatch_restores_everything(model):
    batch = inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        before = snapshot(model)
        patched = ras_fast.patch(model)
        model(**batch)
        patched.unpatch()
        same(before, snapshot(model))
        assert torch.equal(model(**batch).logits, expected)
        patched.unpatch()
        same(before, snapshot(model))


def test_restored_when_the_block_raises(model):
    before = snapshot(model)
    with pytest.raises(KeyError), ras_fast.patch(model):
        raise KeyError
    same(before, snapshot(model))


@pytest.mark.parametrize("where", ["ras_fast.patching.fusion._prove", "ras_fast.patching.image_statistics.RegionTracker"])
def test_restored_when_patching_fails_half_way(model, monkeypatch, where):
    before, calls = snapshot(model), []

    def fail(*args):
        calls.append(args)
        if len(calls) > 1 or "Tracker" in where:
            raise MemoryError

    monkeypatch.setattr(where, fail)
    with pytest.raises(MemoryError):
        ras_fast.patch(model)
    same(before, snapshot(model))


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_ctrl_c_right_after_a_hook_came_takes_it_off(model, monkeypatch, kind):
    before, register = snapshot(model), getattr(torch.nn.Module, kind)

    def interrupted(*args, **kwargs):
        register(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.Module, kind, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ras_fast.patch(model)
    same(before, snapshot(model))


def test_state_dict_and_saving(model, tmp_path):
    keys, batch = list(model.state_dict()), inputs(["tItt"])
    with torch.no_grad(), ras_fast.patch(model):
        expected = model(**batch).logits
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative_error(loaded(**batch).logits, expected) < 1e-5


def test_deepcopy_is_patched_on_its_own(model):
    batch = inputs(ROWS)
    eager(model, batch)  # transformers leaves its recording hooks on the model
    with torch.no_grad():
        before = snapshot(model)
        with ras_fast.patch(model):
            expected = model(**batch, output_attentions=True)
            twin = copy.deepcopy(model)
        same(before, snapshot(model))
        nn.init.zeros_(model.lm_head.weight)
        model.model.language_model.layers[0].mlp.down_proj.weight.zero_()
        got = twin(**batch, output_attentions=True)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.attentions[1], expected.attentions[1])
        Patch.of(twin).unpatch()
        assert "forward" not in twin.model.language_model.layers[0].__dict__
        assert relative_error(twin(**batch).logits[valid_rows(batch)], expected.logits[valid_rows(batch)]) < 1e-5


def test_pickle(model):
    batch = inputs(["tItt"])
    with torch.no_grad(), ras_fast.patch(model):
        twin = pickle.loads(pickle.dumps(model))  # before an image: transformers' recording hooks cannot be pickled
        assert torch.equal(twin(**batch).logits, model(**batch).logits)


def test_two_models_at_once(model):
    other, batch = llava(layers=2), inputs(["tIt", "tt"])
    with torch.no_grad(), ras_fast.patch(model) as first, ras_fast.patch(other) as second:
        a = model(**batch, output_attentions=True).attentions
        b = other(**inputs(["tIIt"]), output_attentions=True).attentions
        assert (len(a), len(b)) == (3, 2)
        assert (first.region_map.num_regions, second.region_map.num_regions) == (1, 2)


def test_a_model_with_the_same_config_object(model):
    other, batch = type(model)(model.config).eval(), inputs(["tItt", "tt"])
    with torch.no_grad():
        expected = other(**batch).logits
        with ras_fast.patch(model):
            assert relative_error(other(**batch).logits[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5
            with pytest.raises(ValueError, match=r"call ras_fast\.patch"):
                other(**batch, output_attentions=True)
            with pytest.raises(RuntimeError, match=r"build it from a copy .* a later copy also needs set_attn"):
                other.train()(**batch)
            later = type(model)(copy.deepcopy(model.config))
            later.set_attn_implementation("sdpa")
            later.train()(**batch)
        other(**batch)


def test_models_with_the_same_config_object_are_patched_in_turn(model):
    other, before = type(model)(model.config).eval(), snapshot(model)
    with ras_fast.patch(model):
        with pytest.raises(ValueError, match="config object of this LlamaModel is that of another patched model"):
            ras_fast.patch(other)
        with ras_fast.patch(other, regions=False):
            pass
        assert model.config.text_config._attn_implementation == "ras_fast"
    same(before, snapshot(model))
    with ras_fast.patch(other):
        pass
    same(before, snapshot(model))


def test_a_patched_model_that_is_gone_lends_its_config(model):
    ras_fast.patch(type(model)(model.config).eval())
    with torch.no_grad(), ras_fast.patch(model):
        assert len(model(**inputs(["tItt"]), output_attentions=True).attentions) == 3


def test_a_patched_model_that_is_gone_in_a_cycle_lends_its_config(model):
    gc.disable()  # it lies there until somebody collects it
    try:
        other = type(model)(model.config).eval()
        other.cycle = [other]
        ras_fast.patch(other)
        del other
        with ras_fast.patch(model) as patched:
            assert patched.applied
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["regions", "norms", "linears", "caches"])
def test_what_is_patched_is_said_by_truth_values(model, name):
    with pytest.raises(ValueError, match=f"{name} is 'no'; it needs to be True or False"):
        ras_fast.patch(model, **{name: "no"})
    ras_fast.patch(model).unpatch()


def test_patching_twice_is_an_error(model):
    with ras_fast.patch(model):
        with pytest.raises(ValueError, match="patched already"):
            ras_fast.patch(model)
        with pytest.raises(ValueError, match="patched already"):
            ras_fast.patch(model.model)
    with ras_fast.patch(model):
        pass


def test_lora(model):
    peft = pytest.importorskip("peft")
    batch = inputs(ROWS)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = wrapped(**batch).logits
        with ras_fast.patch(wrapped) as patched:
            got = wrapped(**batch, output_attentions=True)
    assert patched.report().fused_norms == 6
    assert got.attentions[0].shape[-1] == 3
    assert relative_error(got.logits[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5


def test_device_map(model):
    """accelerate's hooks stay around the fused layers."""
    accelerate = pytest.importorskip("accelerate")
    batch = inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        for layer in model.model.language_model.layers:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", place_submodules=True))
        with ras_fast.patch(model) as patched:
            got = model(**batch).logits
        assert patched.report().fused_norms == 6
        assert relative_error(got[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5
        assert torch.equal(model(**batch).logits, expected)


def assert_steering_is_a_hook(patched, batch):
    """Of the first layer, by 1."""
    patched.set_steering(0, torch.ones(1, 48))
    patched.steering.set_rows(torch.zeros(len(ROWS), dtype=torch.int32), torch.ones(len(ROWS)))
    steered = patched.model(**batch).logits[valid_rows(batch)]
    patched.clear_steering()
    with patched.layers[0].register_forward_hook(lambda module, args, output: output + 1):
        assert relative_error(steered, patched.model(**batch).logits[valid_rows(batch)]) < 1e-5


def test_offloaded_weights_are_left_alone(model):
    accelerate = pytest.importorskip("accelerate")
    batch = inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        accelerate.cpu_offload(model.model.language_model, "cpu")
        with ras_fast.patch(model) as patched:
            got = model(**batch, output_attentions=True)
            assert_steering_is_a_hook(patched, batch)
    assert relative_error(got.logits[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5
    assert patched.report().fused_norms == 0
    assert "offloaded" in str(patched.report())


@pytest.mark.parametrize("offload", [False, True])
def test_hooks_of_accelerate_that_come_after_the_patch(model, offload):
    accelerate = pytest.importorskip("accelerate")
    batch, text = inputs(ROWS), model.model.language_model
    valid = valid_rows(batch)
    with torch.no_grad():
        expected = model(**batch).logits
        patched = ras_fast.patch(model)
        if offload:
            accelerate.cpu_offload(text, "cpu")
            assert_steering_is_a_hook(patched, batch)
        else:
            for layer in text.layers:
                accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", place_submodules=True))
        assert relative_error(model(**batch).logits[valid], expected[valid]) < 1e-5
        patched.unpatch()
        assert torch.equal(model(**batch).logits, expected)
        accelerate.hooks.remove_hook_from_submodules(text)
        assert torch.equal(model(**batch).logits, expected)
        with ras_fast.patch(model) as again:
            assert again.report().fused_norms == 6


def test_hooks_of_accelerate_that_go_after_the_patch(model):
    accelerate = pytest.importorskip("accelerate")
    batch, text = inputs(ROWS), model.model.language_model
    with torch.no_grad():
        expected = model(**batch).logits
        for layer in text.layers:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", place_submodules=True))
        with ras_fast.patch(model):
            accelerate.hooks.remove_hook_from_submodules(text)
        assert all(inspect.ismethod(layer.forward) for layer in text.layers)
        assert torch.equal(model(**batch).logits, expected)


# Hooks of others


def test_hooks_see_what_they_saw(model):
    text, batch, records = model.model.language_model, inputs(["tItt"]), []
    for module in (text.layers[0], text.layers[1].input_layernorm, text.layers[1].post_attention_layernorm, text.norm):
        module.register_forward_hook(lambda _, args, output: records.append((args[0], output)))
    with torch.no_grad():
        model(**batch)
        unpatched = list(records)
        with ras_fast.patch(model):
            records.clear()
            model(**batch)
    assert len(records) == len(unpatched) == 4
    for got, expected in zip(records, unpatched, strict=True):
        assert relative_error(got[0], expected[0]) < 1e-5
        assert relative_error(got[1], expected[1]) < 1e-5


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("place", ["layer", "final norm", "layer input"])
def test_hooks_that_change_hidden_states_are_obeyed(model, in_place, context, place):
    def change(tensor):
        return tensor.mul_(1.5) if in_place else tensor * 1.5

    text = model.model.language_model
    batch = inputs(["tItt"])
    with context():
        plain = model(**batch).logits
        if place == "layer":
            text.layers[1].register_forward_hook(lambda _, args, output: change(output))
        elif place == "final norm":
            text.norm.register_forward_pre_hook(lambda _, args: (change(args[0]),))
        else:
            text.layers[1].register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        expected = model(**batch).logits
        with ras_fast.patch(model):
            got = model(**batch).logits
    assert relative_error(plain, expected) > 1e-4 or place == "final norm"
    assert relative_error(got, expected) < 1e-5


NOISE = torch.linspace(-2, 2, 48)


class Noisy(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs).add_(NOISE)


def noisy_output(layer):
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs).add_(NOISE)


def noisy_input(layer):
    forward = layer.forward
    layer.forward = lambda x, **kwargs: forward(x.add_(NOISE), **kwargs)


WRITERS = {
    "around a layer": lambda layers: noisy_output(layers[1]),
    "around the next layer": lambda layers: noisy_input(layers[2]),
    "in place of a layer": lambda layers: layers.__setitem__(1, Noisy(layers[1])),
    "hook of all modules": lambda layers: register_module_forward_hook(
        lambda module, args, output: output.add_(NOISE) if module is layers[1] else None
    ),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("writer", WRITERS)
def test_writers_that_come_after_the_patch_are_obeyed(model, writer, context):
    def run(model):
        handle = WRITERS[writer](model.model.language_model.layers)
        with context(), handle or nullcontext():
            return model(**inputs(["tItt"])).logits

    plain = run(llava())
    with ras_fast.patch(model):
        assert relative_error(run(model), plain) < 1e-5


def test_inference_mode_keeps_the_stored_norms(model, monkeypatch):
    """Three layers of two norms and the final one; only the first has no add before it."""
    calls = []
    with ras_fast.patch(model), torch.inference_mode():
        compute = FusedNorm.compute
        monkeypatch.setattr(FusedNorm, "compute", lambda *args: calls.append(args[0]) or compute(*args))
        model(**inputs(["tItt"]))
    assert len(calls) == len(set(map(id, calls))) == 7


def test_an_eps_that_is_changed_after_the_patch(model):
    def run(model):
        model.model.language_model.norm.variance_epsilon = 10.0
        return model(**inputs(["tItt"])).logits

    with torch.no_grad(), ras_fast.patch(model):
        assert relative_error(run(model), run(llava())) < 1e-5


# What cannot be


def test_training_and_gradients_are_refused(model):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        ras_fast.patch(model.train())
    model.eval()
    with ras_fast.patch(model):
        with pytest.raises(RuntimeError, match="no_grad"):
            model(**inputs(["tItt"]))
        model.train()
        with torch.no_grad(), pytest.raises(RuntimeError, match="training mode"):
            model(**inputs(["tItt"]))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llava", None])
def test_what_is_not_a_model(thing):
    with pytest.raises(TypeError, match="transformers model"):
        ras_fast.patch(thing)


def test_a_model_that_needs_more_than_tokens(model, monkeypatch):
    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        return inputs_embeds.reshape(-1)

    monkeypatch.setattr(type(model.model.language_model), "forward", forward)
    with pytest.raises(TypeError, match=r"text model of Llava.*, a LlamaModel, cannot be .* tokens alone \(Attrib"):
        ras_fast.patch(model)


def test_backend(model):
    with pytest.raises(ValueError, match="backend is"):
        ras_fast.patch(model, backend="fast")
    batch = inputs(["tItt"])
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model, backend="torch"):
            assert forced_backend() == "torch"
            assert relative_error(model(**batch).logits, expected) < 1e-5
    assert forced_backend() == "auto"


def test_another_default_device(model):
    """As under torch.set_default_device: what `patch` tries is the model's business, wherever it lies."""
    batch = inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        with torch.device("meta"), ras_fast.patch(model) as patched:
            report = patched.report()
            assert relative_error(model(**batch).logits[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5
    assert (report.regions, report.fused_norms, report.linears, report.mlps) == (None, 6, 22, 3)


@pytest.mark.parametrize("first", [0, 1])
def test_backends_of_two_models(model, first):
    """The backend is forced as long as one of the models that asked for it is patched; a copy has not asked."""
    names = ["torch", "cpu"]
    handles = [ras_fast.patch(which, backend=name) for which, name in zip((model, llava(layers=1)), names, strict=True)]
    Patch.of(copy.deepcopy(handles[1].model)).unpatch()
    assert forced_backend() == "cpu"
    handles[first].unpatch()
    assert forced_backend() == names[1 - first]
    handles[1 - first].unpatch()
    assert forced_backend() == "auto"


def test_without_regions_or_without_norms(model):
    batch = inputs(["tItt"])
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model, regions=False) as patched:
            assert model.config.text_config._attn_implementation == "sdpa"
            assert relative_error(model(**batch).logits, expected) < 1e-5
            with pytest.raises(RuntimeError, match="image statistics are off: not asked for"):
                _ = patched.region_map
        with ras_fast.patch(model, norms=False, linears=False) as patched:
            assert patched.report().fused_norms == patched.report().linears == 0
            assert torch.equal(model(**batch).logits, expected)
            assert relative_error(model(**batch, output_attentions=True).logits, expected) < 1e-5


def test_an_attention_that_ignores_the_interface(model):
    """Statistics are off and the report says why; layers are fused all the same."""
    before, batch = snapshot(model), inputs(["tItt"])
    attention = model.model.language_model.layers[1].self_attn
    original = type(attention).forward

    class OwnWay(type(attention)):
        def forward(self, hidden_states, **kwargs):
            self.config = llava().config.text_config  # one whose attention is SDPA
            return original(self, hidden_states, **kwargs)

    attention.__class__ = OwnWay
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model) as patched:
            assert relative_error(model(**batch).logits, expected) < 1e-5
    assert "the text model under this package's attention does not run" in patched.report().regions  # its masks
    assert patched.report().fused_norms == 6
    assert before[0].keys() == snapshot(model)[0].keys()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_wrong_number_of_images_leaves_the_model_usable(model):
    good, bad = inputs(["tItt"]), inputs(["tItt"])
    bad["pixel_values"] = torch.cat([bad["pixel_values"]] * 2)
    with torch.no_grad(), ras_fast.patch(model):
        expected = model(**good, output_attentions=True)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**bad)
        got = model(**good, output_attentions=True)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.attentions[0], expected.attentions[0])


def test_nan_pixels_stay_in_their_row(model):
    batch = inputs(["tItt", "tIt", "ttt"])
    with torch.no_grad(), ras_fast.patch(model):
        expected = model(**batch, output_attentions=True)
        batch["pixel_values"][0] = torch.nan
        got = model(**batch, output_attentions=True)
    assert got.logits[0, -1].isnan().all()
    valid = valid_rows(batch)[1:]
    assert torch.equal(got.logits[1:][valid], expected.logits[1:][valid])
    assert got.attentions[2][0, :, -1].isnan().all()
    assert not got.attentions[2][1:].isnan().any()


# Weights that come and go between the sum and the norm's own call


def stream(layer, scale):
    """The layer's weights are there inside its own forward alone, as where layers are streamed to a device."""
    weights = {name: parameter.data * scale for name, parameter in layer.named_parameters()}

    def bring(module, args, kwargs):
        for name, parameter in module.named_parameters():
            parameter.data = weights[name]

    def take(module, args, output):
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    take(layer, (), None)
    layer.register_forward_pre_hook(bring, with_kwargs=True)
    layer.register_forward_hook(take)


def swap(layer, scale):
    """The next layer's hook puts another weight in the place of its norm's."""
    new = nn.Parameter(layer.input_layernorm.weight.detach() * scale, requires_grad=False)
    layer.register_forward_pre_hook(lambda module, args: setattr(module.input_layernorm, "weight", new))


def fill(layer, scale):
    """The norm's own hook writes its weight, past what torch counts."""
    new = layer.input_layernorm.weight.detach() * scale

    def write(module, args):
        module.weight.data.copy_(new)

    layer.input_layernorm.register_forward_pre_hook(write)


@pytest.mark.parametrize("change", [stream, swap, fill])
def test_a_norm_goes_by_the_weights_of_its_own_call(model, change):
    batch, twin = inputs(ROWS), copy.deepcopy(model)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        for each in (twin, model):
            for layer in each.model.language_model.layers:
                change(layer, 1.3)
        for _ in range(2):
            expected = twin(**batch).logits[valid_rows(batch)]
            assert relative_error(model(**batch).logits[valid_rows(batch)], expected) < 1e-5
        assert patched.report().fused_norms == 6


@torch.no_grad()
def test_a_norm_whose_weight_is_not_there_is_left_alone(model):
    """On another device, as after `dispatch_model`, or freed, as by FSDP's first version between two layers' forwards."""
    with ras_fast.patch(model) as patched:
        norm = patched.layers[1].input_layernorm
        fused, states = norm.forward, torch.randn(1, 2, 48)
        elsewhere = states.to("meta")
        assert fused.add(Sum(elsewhere, elsewhere)).is_meta
        norm.weight.untyped_storage().resize_(0)
        assert fused._is_elsewhere(states, norm.weight)
        assert torch.equal(fused.add(Sum(states, states)), states * 2)


@pytest.mark.parametrize("call", range(1, 10))
def test_out_of_memory_is_not_taken_for_a_model_that_cannot_be_patched(call):
    """Else it would stay unfused, or without statistics, for as long as it is patched."""
    model, calls = llava(), []

    def allocate(*args):
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    with model.model.language_model.layers[1].register_forward_pre_hook(allocate), pytest.raises(torch.OutOfMemoryError):
        ras_fast.patch(model)
    assert Patch.of(model) is None
    with ras_fast.patch(model) as patched:
        assert (patched.report().fused_layers, patched.report().regions) == (3, None)


def test_modules_that_hold_each_other_have_no_patch():
    outer = torch.nn.Sequential(torch.nn.Linear(1, 1))
    outer[0].outer = outer
    assert Patch.of(outer) is None
