"""The engine against the reference on a tiny random model of each family: its own positions, windows, masks and tiles."""

from contextlib import nullcontext

import pytest
import torch
from families import END, FAMILIES, IMAGE, SIZE, START, VOCABULARY, CrossAttention
from processors import REAL, with_processor
from tape import Graphs, HostReads
from test_engine_one_pass import NEW_TOKENS, attached
from test_engine_step import to_meta
from tiny_random import random_image, random_words
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerFast

import ras_fast
from ras_fast.attention_map import NoImageStatistics, image_attention
from ras_fast.engine import SafeGenerator, batch, recurrence
from ras_fast.engine.kv_cache import CrossLayer
from ras_fast.engine.runner import Runner
from ras_fast.engine.workspace import Workspace
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import encode, make_queries
from ras_fast.methods import attach
from ras_fast.methods.moras import PRESETS
from ras_fast.methods.projection import Condition, from_vectors
from ras_fast.patching.attention import _expand, is_range
from ras_fast.patching.structure import find_decoder, find_head
from ras_fast.profile import RasProfile
from ras_fast.sequential import SequentialPipeline

OWN = [name for name in REAL if name != "paligemma"]  # families with their own processors; that one is tested apart
WITH_PIL = {name for name in OWN if REAL[name].classes[0].endswith("Pil")}
NEW = pytest.mark.skipif("nemotron_h_omni" not in FAMILIES, reason="newer than this transformers")
SPECIAL = {0: "<pad>", 1: "<bos>", IMAGE: "<image>", START: "<start>", END: "<end>"}


class FamilyProcessor:
    """Stands in for a family's processor: its placeholders around each image, pixels that follow from the image's content."""

    image_token = "<image>"
    chat_template = "{{ messages }}"

    def __init__(self, family, model):
        self.family, self.model = family, model
        words = [SPECIAL.get(i, f"w{i}") for i in range(VOCABULARY)]
        raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", additional_special_tokens=["<image>"]
        )

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, continue_final_message):
        parts = [part for message in messages for part in [{"type": "text", "text": "w90"}, *message["content"]]]
        words = ["<image>" if part["type"] == "image" else part["text"] for part in parts]
        return " ".join(["<bos>", *words, *["w91"] * add_generation_prompt])

    def __call__(self, text, images, return_tensors, add_special_tokens):
        images = images or []
        generator = torch.Generator().manual_seed(sum(sum(image.tobytes()) for image in images) % 2**31)
        batch = self.family.pixels(len(images), generator) if images else {}
        tokens = self.family.tokens
        lengths = iter([tokens] * len(images) if tokens or not images else self.family._lengths(self.model, batch))
        before, after = self.family.around
        ids = []
        for token in self.tokenizer(text[0], add_special_tokens=False)["input_ids"]:
            ids += [*before, *[IMAGE] * next(lengths), *after] if token == IMAGE else [token]
        batch["input_ids"] = torch.tensor([ids])
        if self.family.types:
            batch[self.family.types] = (batch["input_ids"] == IMAGE).long() * self.family.image_type
        if self.family.per_row and images:
            batch["pixel_values"] = batch["pixel_values"][None]
        if images and isinstance(self.family, CrossAttention):
            batch["cross_attention_mask"] = self.family.sight(batch["input_ids"], batch["aspect_ratio_ids"])
        return BatchFeature(batch)


def built(name, **text):
    """text: other values of the text model's config."""
    family = FAMILIES[name]
    if "attention_chunk_size" in family.text:  # for as long as a chunk the engine takes it for attention to all keys
        text = {"attention_chunk_size": 1024} | text
    family = family.with_text(**text)
    model = family.model(name)
    return with_profile(model, FamilyProcessor(family, model))


def with_profile(model, processor):
    torch.manual_seed(7)
    prototypes = find_head(model).weight[3:6].detach() * 2
    config = PRESETS["moras"] | {
        "s_base": 0.1, "k": 9.0, "context_prompt": "w5 w6 w7", "safety_prompt": "w8 w9 w10 w11", "max_context_tokens": 6,
    }  # fmt: skip
    profile = RasProfile("moras", config, {"prototypes": prototypes.float()}, fingerprint(model, processor))
    return model, processor, profile


# Slow for those whose own processors put more into prompts, below.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in WITH_PIL else ()) for name in FAMILIES]
)
def test_exact(name):
    model, processor, profile = built(name)
    prompts = [random_words(700 + i, 2 + i) for i in range(5)]
    images = [random_image(i) for i in range(5)]
    images[2], images[3] = None, [random_image(8), random_image(9)]
    images = images if processor.family.pixels else None
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=10)
    for batch_size in (1, 5):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            outputs = guard.generate(prompts, images, max_new_tokens=10)
        for output, reference in zip(outputs, expected, strict=True):
            assert (output.tokens, output.context) == (reference.tokens, reference.context)
            assert output.rejected_at == reference.rejected_at
            assert output.risk == pytest.approx(reference.risk, abs=1e-4)
    assert guard.counters["not_shared" if guard.plan.runner.both_ways else "shared"] >= 5


@NEW
def test_a_model_that_is_all_behind_its_head_computes_no_other_logits():
    model, processor, profile = built("nemotron_h_omni")
    rows = []
    with SafeGenerator(model, processor, profile) as guard, find_head(model).register_forward_hook(
        lambda module, args, output: rows.append(output.shape[:-1].numel())
    ):
        guard.generate(["w30 w31 w32"], [random_image(0)], max_new_tokens=3)
    assert max(rows) <= 6  # of a stage's tokens; the prompts, of which one is enough, have more


@NEW
def test_an_indexer_of_neighbouring_keys_is_refused():
    """As those of Qwen4 and GLM-5 Next."""
    model, processor, profile = built("hy_v4_vl")
    model.config.text_config.index_kpool = 4
    with pytest.raises(ValueError, match=r"goes by the order of the cache, which the engine changes: use ras_fast\.sequential"):
        SafeGenerator(model, processor, profile)


