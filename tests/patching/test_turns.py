"""Several tokens at once on a cache, as a second turn and guessed tokens come: every family answers as it does unpatched."""

import copy

import pytest
import torch
from families import FAMILIES, IMAGE
from tiny_models import relative_error, valid_rows
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

import ras_fast
from ras_fast.patching.cache_values import cache_name, returned_cache

FIRST = {"no padding": ["ttItt"], "left padding": ["ttItttt", "tItt"]}
SECOND = {"text": "tttt", "image": "tItt"}
# Given a padding mask without positions, these make positions for the cache's tokens as well, and fail, patched or not.
M_ROPE = {"qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "ernie4_5_vl_moe",
          "hy_v4_vl"}  # fmt: skip
TURNS = [
    (name, padding, second)
    for name, family in FAMILIES.items()
    for padding in FIRST
    for second in SECOND
    if (family.pixels or second == "text") and not (padding == "left padding" and name in M_ROPE)
]


def turns(name, model, first, second):
    """(inputs of a first forward, of a second one on its cache, region ids of both)."""
    family = FAMILIES[name]
    rows = first if family.pixels else [row.replace("I", "t") for row in first]
    before, after = family.inputs(model, rows), family.inputs(model, [second] * len(rows), seed=1)
    regions, own = before.pop("regions"), after.pop("regions")
    masks = [batch.pop("attention_mask") for batch in (before, after)]
    if len(rows) > 1:
        before["attention_mask"], after["attention_mask"] = masks[0], torch.cat(masks, 1)
    if "cross_attention_mask" in before:  # goes on; the second turn sees the first one's image, and its own
        seen, new = before["cross_attention_mask"], after.get("cross_attention_mask")
        seen = torch.cat([seen, seen[:, -1:].expand(-1, len(second), -1, -1)], 1)
        if new is not None:
            seen = torch.cat([seen, pad(new, (0, 0, 0, 0, seen.shape[1] - len(second), 0))], 2)
        after["cross_attention_mask"] = seen
    elif "cross_attention_mask" in after:  # of the first turn's tokens, too, which see no image
        after["cross_attention_mask"] = pad(after["cross_attention_mask"], (0, 0, 0, 0, before["input_ids"].shape[1], 0))
    return before, after, torch.cat([regions, torch.where(own < 0, own, own + 1)], 1)


def run(model, before, after, past=None, **options):
    """The output of the second forward."""
    with torch.no_grad():
        past = returned_cache(model(**before, **{cache_name(model): past}, use_cache=True))
        return model(**after, **{cache_name(model): past}, **options)


def finite_error(got, expected):
    finite = expected > -1e30  # Chameleon's logits of image tokens are the lowest number of their dtype
    return relative_error(got[finite], expected[finite])


@pytest.mark.parametrize(("name", "padding", "second"), TURNS)
def test_second_turn(name, padding, second):
    """With statistics, too."""
    family = FAMILIES[name]
    model = family.model(name)
    before, after, regions = turns(name, model, FIRST[padding], SECOND[second])
    expected = run(model, before, after).logits
    if family.pixels:
        text = "text_config" if "text_config" in model.config.sub_configs else ""
        model.set_attn_implementation({text: "eager"})
        eager = run(model, before, after, output_attentions=True).attentions
        model.set_attn_implementation({text: family.reference})
    with ras_fast.patch(model):
        assert finite_error(run(model, before, after).logits, expected) < 1e-5
        if family.pixels:
            got = run(model, before, after, output_attentions=True)
            assert finite_error(got.logits, expected) < 1e-5
            for layer, (mass, probabilities) in enumerate(zip(got.attentions, eager, strict=True)):
                assert mass.shape[-1] == SECOND[second].count("I") + 1
                sums = family.sums(layer, probabilities, regions)[..., : mass.shape[-1]]
                assert (mass - sums).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "static"),
    [(name, static) for name in ("llava", "gemma3", "qwen2_5_vl") for static in (False, True)] + [("mllama", False)],
)
def test_a_turn_without_the_patch(name, static):
    """Nothing tells where its images are, and to take them for text would be to say that nobody looks at them. Between two
    patches alone nothing is lost."""
    model = FAMILIES[name].model(name)
    first, second, _ = turns(name, model, ["tttt"], "tItt")
    _, third, _ = turns(name, model, ["tttttItt"], "tt")
    third = {key: value for key, value in third.items() if key in ("input_ids", "cross_attention_mask")}
    asked = third | {"output_attentions": True}

    def read(inputs, past):
        with torch.no_grad():
            return model(**inputs, **{cache_name(model): past})

    def new():
        return StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)

    between = new()
    with ras_fast.patch(model):
        read(first, between)
        assert read(first | {"output_attentions": True}, new()).attentions[0].shape[-1] == 0
    read(second, between)
    with ras_fast.patch(model):
        for _ in range(2):
            with pytest.raises(ValueError, match="filled while the model was not patched"):
                read(asked, copy.deepcopy(between))
        seen = new()
        read(first, seen)
    with ras_fast.patch(model):
        read(second, seen)
        expected = read(asked, copy.deepcopy(seen)).attentions
    with ras_fast.patch(model):
        found = read(asked, seen).attentions
    assert expected[-1].shape[-1] == 1
    assert expected[-1].max() > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_guessed_tokens(name):
    """`generate` guesses that what followed earlier in the prompt follows again, and has several guesses checked at once."""
    family = FAMILIES[name]
    model = family.model(name)
    batch = family.inputs(model, ["ttItt" if family.pixels else "ttttt"])
    del batch["regions"]
    options = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
    try:
        expected = model.generate(**batch, **options)
    except (ValueError, RuntimeError) as error:  # Mllama's cache loses images' keys when guesses are taken back
        pytest.skip(f"nor does the unpatched model: {error}")
    with ras_fast.patch(model):
        assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pixels and name != "mllama"])
