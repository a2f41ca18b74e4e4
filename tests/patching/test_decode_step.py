"""A decode step does what a CUDA graph can hold: it waits for nothing, and a new risk needs no new graph.

Shown without a GPU; the capture itself needs one: tests/cuda/test_patch_cuda.py.
"""

import pytest
import torch
from families import FAMILIES
from transformers import StaticCache
from waits import Waits, without_values

import ras_fast
from ras_fast.patching import Patch, range_mask

SIZE = 64


def test_what_waits_is_noticed():
    gpu = torch.ones(2, device="meta")
    with Waits() as waits:
        torch.ones(1).item()
        torch.ones(2).nonzero()
        torch.ones(2)[torch.tensor([True, False])]
        gpu.copy_(torch.ones(2))
        torch.ones(2).to(gpu.device)
        torch.tensor([1.0, 2.0], device=gpu.device)
        gpu.new_tensor([1.0, 2.0])
        assert len(waits.found) == 7
        torch.ones(2)[torch.tensor([1, 0])]
        gpu[torch.arange(2, device=gpu.device)].to(torch.float16)
    assert len(waits.found) == 7
    with pytest.raises(RuntimeError, match="meta"):
        gpu.tolist()
    with pytest.raises(RuntimeError, match="device"):
        gpu + torch.ones(2)


# Not Mllama, whose cross-attention has a static cache that generate() lays out, nor those whose indexers read the mask.
NOT_BY_HAND = {"mllama", "hy_v4_vl", "mistral_large4", "dots3_note"}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pixels and name not in NOT_BY_HAND])
def test_a_decode_step_waits_for_nothing(name):
    """On a static cache, steered and with statistics; the mask and the rows to steer are persistent tensors.

    The step runs where no tensor has values and none made on the CPU is let in: on the meta device.
    """
    description = FAMILIES[name]
    model = description.model(name, torch.bfloat16)
    batch = description.inputs(model, ["ttItttt", "tItt"], dtype=model.dtype)
    batch.pop("regions")
    length = batch["input_ids"].shape[1]
    start = (batch["attention_mask"] == 0).sum(1)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        first, second, *_ = filter(patched.steers, range(len(patched.layers)))
        heads = patched.head_counts
        patched.set_steering(second, torch.randn(2, SIZE))
        patched.set_steering("final", torch.randn(2, SIZE))
        patched.set_region_bias({min(heads): torch.ones(heads[min(heads)])})
        patched.set_probe(first, torch.randn(1, SIZE), lambda dots: None)
        patched.steering.set_rows(torch.tensor([0, -1]), torch.tensor([0.5, 0.5]))
        model(**batch, past_key_values=cache)
        mask = range_mask(start, torch.full((2,), length + 1))
        step = {"input_ids": torch.tensor([[5], [6]]), "position_ids": (length - start)[:, None], "attention_mask": mask}
        model, cache, step = without_values(model, cache, step)
        for layer in cache.layers:
            layer.device = model.device
        with Waits() as waits, Patch.of(model).collect(scores=True) as statistics:
            logits = model(**step, past_key_values=cache).logits
    # A full sliding window of transformers' makes an index from a number: torch.compile captures such a step, a caller cannot.
    assert [found for found in waits.found if "cache_utils.py" not in found] == []
    assert logits.is_meta
    assert {layer: mass.shape for layer, mass in statistics.mass.items()} == {layer: (2, n, 1, 1) for layer, n in heads.items()}