@NEW
def test_an_indexer_of_a_layer_that_attends_to_another_ones_keys_is_kept_with_a_prefix():
    sharing = {"no_rope_layers": [1] * 3, "kv_source_layers": [0] * 3, "indexer_types": ["full", "shared", "full"]}
    model, processor, profile = built("mistral_large4", **sharing)
    queries = ["w20 w21", "w22", "w23 w24"], [random_image(0), random_image(0), random_image(1)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile, cache_bytes=10**7) as guard:
        for _ in range(2):
            assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        assert guard.counters["cache_hits"] == 4


def test_a_captured_step_does_not_scale_queries_by_places_below_0(monkeypatch):
    """Llama 4 counts the keys before a feed, and one that is filled up is longer than all that it sees."""
    graphs = Graphs()
    monkeypatch.setattr(batch, "capture", graphs)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"})
    model, processor, profile = built("llama4_text")
    prompts = [random_words(700 + i, 2 + 3 * i) for i in range(3)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(prompts, max_new_tokens=8))
    with SafeGenerator(model, processor, profile) as guard:
        assert summary(guard.generate(prompts, max_new_tokens=8)) == expected
    assert graphs.replays


@pytest.mark.parametrize("chunks", [pytest.param({"attention_chunk_size": None}, marks=NEW), {"no_rope_layers": [0] * 3}])
def test_queries_are_scaled_by_their_place_without_chunks_as_well(chunks):
    model, processor, profile = built("llama4_text", floor_scale=200, **chunks)
    with SafeGenerator(model, processor, profile) as guard, pytest.raises(ValueError, match="from 200 on"):
        guard.generate([random_words(7, 60)], max_new_tokens=8)


def test_a_pool_does_not_grow_beyond_a_chunk(monkeypatch):
    model, processor, profile = built("llama4_text", floor_scale=400)
    with SafeGenerator(model, processor, profile) as guard:
        slots = guard.plan._slots
        monkeypatch.setattr(guard.plan, "_slots", lambda *args: (1, *slots(*args)[1:]))
        assert guard.generate([random_words(7, 20)], max_new_tokens=8)[0].failed_closed is None
        with pytest.raises(ValueError, match="from 400 on"):
            guard.generate([random_words(7, 225)], max_new_tokens=8)


PICTURED = [name for name in FAMILIES if FAMILIES[name].pixels]


# Half of them: `test_exact` and families' own processors put neighbours together as well.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 2 else ()) for i, name in enumerate(PICTURED)]
)
def test_neighbours_share_a_forward_over_their_images(name, monkeypatch):
    """Also where something different is said before the image."""
    model, processor, profile = built(name)
    words, image = ("w30", "w31 w32", "w33", "w34"), {"type": "image"}
    parts = [[{"type": "text", "text": text}, image, {"type": "text", "text": random_words(700, 3)}] for text in words]
    queries = [[{"role": "user", "content": own}] for own in parts], [random_image(i) for i in range(4)]
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6)
    encoded, prefill = [], batch.Batch.prefill

    def noted(self, row, inputs, lengths, kind):
        encoded.extend([[*lengths]] * (kind == batch.ANSWER))
        prefill(self, row, inputs, lengths, kind)

    with SafeGenerator(model, processor, profile, batch_size=1, region_mass=True) as guard:
        alone = guard.generate(*queries, max_new_tokens=1)
    with SafeGenerator(model, processor, profile, region_mass=True, cache_bytes=10**7) as guard:
        monkeypatch.setattr(guard, "_prove", lambda: None)  # it has a prefix of its own
        monkeypatch.setattr(batch.Batch, "prefill", noted)
        for _ in range(2):
            outputs = guard.generate(*queries, max_new_tokens=6)
            assert summary(outputs) == summary(expected)
            assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-4)
            for output, other in zip(outputs, alone, strict=True):
                torch.testing.assert_close(output.region_mass, other.region_mass, atol=1e-5, rtol=1e-4, equal_nan=True)
        both_ways = guard.plan.runner.both_ways
        assert guard.counters["cache_hits"] == 4 * (not both_ways)
    if both_ways:  # whole prompts, and none is found again
        assert encoded[: len(encoded) // 2] == encoded[len(encoded) // 2 :]
        encoded = encoded[: len(encoded) // 2]
    if name == "hunyuan_vl":  # numbers the images of a whole forward
        assert list(map(len, encoded)) == [1] * 4
        return
    ((first, longest, *rest),) = encoded
    assert (rest, longest) == ([first] * 2, first + 1)


@pytest.mark.skipif("molmo2" not in FAMILIES, reason="newer than this transformers")
def test_what_the_processor_alone_knows_to_close_an_image_is_shared(monkeypatch):
    """As Molmo 2's ends of rows, which its config does not name. A tokenizer without one of them gives its unknown token."""
    row_end, unknown = 89, 88
    monkeypatch.setattr(FAMILIES["molmo2"], "around", ([START], [row_end, END]))
    model, processor, profile = built("molmo2")
    processor.tokenizer.unk_token = f"w{unknown}"
    processor.image_token_ids = [IMAGE, row_end, unknown]
    queries = ["w20 w21", f"w22 w{unknown}"], [random_image(0), random_image(1)]
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6)
    with SafeGenerator(model, processor, profile) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=6)) == summary(expected)
    assert (guard.counters["shared"], guard.counters["not_shared"]) == (4, 0)


# Of sizes that are cut and scaled in ways of their own.
PICTURES = [random_image(i, size) for i, size in enumerate([(20, 16), (64, 24), (16, 48), (33, 33)])]