def test_a_generated_image_token_is_no_image(name):
    """It carries no pixels, whether it comes alone or, being guessed, with others. An image after it is the second one."""
    model = FAMILIES[name].model(name)
    before, after, regions = turns(name, model, ["ttItt"], "tItt")
    generated, prompt = torch.tensor([[5, IMAGE, IMAGE, 7]]), before["input_ids"].shape[1]
    with torch.no_grad(), ras_fast.patch(model) as patched:
        together = run(model, before, {"input_ids": generated}, output_attentions=True)
        past = returned_cache(model(**before, use_cache=True))
        for token in generated[0]:
            alone = model(input_ids=token[None, None], **{cache_name(model): past}, output_attentions=True)
        assert patched.region_map.num_regions == 1
        for a, b in zip(together.attentions, alone.attentions, strict=True):
            assert (a[:, :, -1:] - b).abs().max() < 1e-5
        model(**after, **{cache_name(model): returned_cache(together)})
        ids = patched.region_map.ids
    assert torch.equal(ids[:, :prompt], regions[:, :prompt])
    assert (ids[:, prompt : prompt + 4] == -1).all()
    assert torch.equal(ids[:, prompt + 4 :], regions[:, prompt:])


@pytest.mark.parametrize("name", ["paligemma", "paligemma/gemma2", "gemma3"])
def test_window_on_a_cache_that_keeps_all(name):
    """A plain DynamicCache holds more keys than a sliding layer may see."""
    model = FAMILIES[name].model(name)
    before, after, _ = turns(name, model, ["ttIttttttt"], "t")
    expected = run(model, before, after, DynamicCache()).logits
    with ras_fast.patch(model):
        got = run(model, before, after, DynamicCache()).logits
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(("name", "reference"), [("paligemma", "sdpa"), ("paligemma", "eager"), ("paligemma/gemma2", "eager")])
def test_prefix_model_without_token_types(name, reference):
    """PaliGemma's text without its token types is causal in eager attention. Under SDPA it sees itself as far as no window
    hides it. A patched model does what it did."""
    family = FAMILIES[name]
    model = family.model(name)
    model.set_attn_implementation({"text_config": reference})
    batches = [family.inputs(model, rows) for rows in (["ttttttttttt"], ["ttttttttt", "tttt"])]
    for batch in batches:
        del batch["regions"], batch["token_type_ids"]
    with torch.no_grad():
        expected = [model(**batch).logits[valid_rows(batch)] for batch in batches]
        with ras_fast.patch(model):
            got = [model(**batch).logits[valid_rows(batch)] for batch in batches]
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_images_without_a_cross_attention_mask(reference):
    """Eager attention then sees all images, SDPA takes them for text that is causal. A patched model does what it did."""
    model = FAMILIES["mllama"].model("mllama")
    model.set_attn_implementation({"text_config": reference})
    before, after, _ = turns("mllama", model, ["tItt"], "tttt")
    del before["cross_attention_mask"], after["cross_attention_mask"]
    with torch.no_grad():
        expected = model(**before).logits, run(model, before, after).logits
        with ras_fast.patch(model):
            got = model(**before).logits, run(model, before, after).logits
            observed = run(model, before, after, output_attentions=True).logits
    for a, b in zip((*got, observed), (*expected, expected[1]), strict=True):
        assert relative_error(a, b) < 1e-5
