"""The shipped checkpoint, through its own processor: patched is unpatched."""

import pytest
import torch
from tiny_models import image_sums, relative_error

import ras_fast
from ras_fast.evaluation import tinyworld
from ras_fast.loading import load


@pytest.fixture(scope="module")
def tiny():
    model, processor = load("tiny", device="cpu", dtype="float32")
    processor.tokenizer.padding_side = "left"
    return model, processor


def batches(processor, count, size):
    items = tinyworld.split("test", count)
    for start in range(0, count, size):
        part = items[start : start + size]
        contents = [[{"type": "image"}] * (item.image is not None) + [{"type": "text", "text": item.question}] for item in part]
        chats = [[{"role": "user", "content": content}] for content in contents]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [item.image for item in part if item.image is not None] or None
        yield processor(images=images, text=texts, padding=True, return_tensors="pt")


def test_greedy_tokens_of_fifty_prompts(tiny):
    model, processor = tiny
    options = {"max_new_tokens": 12, "do_sample": False}
    inputs = list(batches(processor, 50, 10))
    expected = [model.generate(**batch, **options) for batch in inputs]
    with ras_fast.patch(model) as patched:
        got = [model.generate(**batch, **options) for batch in inputs]
    assert all(map(torch.equal, got, expected))
    assert patched.report().fused_norms == 2 * patched.report().layers
    assert patched.report().unfused == {}


def test_logits_and_attentions(tiny):
    model, processor = tiny
    for batch in batches(processor, 8, 4):
        valid = batch["attention_mask"].bool()
        with torch.no_grad():
            model.set_attn_implementation({"text_config": "eager"})
            eager = model(**batch, output_attentions=True).attentions
            model.set_attn_implementation({"text_config": "sdpa"})
            expected = model(**batch).logits
            with ras_fast.patch(model) as patched:
                got = model(**batch, output_attentions=True)
                regions = patched.region_map
        assert relative_error(got.logits[valid], expected[valid]) < 1e-5
        assert regions.grids == [[(8, 8)] * bool((row == model.config.image_token_id).any()) for row in batch["input_ids"]]
        for mass, probabilities in zip(got.attentions, eager, strict=True):
            sums = image_sums(probabilities, regions.ids, regions.num_regions)
            assert (mass - sums).transpose(1, 2)[valid].abs().max() < 1e-5