def asked(text, pictures=0):
    return {"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}


TURNS = [asked("w40", 1), {"role": "assistant", "content": "w42 w43"}]


TILES = {"idefics3", "aya_vision", "lfm2_vl"}  # where each is a region


# With the image processor that does without torchvision, if the family has one, and with the one that needs it.
@pytest.mark.parametrize(
    ("name", "torchvision"), [(name, which) for name in OWN for which in (False, True) if which or name in WITH_PIL]
)
def test_exact_with_the_familys_own_processor(name, torchvision, monkeypatch):
    if torchvision:
        pytest.importorskip("torchvision")
    try:
        model, processor, profile = with_profile(*with_processor(name, torchvision=torchvision))
    except ImportError as error:
        pytest.skip(str(error))
    assert processor.image_processor.backend == ("torchvision" if torchvision else "pil")
    queries = (
        ["w20 w21", "w22", "w23 w24", "w25", [*TURNS, asked("w44")], [*TURNS, asked("w45 w46", 1)]],
        [PICTURES[0], PICTURES[1], None, PICTURES[2:], PICTURES[3], PICTURES[1:3]],
    )
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6)
    with SafeGenerator(model, processor, profile, batch_size=4, region_mass=True) as guard:
        guard.generate(["w26"], [PICTURES[0]], max_new_tokens=1)  # how an image's tokens are found out once
        processed = []
        counted = type(processor.image_processor).preprocess

        def preprocess(self, images, *args, **kwargs):
            processed.append(images)
            return counted(self, images, *args, **kwargs)

        monkeypatch.setattr(type(processor.image_processor), "preprocess", preprocess)
        outputs = guard.generate(*queries, max_new_tokens=6)
    assert summary(outputs) == summary(expected)
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-4)
    regions, images = [output.region_mass.shape[-1] for output in outputs], [1, 1, 0, 2, 1, 2]
    assert regions == images or (name in TILES and sum(regions) > sum(images))
    # Once each where an image is alone; two for the ids of each stage, and once more where they lie otherwise in the context.
    # What is next to an image in an earlier turn is tried, where the template itself puts nothing there.
    framed = REAL[name].image not in REAL[name].tokens
    assert len(processed) == 3 * 1 + 3 + 4 + (not framed)


OFFSETS = [name for name in ("qwen2_5_vl", "glm4v", "hunyuan_vl", "ernie4_5_vl_moe") if name in WITH_PIL]  # M-RoPE


@pytest.mark.parametrize("name", OFFSETS)
def test_queries_without_an_image_leave_the_positions_of_shorter_ones_alone(name):
    """Without an image such models count a row's padding as positions, too."""
    model, processor, profile = with_profile(*with_processor(name))
    earlier = {"role": "assistant", "content": "w42 w43 w44"}
    prompts = [[asked("w20 w21 w22 w23"), earlier, asked("w30")], [asked("w20 w21 w22 w23 w24"), earlier, asked("w31 w32")]]
    expected = SequentialPipeline(model, processor, profile).generate(prompts, max_new_tokens=6)
    outputs = SafeGenerator(model, processor, profile).generate(prompts, max_new_tokens=6)
    assert summary(outputs) == summary(expected)
    assert [output.similarity for output in outputs] == pytest.approx([o.similarity for o in expected], abs=1e-4)


@pytest.mark.parametrize("name", OFFSETS)
def test_one_pass_over_queries_without_an_image_leaves_the_positions_of_shorter_ones_alone(name):
    model, processor = with_processor(name)
    torch.manual_seed(3)
    profile = from_vectors(model, processor, torch.randn(SIZE), layers=[1])
    prompts = ["w20", "w21 w22 w23 w24 w25 w26 w27", "w30 w31 w32"]
    expected = attached(model, processor, profile, prompts, [None] * 3)
    outputs = SafeGenerator(model, processor, profile).generate(prompts, max_new_tokens=NEW_TOKENS)
    assert [output.tokens for output in outputs] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("picture", [None, PICTURES[0]], ids=["text", "image"])
@pytest.mark.parametrize("typed", ["<start>", "<video_start>", "<start> <video_end>"])
def test_a_typed_token_that_goes_to_the_experts_of_images(typed, picture):
    """ERNIE-4.5-VL's processor tells the experts which tokens are of an image, also of those that a text spells out."""
    model, processor, profile = with_profile(*with_processor("ernie4_5_vl_moe"))
    profile.config["gate"] = 0.0  # the model's own answer
    queries = ["w30", f"w20 {typed} w21"], [None, picture]
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=8)
    assert summary(SafeGenerator(model, processor, profile).generate(*queries, max_new_tokens=8)) == summary(expected)


def test_a_typed_piece_of_an_image_beside_one_is_refused():
    model, processor, profile = with_profile(*with_processor("gemma3"))
    piece = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    for pipeline in (SequentialPipeline(model, processor, profile), SafeGenerator(model, processor, profile)):
        assert pipeline.generate([f"w20 {piece}"], max_new_tokens=1)[0].tokens
        with pytest.raises(ValueError, match=rf"prompts\[1\]: a text spells out '{piece}'"):
            pipeline.generate(["w20", f"w21 {piece}"], [PICTURES[0], PICTURES[1]], max_new_tokens=1)


def test_where_images_take_fewer_positions_than_tokens_the_words_alone_are_too_many(monkeypatch):
    model, processor, profile = with_profile(*with_processor("qwen2_5_vl"))
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 40)
    image = random_image(0, (64, 64))  # of 64 tokens, which take 8 positions
    for pipeline in (SafeGenerator(model, processor, profile, fused=False), SequentialPipeline(model, processor, profile)):
        assert pipeline.generate(["w20"], [image], max_new_tokens=2)[0].failed_closed is None
        with pytest.raises(ValueError, match=r"prompts\[1\]: a prompt has \d+ tokens; .* has 40 positions"):
            pipeline.generate(["w20", "w20 " * 41], max_new_tokens=2)


