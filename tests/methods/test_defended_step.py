"""A decode step of a defended answer does what a CUDA graph can hold: it waits for nothing and copies nothing from the CPU.

Shown without a GPU: the step runs on the meta device, where no tensor has values and none made on the CPU is let in.
"""

import pytest
import torch
from tiny_random import endless_llava, mixed_batch
from transformers import StaticCache
from waits import Waits, without_values

import ras_fast
from ras_fast.fingerprint import fingerprint
from ras_fast.methods import projection
from ras_fast.methods.projection import Condition
from ras_fast.patching import range_mask
from ras_fast.profile import RasProfile

D = 32


@pytest.fixture(scope="module")
def model(processor):
    return endless_llava(processor, 3)


def autosteer(model, processor, **low_rank):
    """Of which some gates are on."""
    shapes = {"in.weight": (8, D), "in.bias": (8,), "out.weight": (2, 8), "out.bias": (2,)}
    tensors = {f"prober_{name}": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"refusal": torch.randn(D, D)} | low_rank
    return RasProfile("autosteer", {"layer": 1, "strength": 1.0, "threshold": 0.5}, tensors, fingerprint(model))


def low_rank_autosteer(model, processor):
    return autosteer(model, processor, refusal=torch.randn(D, 2), refusal_right=torch.randn(2, D))


def attention(model, processor):
    tensors = {
        "prototypes": torch.randn(3, D), "attention_weights": torch.randn(6), "attention_bias": torch.zeros(1),
    }  # fmt: skip
    return RasProfile("attention", {"heads": [[0, 1], [2, 3]]}, tensors, fingerprint(model))


def steering(per):
    def made(model, processor):
        condition = None if per is None else Condition(0, torch.randn(D), threshold=0.0, per=per)
        return projection.from_vectors(model, processor, torch.randn(D), layers=[1, 2], condition=condition)

    return made


METHODS = {
    "autosteer": autosteer,
    "autosteer of low rank": low_rank_autosteer,
    "attention": attention,
    "projection": steering(None),
    "projection by the prompt": steering("sequence"),
    "projection by the token": steering("token"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_defended_decode_step_waits_for_nothing(model, processor, name):
    torch.manual_seed(0)
    profile = METHODS[name](model, processor)
    batch = mixed_batch(processor)
    rows, length = batch["input_ids"].shape
    start = (batch["attention_mask"] == 0).sum(1)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 4)
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
        model(**batch, past_key_values=cache)
        step = {
            "input_ids": torch.full((rows, 1), 7), "position_ids": (length - start)[:, None],
            "attention_mask": range_mask(start, torch.full((rows,), length + 1)),
        }  # fmt: skip
        elsewhere, its_cache, its_step = without_values(model, cache, step)
        for layer in its_cache.layers:
            layer.device = elsewhere.device
        with Waits() as waits:
            logits = elsewhere(**its_step, past_key_values=its_cache).logits
        plain = model(**step, past_key_values=cache).logits
    assert waits.found == []
    assert logits.is_meta
    assert logits.shape == plain.shape
    assert method.risk.shape == (rows,)
