"""What is kept on a KV cache follows its rows."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny_models import inputs, llava
from torch import nn
from transformers import DynamicCache, StaticCache

import ras_fast
from ras_fast.methods.prompt_state import ModelCheck, PromptState
from ras_fast.patching.cache_values import Rows, cache_name, given_cache, keep, kept, returned_cache
from ras_fast.patching.tracking import REGIONS
from ras_fast.regions import RegionMap


def cache(rows: int = 3, length: int = 5) -> DynamicCache:
    past = DynamicCache()
    past.update(torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 4), 0)
    return past


def gate(past) -> list[int]:
    return kept(past, "gate").tensor.tolist()


def test_values_of_several_names_follow_the_rows():
    past = cache()
    kind = type(past)
    assert kept(past, "gate") is None
    keep(past, "gate", Rows(torch.tensor([0, 1, 2])))
    keep(past, REGIONS, RegionMap(torch.tensor([[0] * 5, [-1] * 5, [1] * 5], dtype=torch.int32), 2))
    keep(past, "nothing", None)
    assert isinstance(past, kind)
    past.reorder_cache(torch.tensor([2, 0, 0]))
    assert gate(past) == [2, 0, 0]
    past.batch_repeat_interleave(2)
    assert gate(past) == [2, 2, 0, 0, 0, 0]
    past.batch_select_indices(torch.tensor([0, 5]))
    assert gate(past) == [2, 0]
    assert kept(past, REGIONS).ids[:, 0].tolist() == [1, 0]
    past.batch_select_indices(torch.tensor([False, True]))
    past.crop(-2)
    assert gate(past) == [0]
    assert kept(past, REGIONS).ids.tolist() == [[0, 0, 0]]
    assert kept(past, "nothing") is None
    past.reset()
    assert kept(past, "gate") is kept(past, REGIONS) is None


def test_keys_follow_as_those_of_any_cache():
    past = cache()
    plain = copy.deepcopy(past)
    keep(past, "gate", Rows(torch.tensor([0, 1, 2])))
    for name, argument in {
        "reorder_cache": torch.tensor([2, 0, 0]), "batch_repeat_interleave": 2, "batch_select_indices": torch.tensor([0, 5]),
        "crop": -2,
    }.items():  # fmt: skip
        for each in (past, plain):
            getattr(each, name)(argument)
        assert torch.equal(past.layers[0].keys, plain.layers[0].keys)
        assert torch.equal(past.layers[0].values, plain.layers[0].values)
    for each in (past, plain):
        each.reset()
    assert past.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_the_name_of_any_version(name):
    past = cache()
    assert given_cache({name: past, "use_cache": True}) is past
    assert given_cache({name: None}) is given_cache({name: object()}) is None
    assert returned_cache(SimpleNamespace(**{name: past})) is past
    assert returned_cache((torch.ones(1),)) is None


def test_a_model_whose_cache_has_another_name_is_not_defended():
    class Renamed(nn.Module):
        def forward(self, input_ids, memory=None):
            return input_ids

    assert cache_name(llava().model) in ("cache", "past_key_values")
    with pytest.raises(ValueError, match="takes no KV cache by the name"):
        cache_name(Renamed())


def test_a_cache_can_be_stored(tmp_path):
    past = cache()
    keep(past, "gate", Rows(torch.tensor([0, 1, 2])))
    again = pickle.loads(pickle.dumps(past))
    again.reorder_cache(torch.tensor([2, 1, 0]))
    assert (gate(past), gate(again)) == ([0, 1, 2], [2, 1, 0])
    torch.save(past, tmp_path / "cache.pt")
    stored = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert torch.equal(stored.layers[0].keys, past.layers[0].keys)
    assert stored.get_seq_length() == 5
    assert gate(copy.deepcopy(stored)) == [0, 1, 2]


def test_crop_by_a_keyword():
    past = cache()
    name = next(iter(inspect.signature(past.crop).parameters))
    keep(past, REGIONS, RegionMap(torch.zeros(3, 5, dtype=torch.int32), 1))
    past.crop(**{name: -2})
    assert kept(past, REGIONS).ids.shape == (3, past.get_seq_length())


def test_copies_part_ways():
    past = cache()
    keep(past, "gate", Rows(torch.tensor([0, 1, 2])))
    deep, shallow = copy.deepcopy(past), copy.copy(past)
    past.reorder_cache(torch.tensor([2, 1, 0]))
    assert (gate(past), gate(deep), gate(shallow)) == ([2, 1, 0], [0, 1, 2], [0, 1, 2])
    keep(shallow, "gate", None)
    assert gate(past) == [2, 1, 0]


def test_rows_of_any_shape():
    rows = Rows(torch.arange(6).view(3, 2))
    assert rows.select(torch.tensor([2, 2])).tensor.tolist() == [[4, 5], [4, 5]]
    assert rows.repeat_interleave(2).tensor[:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert rows.crop(1) is rows


@pytest.mark.parametrize("own_cache", [False, True])
def test_a_prompt_is_decided_once(own_cache):
    """Whether the caller brings the cache or the model makes one."""
    model, batch, prompts = llava(layers=2), inputs(["tItt", "tIttt"]), []
    past = DynamicCache() if own_cache else None

    def decide(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if state.value is None:
            prompts.append(kwargs["hidden_states"].shape if "hidden_states" in kwargs else args[0].shape)
            state.decide(Rows(torch.tensor([7, 8])))

    state = PromptState(ModelCheck(SimpleNamespace(check=lambda model: None)), "gate")
    with ras_fast.patch(model) as patched, torch.no_grad():
        with state.watch(patched), patched.layers[1].register_forward_pre_hook(decide, with_kwargs=True):
            past = model(**batch, past_key_values=past, use_cache=True).past_key_values
            past.reorder_cache(torch.tensor([1, 0]))
            mask = torch.ones(2, batch["input_ids"].shape[1] + 1, dtype=torch.long)
            model(input_ids=torch.full((2, 1), 5), attention_mask=mask, past_key_values=past)
            assert state.value.tensor.tolist() == [8, 7]
            assert len(prompts) == 1
            model(**batch)  # another cache
        assert len(prompts) == 2
        model(**batch)
    assert len(prompts) == 2
    assert not patched.layers[1]._forward_pre_hooks


def test_a_static_cache_that_is_used_again_starts_afresh():
    model, batch, seen = llava(layers=2), inputs(["tItt"]), []

    def decide(module: nn.Module, args: tuple) -> None:
        seen.append(state.value is None)
        if state.value is None:
            state.decide(Rows(torch.zeros(1)))

    state = PromptState(ModelCheck(SimpleNamespace(check=lambda model: None)), "gate")
    past = StaticCache(model.config.text_config, max_cache_len=64)
    with ras_fast.patch(model) as patched, state.watch(patched):
        handle = patched.layers[0].register_forward_pre_hook(decide)
        for _ in range(2):
            model.generate(**batch, past_key_values=past, max_new_tokens=3, do_sample=False)
            past.reset()
        handle.remove()
    assert seen == [True, False, False] * 2