@pytest.mark.parametrize("context_prompt", ["w5 w6 w7", "\nw5 w6 w7"])
def test_an_image_is_joined_with_what_it_is_next_to_in_each_stage(context_prompt):
    """Gemma 3's processor writes two line feeds on either side of an image, and a third one makes another token of them. Where
    the image comes first, the template brings it; where it comes last, it does so in the risk stage alone."""
    model, processor, profile = with_profile(*with_processor("gemma3"))
    profile.config["context_prompt"] = context_prompt
    last = {"role": "user", "content": [{"type": "text", "text": "w22"}, {"type": "image"}]}
    questions = [asked("w20 w21", 1)], [last], [asked("\nw23", 1)], [asked("w24", 1)]
    expected = SequentialPipeline(model, processor, profile).generate(questions, PICTURES, max_new_tokens=6)
    for order in ([0, 1, 2, 3], [2, 1, 0, 3]):
        with SafeGenerator(model, processor, profile, batch_size=1) as guard:
            for i in order:
                (output,) = guard.generate([questions[i]], [PICTURES[i]], max_new_tokens=6)
                assert summary([output]) == summary([expected[i]])
                assert output.risk == pytest.approx(expected[i].risk, abs=1e-4)


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 5}


@pytest.mark.parametrize(
    ("name", "captured", "decoding"),
    [
        pytest.param(name, captured, decoding, marks=() if (i + captured + bool(decoding)) % 2 == 0 else pytest.mark.slow)
        for i, name in enumerate(["paligemma", "paligemma/gemma2"])
        for captured in (False, True)
        for decoding in ({}, SAMPLED)
    ],
)
def test_a_prompt_whose_tokens_all_see_each_other_is_computed_in_one_piece(name, captured, decoding, monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(batch, "capture", graphs)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"} if captured else set())
    model, processor, profile = built(name)
    profile.config["k"] = 1.0
    prompts, images = [random_words(720 + i, 2 + i) for i in range(9)], [random_image(i // 2) for i in range(9)]
    images[2], images[3], images[6] = None, [random_image(8), random_image(9)], None
    expected = summary(SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=8, **decoding))
    for batch_size, every in ((1, 1), (3, 2), (8, 8)):
        options = {"batch_size": batch_size, "sync_every": every, "fused": batch_size > 1, "cache_bytes": 10**6}
        with SafeGenerator(model, processor, profile, **options) as guard:
            for _ in range(2):  # in pools that hold others' keys
                assert summary(guard.generate(prompts, images, max_new_tokens=8, **decoding)) == expected
        assert guard.counters["shared"] == guard.counters["cache_hits"] == 0
        assert "each in one piece" in guard.explain()
    assert graphs.replays > graphs.made > 0 or not captured


def test_paligemmas_own_processor():
    """It puts things between the image and the question, wants an image, and gives labels, which are for training."""
    model, processor, profile = with_profile(*with_processor("paligemma"))
    queries = (
        ["w20 w21", "w22", "w25", [*TURNS, asked("w44")], [*TURNS, asked("w45 w46", 1)]],
        [PICTURES[0], PICTURES[1], PICTURES[2:], PICTURES[3], PICTURES[1:3]],
    )
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6)
    with SafeGenerator(model, processor, profile, batch_size=4, region_mass=True) as guard:
        outputs = guard.generate(*queries, max_new_tokens=6)
        with pytest.raises(ValueError, match=r"prompts\[0\].*images"):
            guard.generate(["w20"])
    assert summary(outputs) == summary(expected)
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-4)
    assert [output.region_mass.shape for output in outputs] == [(3, 4, images) for images in (1, 1, 2, 1, 2)]


@pytest.mark.parametrize("first", ["w26", "<fake_token_around_image> w20"])
def test_a_typed_token_that_the_processor_joins_with_an_images_own(first):
    """Idefics2's makes one of two in a row; the risk stage's prompt has other words there."""
    model, processor, profile = with_profile(*with_processor("idefics2"))
    queries = [first, "<fake_token_around_image> w20", "w22 w23"], PICTURES[:3]
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=3)
    guard = SafeGenerator(model, processor, profile, batch_size=1, fused=False)
    outputs = guard.generate(*queries, max_new_tokens=3)
    assert summary(outputs) == summary(expected)
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("first", ["w20 w21", "w21 w40"])
def test_a_prompt_that_means_something_else_when_it_is_cut_is_not(first, batch_size):
    """As Ovis2's delimiters, here one that the user types: it is embedded as such in a forward with pixels only."""
    model, processor, profile = built("ovis2")
    model.config.visual_indicator_token_ids = [START, 92, 40, 94, END]
    model.model.visual_indicator_token_ids = model.config.visual_indicator_token_ids
    queries = [first, "w22 w23", "w21 w40", "w40", "w24"], [random_image(i) for i in range(5)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        assert guard.counters["shared"] > 0  # by those after it
        assert guard.counters["not_shared"] > 0


def ovis2_with_special_tokens(*tokens):
    """Tokens that mean something else in a forward with pixels, as its config says."""
    model, processor, profile = built("ovis2")
    model.config.visual_indicator_token_ids = model.model.visual_indicator_token_ids = [START, *tokens, END]
    return model, processor, profile


def test_a_special_token_in_the_safety_prompt_or_in_a_context_is_read_with_the_image():
    """A stage that continued the prefix would read it without."""
    for tokens in ((9, 93, 94), (92, 25, 94)):  # w9 is in the safety prompt; w25 is what most contexts say
        model, processor, profile = ovis2_with_special_tokens(*tokens)
        queries = [f"w{22 + i}" for i in range(4)], [random_image(i) for i in range(4)]
        expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=2)
        with SafeGenerator(model, processor, profile) as guard:
            outputs = guard.generate(*queries, max_new_tokens=2)
        similarities = [output.similarity for output in expected]
        assert [output.similarity for output in outputs] == pytest.approx(similarities, abs=1e-5)
    assert any("w25" in output.context for output in expected)


def test_no_context_is_kept_of_an_attempt_that_failed():
    model, processor, profile = ovis2_with_special_tokens(92, 7, 94)  # w7 is in the context prompt
    queries = ["w21 w7", "w22"], [random_image(i) for i in range(2)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile, cache_bytes=2**20) as guard:
        for _ in range(2):
            assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        assert guard.counters["shared"] + guard.counters["not_shared"] == 6  # of the attempts that gave an answer


def test_an_answer_begun_with_a_special_token_is_read_in_one_piece():
    """To the last token, which is the special one."""
    model, processor, profile = ovis2_with_special_tokens(92, 40, 94)
    chat = [{"role": "user", "content": "w21"}, {"role": "assistant", "content": "w40"}]
    queries = ["w22", chat, "w23"], [random_image(i) for i in range(3)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        assert guard.counters["failed_closed"] == 0


def test_where_a_prompt_without_such_a_token_differs_none_is_cut_again():
    model, processor, profile = built("ovis2")
    model.model.visual_indicator_token_ids = [START, 92, 24, 94, END]  # and its config does not say so
    queries = ["w24 w23", "w25"], [random_image(i) for i in range(2)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile, batch_size=1) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        shared = guard.counters["shared"]
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        assert guard.counters["shared"] == shared


def test_logits_that_are_not_finite_prove_nothing(monkeypatch):
    model, processor, profile = built("ovis2")
    model.model.visual_indicator_token_ids = [START, 92, 24, 94, END]
    queries = ["w24 w23"], [random_image(0)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile) as guard:
        with monkeypatch.context() as patch:
            patch.setattr(guard.plan, "_own_logits", lambda job: torch.full((VOCABULARY,), torch.nan))
            guard.generate(*queries, max_new_tokens=6)
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected


def test_a_last_token_that_means_something_else_with_its_image_is_read_with_it():
    model, processor, profile = built("ovis2")
    model.model.visual_indicator_token_ids = [START, 92, 91, 94, END]  # what every prompt ends with
    queries = ["w21 w40", "w22 w41"], [random_image(i) for i in range(2)]
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected


def test_other_logits_than_the_models_own_are_an_error(monkeypatch):
    model, processor, profile = built("llava")
    with SafeGenerator(model, processor, profile) as guard:
        monkeypatch.setattr(guard.plan, "_own_logits", lambda job: torch.arange(VOCABULARY).float())
        with pytest.raises(ValueError, match="gets other logits than the model's own"):
            guard.generate(["w21 w40"], [random_image(0)], max_new_tokens=4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "ovis2", "paligemma", "paligemma/gemma2"])
def test_a_gate_that_looks_at_attention_sees_all_tokens_after_an_image(name, batch_size):
    """The one that closes it, too; and where prompts are not cut behind their images, in Ovis2 and PaliGemma, those that come
    later."""
    model, processor, profile = built(name)
    profile.config |= {"risk": "moras+attention", "heads": [[0, 1], [1, 0]]}
    profile.tensors |= {
        "attention_weights": torch.tensor([30.0, -20.0, 10.0, -15.0, 5.0, 8.0]), "attention_bias": torch.tensor([-1.0]),
        "similarity_weight": torch.tensor([9.0]), "similarity_bias": torch.tensor([-0.9]),
    }  # fmt: skip
    prompts, images = [random_words(700 + i, 2 + 2 * i) for i in range(3)], [random_image(i) for i in range(3)]
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=6)
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-4)


def test_several_end_tokens_in_a_config_are_not_special():
    model, processor, profile = built("gemma3")
    model.config.eos_token_id = [1, 89]
    with SafeGenerator(model, processor, profile) as guard:
        assert END in guard.plan.runner.special_tokens
        assert guard.plan.runner.special_tokens.isdisjoint([1, 89, None])


def test_a_position_offset_of_the_users_stays():
    model, processor, profile = built("qwen2_vl")
    model.model.rope_deltas = torch.tensor([[-10]])
    with SafeGenerator(model, processor, profile) as guard:
        guard.generate(["w20 w21"], [random_image(0)], max_new_tokens=4)
    assert model.model.rope_deltas.item() == -10


def test_attention_in_chunks_is_refused_where_a_prompt_or_what_is_beside_it_may_fill_one():
    model, processor, profile = built("llama4_text")
    with SafeGenerator(model, processor, profile) as guard:
        for tokens, taken in ((1020, "may take 1024 places"), (900, "may take 1152 places")):
            with pytest.raises(ValueError, match=f"{taken}; from 1024 on Llama4ForCausalLM attends in chunks"):
                guard.generate(["w30"], max_new_tokens=tokens)
        assert len(guard.generate(["w30"], max_new_tokens=4)) == 1


def test_a_model_that_reads_no_text_without_an_image_is_refused(monkeypatch):
    """As Kosmos-2."""
    model, processor, profile = built("llava")
    own = type(model).forward

    def forward(self, *args, pixel_values=None, **kwargs):
        if pixel_values is None:
            raise ValueError("You have to specify `pixel_values`.")
        return own(self, *args, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match=r"the engine cannot run it \(You have to specify `pixel_values`.\); use ras_fast"):
        SafeGenerator(model, processor, profile)


def test_images_of_the_same_pixels_and_other_grids_are_other_images():
    """A uniform image, upright and lying: the same patches and as many tokens, but other positions."""
    model, processor, profile = built("qwen2_vl")

    class Uniform:
        around, types, per_row, _lengths = processor.family.around, processor.family.types, False, processor.family._lengths
        features_per_image, image_type, tokens = 1, 1, None

        def pixels(self, images, generator):
            return {"pixel_values": torch.full((24, 96), 0.5), "image_grid_thw": torch.tensor([self.grid])}

    uniform = processor.family = Uniform()
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"batch_size": 1, "cache_bytes": 10**7}):
        with SafeGenerator(model, processor, profile, fused=False, **options) as guard:
            encode = guard.plan.encode

            def told(query, encode=encode):
                uniform.grid = [1, 4, 6] if query.images[0].size == (20, 16) else [1, 6, 4]
                return encode(query)

            guard.plan.encode = told
            images = [random_image(0), random_image(0, (16, 20))]
            guard.generate(["w20 w21 w22"] * 2, images, max_new_tokens=6)
            assert guard.counters["cache_hits"] == 0


class TwoTiles(FamilyProcessor):
    """Cuts every image into two tiles, as Idefics3's does."""

    def apply_chat_template(self, messages, **options):
        text = super().apply_chat_template(messages, **options)
        return text.replace("<image>", "<image> <image>")

    def __call__(self, text, images, **options):
        return super().__call__(text, [image.rotate(90 * i) for image in images or [] for i in range(2)], **options)


def test_where_an_image_is_several_tiles_attention_is_that_of_all():
    model, _, profile = built("idefics3")
    processor = TwoTiles(FAMILIES["idefics3"], model)
    images = [random_image(0), None, [random_image(1), random_image(2)]]
    with SafeGenerator(model, processor, profile, region_mass=True) as guard:
        outputs = guard.generate(["w20 w21", "w22", "w23"], images, max_new_tokens=2)
    assert [output.region_mass.shape for output in outputs] == [(3, 4, 2), (3, 4, 0), (3, 4, 4)]
    assert all((output.region_mass > 0).all() for output in outputs)
    with pytest.raises(NoImageStatistics, match=r"cuts 1 image\(s\) into 2 tiles"):
        image_attention(model, processor, "w20", images[0])


def test_an_image_that_is_cross_attended_to_has_no_heat_map():
    model, processor = with_processor("mllama")
    with pytest.raises(NoImageStatistics, match="keys of cross-attention layers"):
        image_attention(model, processor, "w20", random_image(0))
    ras_fast.patch(model).unpatch()  # it is not patched any more


def test_an_image_of_several_tiles_in_one_run_has_no_heat_map():
    model, processor, _ = built("internvl")
    processor.image_processor = None
    looked = image_attention(model, processor, "w20", random_image(0))
    assert looked.maps == [None]
    assert looked.mass.shape == (3, 4, 1)


def hybrid(name, seed):
    """What steers some answers from their first token on, some from a later one, and some not."""
    model, processor, profile = built(name)
    torch.manual_seed(seed)
    tokens = torch.randint(3, 60, (3,))
    profile.tensors["prototypes"] = find_head(model).weight[tokens].detach().float() / 4
    profile.config["k"] = 3.0
    prompts, images = [random_words(700 + i, 2 + i) for i in range(6)], [random_image(i) for i in range(6)]
    return model, processor, profile, (prompts, images)


def summary(outputs):
    return [(output.tokens, output.context, output.rejected_at) for output in outputs]


@pytest.mark.parametrize(
    ("name", "seed", "captured", "cut"),
    [
        ("qwen3_5", 47, False, True),
        ("lfm2_vl", 55, True, True),
        pytest.param("nemotron_h_omni", 40, True, True, marks=NEW),
        pytest.param("mistral_large4", 40, True, True, marks=NEW),
        pytest.param("qwen3_5", 47, True, True, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 47, True, False, marks=pytest.mark.slow),
        pytest.param("lfm2_vl", 55, False, True, marks=pytest.mark.slow),
        pytest.param("lfm2_vl", 55, True, False, marks=pytest.mark.slow),
    ],
)
def test_a_state_goes_back_with_its_answer(name, seed, captured, cut, monkeypatch):
    """Recurrences: a draft that is changed at a later step starts again behind its prompt, cut or not. A capture, too, runs its
    step once more than it is asked to, and no state may go on by that. And what an indexer goes by."""
    graphs = Graphs()
    monkeypatch.setattr(batch, "capture", graphs)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"cpu"} if captured else set())
    model, processor, profile, queries = hybrid(name, seed)
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=24))
    assert len({at for _, _, at in expected} & {None, 0, 1, 2}) >= 3
    for batch_size, every in ((1, 1), (2, 3), (6, 8)):
        with SafeGenerator(model, processor, profile, batch_size=batch_size, sync_every=every) as guard:
            guard.plan._cuts = cut
            assert summary(guard.generate(*queries, max_new_tokens=24)) == expected
    assert graphs.replays > 3 * graphs.made > 0 or not captured


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_state_is_found_again_with_its_image(name, monkeypatch):
    """In the pool of another batch size, which has held none yet, and in one that held others'."""
    model, processor, profile, (prompts, images) = hybrid(name, 51)
    images = [images[0], images[1], images[0], images[0], images[1], images[1]]
    expected = summary(SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=8))
    with SafeGenerator(model, processor, profile, batch_size=4, cache_bytes=2**24) as guard:
        for _ in range(2):
            assert summary(guard.generate(prompts, images, max_new_tokens=8)) == expected
        assert guard.counters["cache_hits"] == 10
        assert 0 < guard.cache.nbytes <= 2**24


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_stages_that_share_nothing_start_from_no_state(name, monkeypatch):
    """A template that begins with how long the text will be."""
    model, processor, profile, queries = hybrid(name, 51)
    render = processor.apply_chat_template

    def apply(messages, **options):
        text = render(messages, **options)
        return f"w{20 + len(text) % 60} {text}"

    monkeypatch.setattr(processor, "apply_chat_template", apply)
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=8))
    with SafeGenerator(model, processor, profile, batch_size=3) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=8)) == expected
        assert guard.counters["not_shared"] >= 6


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_states_move_along_where_the_pool_grows(name, monkeypatch):
    model, processor, profile, queries = hybrid(name, 51)
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=8))
    monkeypatch.setattr("ras_fast.engine.workspace._bucket", lambda slots: slots)
    grown, own = [], Workspace.grown
    monkeypatch.setattr(Workspace, "grown", lambda self, slots: grown.append(slots) or own(self, slots))
    with SafeGenerator(model, processor, profile, batch_size=3) as guard:
        slots = guard.plan._slots
        monkeypatch.setattr(guard.plan, "_slots", lambda *args: (1, *slots(*args)[1:]))
        assert summary(guard.generate(*queries, max_new_tokens=8)) == expected
    assert len(grown) >= 2


def conditional(model, processor):
    direction, condition = torch.randn(2, SIZE)
    return from_vectors(model, processor, direction, alpha=4.0, layers=[2], condition=Condition(0, condition, threshold=0.0))


def attention(model, processor):
    weights = {"attention_weights": torch.randn(6) * 20, "attention_bias": torch.zeros(1), "prototypes": torch.randn(3, SIZE)}
    return RasProfile("attention", {"heads": [[1, 1], [2, 0]]}, weights, fingerprint(model, processor))


def autosteer(model, processor):
    shapes = {"in.weight": (8, SIZE), "in.bias": (8,), "out.weight": (2, 8), "out.bias": (2,)}
    tensors = {f"prober_{name}": torch.randn(shape) for name, shape in shapes.items()} | {"refusal": torch.randn(SIZE, SIZE)}
    return RasProfile("autosteer", {"layer": 1, "strength": 50.0, "threshold": 0.0}, tensors, fingerprint(model, processor))


@NEW
def test_autosteer_says_that_it_cannot_judge_several_lanes():
    model, processor, _ = built("hy_v4_vl")
    guard = SafeGenerator(model, processor, autosteer(model, processor))
    with guard, pytest.raises(ValueError, match=r"layer 1 is given states .* AutoSteer judges \[batch, tokens, hidden size\]"):
        guard.generate(["w20"], [random_image(0)], max_new_tokens=1)


@pytest.mark.parametrize("make", [conditional, attention, autosteer])
@pytest.mark.parametrize("name", sorted({"molmo2", "gemma4", "paligemma/gemma2"} & FAMILIES.keys()))
def test_one_pass_where_prompts_hold_more_than_pixels_or_layers_run_for_some_positions(name, make):
    """Molmo 2's inputs hold indices of patches; Gemma 4's last layers compute in `generate` what the head asks for alone;
    PaliGemma's tokens all see each other."""
    model, processor, _ = built(name)
    torch.manual_seed(3)
    profile = make(model, processor)
    queries = [random_words(60 + i, 3) for i in range(4)], [random_image(i) for i in range(4)]
    expected = attached(model, processor, profile, *queries)
    assert len({tuple(tokens) for tokens, _ in expected}) > 1
    for batch_size in (1, 4):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            outputs = guard.generate(*queries, max_new_tokens=NEW_TOKENS)
        assert [output.tokens for output in outputs] == [tokens for tokens, _ in expected]
        assert [output.risk for output in outputs] == pytest.approx([risk for _, risk in expected], abs=1e-4)


M_ROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "ernie4_5_vl_moe", "hunyuan_vl"]


@pytest.mark.parametrize("make", [conditional, attention, autosteer])
@pytest.mark.parametrize("name", sorted({*M_ROPE} & REAL.keys()))
def test_one_pass_where_images_have_positions_of_their_own(name, make, monkeypatch):
    """Prompts of several lengths, with no, one and two pictures of several sizes: those that can be are one forward."""
    model, processor, _ = with_profile(*with_processor(name))
    torch.manual_seed(3)
    profile = make(model, processor)
    shown = [[(32, 32)], [(48, 24)], [(24, 40), (32, 32)], [], [(64, 32)]]
    pictures = [[random_image(i).resize(size) for size in sizes] for i, sizes in enumerate(shown)]
    queries = [random_words(60 + i, 2 + i) for i in range(5)], pictures
    expected = attached(model, processor, profile, *queries)
    assert len({tuple(tokens) for tokens, _ in expected}) > 1
    forwards, prompts = [], batch.Batch.prompts
    monkeypatch.setattr(batch.Batch, "prompts", lambda *args: forwards.append(len(args[1])) or prompts(*args))
    with SafeGenerator(model, processor, profile) as guard:
        outputs = guard.generate(*queries, max_new_tokens=NEW_TOKENS)
    assert [output.tokens for output in outputs] == [tokens for tokens, _ in expected]
    assert [output.risk for output in outputs] == pytest.approx([risk for _, risk in expected], abs=1e-4)
    assert sorted(forwards) == ([1] * 5 if name == "hunyuan_vl" else [1, 4])


@pytest.mark.parametrize("make", [conditional, attention])
@pytest.mark.parametrize("name", sorted({"gemma3", "molmo2", "paligemma"} & FAMILIES.keys()))
def test_a_static_cache_under_a_mask_of_the_familys_own_is_no_padding(name, make):
    model, processor, _ = built(name)
    torch.manual_seed(3)
    profile, risks = make(model, processor), []
    inputs, _ = encode(processor, make_queries(["w20 w21"], [random_image(0)], processor)[0], "cpu", torch.float32)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with ras_fast.patch(model) as patch:
        for options in ({}, {"cache_implementation": "static"}):
            with attach(patch, profile) as method:
                model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
            assert not method.failed.any()
            risks.append(method.risk.item())
    assert risks[0] == pytest.approx(risks[1], abs=1e-5)


def test_prefixes_where_layers_share_the_keys_of_others():
    """Of an image that comes twice in a batch, and from the cache."""
    model, processor, profile = built("gemma4")
    queries = ["w20 w21", "w22", "w23 w24"], [random_image(0)] * 3
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=6))
    with SafeGenerator(model, processor, profile, batch_size=2, cache_bytes=10**7) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=6)) == expected
        assert guard.counters["cache_hits"] == 2


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_hybrid_answers_in_one_pass(name):
    """Prompts of several lengths, left-padded where the family can be, and a steered layer."""
    model, processor, _, queries = hybrid(name, 51)
    torch.manual_seed(3)
    direction, condition = torch.randn(2, SIZE)
    profile = from_vectors(
        model, processor, direction, alpha=4.0, layers=[1, 2], condition=Condition(0, condition, threshold=0.0)
    )
    expected = attached(model, processor, profile, *queries)
    assert {risk for _, risk in expected} == {0.0, 1.0}
    for batch_size in (1, 4):
        with SafeGenerator(model, processor, profile, batch_size=batch_size) as guard:
            outputs = guard.generate(*queries, max_new_tokens=NEW_TOKENS)
        assert [(output.tokens, output.risk) for output in outputs] == expected


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() & {
    "qwen3_5", "lfm2_vl", "nemotron_h_omni", "paligemma", "paligemma/gemma2", "mllama", "hy_v4_vl", "dots3_note"
}))  # fmt: skip
def test_a_step_takes_nothing_from_the_host(name, fused, monkeypatch):
    routes = "n_routed_experts" in FAMILIES[name].text  # by products that this device knows in bfloat16 alone
    model = FAMILIES[name].model(name, torch.bfloat16 if routes else torch.float32)
    model.config.get_text_config().final_logit_softcapping = None  # else a forward's values tell whether it is applied
    if fused:
        ras_fast.patch(model)
    to_meta(model)
    monkeypatch.setattr("ras_fast.engine.runner.CAPTURED", {"meta"})
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # does not know this device
    runner = Runner(model)
    steps = batch.Batch(runner, Workspace(runner.layers, 2, 48, 192, torch.device("meta"), 34 * runner.crosses))
    for layer in steps.pool.layers:
        if isinstance(layer, CrossLayer):  # two tiles of 17 patches
            layer.write(0, 0, *torch.zeros(2, 2, 34, 16, device="meta"))
    with torch.no_grad():
        branches = [steps.branch(kind, [None] * 2, [[1, 2, 3], [4, 5]], [0, 0]) for kind in (batch.SCRATCH, batch.ANSWER)]
        steps.forward(branches)
        with HostReads() as reads:
            steps._compute(branches, 192, 192, masked=True)
    assert reads.found == []


@pytest.mark.parametrize("fused", [False, True])
def test_windows_over_a_pool(fused):
    """Of 8 places. They hide nothing as long as no token is farther on, and where keys lie in order they are ranges."""
    model, key = FAMILIES["gemma3"].model("gemma3"), torch.arange(24)
    start, end = torch.tensor([[2, 2], [0, 5]]), torch.tensor([[3, 12], [9, 20]])

    def seen(mask):
        return _expand(mask, 2, 24, None)[:, 0] if is_range(mask) else mask[:, 0] == 0

    def far():
        return end[..., None] - 1 - key

    with ras_fast.patch(model) if fused else nullcontext():
        runner = Runner(model)
        near, in_order, any_order = (runner.masks(start, end, 24, *given) for given in ((8, far), (20, None), (20, far)))
    for masks in (near, in_order, any_order):
        assert torch.equal(seen(masks["full_attention"]), (key >= start[..., None]) & (key < end[..., None]))
        assert is_range(masks["sliding_attention"]) == (fused and masks is not any_order)
    assert torch.equal(seen(near["sliding_attention"]), seen(near["full_attention"]))
    within = (key >= end[..., None] - 8) & seen(near["full_attention"])
    assert torch.equal(seen(in_order["sliding_attention"]), within)
    assert torch.equal(seen(any_order["sliding_attention"]), within)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_forward_over_another_cache_is_not_cut_into_segments(name):
    """A user's own, in another thread, while the engine makes a step."""
    model, ids = FAMILIES[name].model(name), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        runner = Runner(model)
        pool = Workspace(runner.layers, 1, 8, 16, model.device).pool
        with recurrence.in_segments(runner.recurrences, pool):
            assert torch.equal(model(input_ids=ids).logits, expected)
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_a_forward_that_the_user_put_on_a_recurrence_is_run():
    model, processor, profile, queries = hybrid("qwen3_5", 47)
    module = model.model.language_model.layers[0].linear_attn
    own, calls = module.forward, []

    def louder(*args, **kwargs):
        calls.append(1)
        return 2 * own(*args, **kwargs)

    module.forward = louder
    expected = summary(SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=8))
    calls.clear()
    with SafeGenerator(model, processor, profile) as guard:
        assert summary(guard.generate(*queries, max_new_tokens=8)) == expected
    assert calls
    assert module.forward is louder


@pytest.mark.parametrize("name", ["qwen3_5", "llava", "mllama"])
def test_logits_under_autocast_are_as_close_as_its_dtype_lets_them_be(name):
    model, processor, profile = built(name)
    with torch.autocast("cpu", torch.bfloat16), SafeGenerator(model, processor, profile) as guard:
        (output,) = guard.generate(["w20 w21"], [random_image(0)], max_new_tokens=4)
    assert output.failed_closed is None


@pytest.mark.parametrize(("tower", "text"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_a_vision_tower_of_another_dtype(name, tower, text):
    """It comes first, so that transformers says its dtype for the model's."""
    family = FAMILIES[name]
    model = family.model(name, dtype=tower)
    find_decoder(model)[1].to(text)
    find_head(model).to(text)
    assert model.dtype == tower
    model, processor, profile = with_profile(model, FamilyProcessor(family, model))
    prompts, images = [random_words(700 + i, 2 + i) for i in range(3)], [random_image(0), random_image(1), None]
    expected = SequentialPipeline(model, processor, profile).generate(prompts, images, max_new_tokens=6)
    with SafeGenerator(model, processor, profile) as guard:
        outputs = guard.generate(prompts, images, max_new_tokens=6)
    for output, reference in zip(outputs, expected, strict=True):
        assert output.risk == pytest.approx(reference.risk, abs=0.02 if text is torch.bfloat16 else 1e-3)
        assert text is torch.bfloat16 or output.tokens == reference.tokens
