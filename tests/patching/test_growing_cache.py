"""Caches that grow in place hold what transformers' own would, whatever else is done to them, and models answer the same."""

import copy
import pickle
import random
import weakref

import pytest
import torch
from tiny_models import inputs, llava
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import ras_fast
from ras_fast.patching import growing_cache
from ras_fast.patching.cache_values import cache_name, returned_cache
from ras_fast.patching.growing_cache import growing

GROWING = growing(DynamicLayer)
SHAPE = 2, 3, 5, 4  # batch, heads, tokens, dimension
WINDOWS = None, 1, 2, 7, 40  # None: a layer that sees all tokens


@pytest.fixture
def however_small(monkeypatch):
    """Caches of every size grow in place."""
    monkeypatch.setitem(growing_cache._WORTH, "cpu", 1)


def states(tokens=1, shape=SHAPE, **options):
    return torch.randn(*shape[:2], tokens, shape[3], **options)


def layer(kind=GROWING, updates=3):
    result = kind()
    result.update(states(SHAPE[2]), states(SHAPE[2]))
    for _ in range(updates - 1):
        result.update(states(), states())
    return result


def pair(window):
    """A growing layer and transformers' own."""
    if window is None:
        return GROWING(), DynamicLayer()
    return growing(DynamicSlidingWindowLayer)(window), DynamicSlidingWindowLayer(window)


def memory(cache_layer):
    return cache_layer.keys.untyped_storage().data_ptr()


def room_of(cache_layer):
    return getattr(cache_layer.keys, growing_cache._ROOM)


# The layer


def test_tokens_are_written_behind_those_that_are_there():
    grown = layer()
    places = {memory(grown)}
    before = grown.keys.clone()
    for _ in range(40):
        new = states()
        keys, _ = grown.update(new, states())
        places.add(memory(grown))
        assert torch.equal(keys[:, :, -1:], new)
    assert len(places) == 1
    assert torch.equal(grown.keys[:, :, : before.shape[2]], before)


@pytest.mark.parametrize("window", WINDOWS)
def test_room_is_made_once_more_where_it_ends(window):
    grown, plain = pair(window)
    rooms = {}
    for _ in range(300):
        new = states(2), states(2)
        assert_close(grown.update(*new), plain.update(*new), rtol=0, atol=0)
        assert_close((grown.keys, grown.values), (plain.keys, plain.values), rtol=0, atol=0)
        room = room_of(grown)
        rooms[id(room)] = room
    assert 5 < len(rooms) < 12


OPERATIONS = ["update"] * 6 + ["crop", "reorder", "repeat", "select", "copy", "scale", "reset"]


def changed(it, kind, seed):
    """The layer after an operation; where it cannot be, after an update."""
    draw, rows = torch.Generator().manual_seed(seed), it.keys.shape[0] if it.is_initialized else 0
    few = 1 + seed % 3
    if kind == "crop" and few < it.get_seq_length() < getattr(it, "sliding_window", 10**9):
        it.crop(-few)
    elif kind == "reorder" and rows:
        it.reorder_cache(torch.randint(rows, (rows,), generator=draw))
    elif kind == "repeat" and rows == 2:
        it.batch_repeat_interleave(2)
    elif kind == "select" and rows == 4:
        it.batch_select_indices(torch.tensor([2, 1]))
    elif kind == "copy":
        return copy.deepcopy(it)
    elif kind == "scale" and rows:
        it.keys = it.keys * 2
    elif kind == "reset":
        it.reset()
    else:
        new = torch.randn(rows or 2, 3, few, 4, generator=draw)
        it.update(new, -new)
    return it


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_operations_leaves_the_same(window, seed):
    """Also in what was handed out before, which nothing but a reset may write into: in older versions that writes zeros."""
    grown, plain = pair(window)
    handed_out = []
    draw = random.Random(seed)
    for turn in range(200):
        kind = draw.choice(OPERATIONS)
        grown, plain = changed(grown, kind, turn), changed(plain, kind, turn)
        if type(grown) is type(plain):  # as copies are, until a model is given them
            grown.__class__ = growing(type(plain))
        assert grown.get_seq_length() == plain.get_seq_length()
        handed_out = [] if kind == "reset" else handed_out[-30:]
        if plain.is_initialized:
            handed_out += [(grown.keys, plain.keys.clone()), (grown.values, plain.values.clone())]
        for got, expected in handed_out:
            assert torch.equal(got, expected)


def _swap(it):
    it.keys, it.values = it.values, it.keys


@pytest.mark.parametrize(
    "put",
    [
        lambda it: setattr(it.keys, "data", it.keys.data * 2),
        lambda it: setattr(it.values, "data", it.values.data[:, :, 1:]),
        lambda it: it.keys.set_(2 * it.keys),
        _swap,
    ],
    ids=["keys", "values", "set_", "swap"],
)
def test_what_is_put_into_its_tensors_counts(put):
    grown, plain = pair(None)
    for _ in range(4):
        new = states(), states()
        grown.update(*new), plain.update(*new)
    for each in (grown, plain):
        put(each)
    for _ in range(3):
        new = states(), states()
        assert_close(grown.update(*new), plain.update(*new), rtol=0, atol=0)


def test_two_layers_with_the_same_tensors_do_not_write_into_each_other():
    first, second = layer(), layer()
    second.keys, second.values = first.keys, first.values
    new, other = states(), states()
    first.update(new, new)
    second.update(other, other)
    assert torch.equal(first.keys[:, :, -1:], new)
    assert torch.equal(second.keys[:, :, -1:], other)
    assert memory(first) != memory(second)


def test_what_was_cut_off_is_not_overwritten():
    grown = layer()
    whole, cut = grown.keys, grown.keys.clone()
    grown.crop(-2)
    grown.update(states(2), states(2))
    assert torch.equal(whole, cut)


@pytest.mark.skipif(not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"), reason="transformers cannot record it")
def test_what_a_window_leaves_behind_is_recorded_where_it_may_be_gone_back_to():
    """As after guessed tokens."""
    layers, given = pair(7), [(states(tokens), states(tokens)) for tokens in (10, 1, 4, 1)]
    for each in layers:
        for new in given[:2]:
            each.update(*new)
        each.activate_past_recording()
        each.update(*given[2])
        each.crop(-3)
    (grown, _), (own, _) = (each.update(*given[3]) for each in layers)
    assert torch.equal(grown, own)


def test_beams_make_no_room():
    grown = layer(updates=1)
    for _ in range(4):
        grown.reorder_cache(torch.tensor([1, 1]))
        grown.update(states(), states())
        assert grown.keys.is_contiguous()


@pytest.mark.parametrize(
    "leave",
    [lambda it: it.reorder_cache(torch.tensor([1, 0])), lambda it: it.batch_repeat_interleave(2)],
    ids=["reorder", "repeat"],
)
def test_no_memory_stays_where_the_tensors_went(leave):
    """A room is held by what lies in it alone."""
    grown = layer()
    room = weakref.ref(room_of(grown))
    assert room() is not None
    leave(grown)
    assert room() is None


def test_what_cannot_be_written_behind_is_what_it_is_to_transformers():
    grown = layer()
    keys, _ = grown.update(states(dtype=torch.float64), states(dtype=torch.float64))
    assert keys.dtype == torch.float64
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer().update(states(shape=(1, *SHAPE[1:])), states(shape=(1, *SHAPE[1:])))
    grown = layer()
    new = states(requires_grad=True)
    squares = grown.update(new, new)[0].square().sum()
    grown.update(states(), states())
    squares.backward()
    assert torch.equal(new.grad, 2 * new)


def test_what_autograd_has_saved_is_not_written_to():
    """As where a query alone is asked for gradients."""
    grown, query = layer(), states(requires_grad=True)
    keys, _ = grown.update(states(), states())
    scores = (query * keys).sum()
    grown.update(states(), states())
    scores.backward()
    assert torch.allclose(query.grad, keys.sum(2, keepdim=True))


def test_inference_mode_may_end_between_two_tokens():
    with torch.inference_mode():
        grown = layer()
    before = grown.keys.clone()
    with torch.no_grad():
        grown.update(states(), states())
    with torch.inference_mode():
        grown.update(states(), states())
    assert torch.equal(grown.keys[:, :, : before.shape[2]], before)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_are_plain_layers(duplicate):
    grown = layer()
    before = grown.keys.clone()
    other = duplicate(grown)
    assert type(other) is DynamicLayer
    assert other.keys.untyped_storage().nbytes() == other.keys.nbytes  # no more, such as what was in memory before
    assert not hasattr(other.keys, growing_cache._ROOM)
    for each in (other, grown):
        new = states()
        each.update(new, new)
        assert torch.equal(each.keys, torch.cat([before, new], 2))


# Models


def kinds(past):
    return {type(each) for each in past.layers}


def step(model, past, **options):
    with torch.no_grad():
        return model(torch.tensor([[1]]), **{cache_name(model): past}, **options)


@pytest.mark.usefixtures("however_small")
def test_the_caches_of_a_patched_model():
    model = llava()
    with ras_fast.patch(model, caches=False):
        past = returned_cache(step(model, DynamicCache()))
        step(model, past)
        assert kinds(past) == {DynamicLayer}
    with ras_fast.patch(model):
        past = returned_cache(step(model, None, use_cache=True))
        step(model, past)
        assert kinds(past) == {GROWING}
        step(model, past)
        before = memory(past.layers[0])
        step(model, past)
        assert memory(past.layers[0]) == before
    step(model, past)  # goes on after unpatch
    assert past.get_seq_length() == 5


def test_small_caches_stay_as_they_are():
    model = llava()
    with ras_fast.patch(model):
        past = returned_cache(step(model, None, use_cache=True))
        step(model, past)
    assert kinds(past) == {DynamicLayer}


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}],
    ids=str,
)
def test_answers_are_the_same(options):
    model, batch = llava(), inputs(["ttItttt"])
    options = {"max_new_tokens": 90, "do_sample": False, "return_dict_in_generate": True} | options
    answers = []
    for caches in (False, True):
        with ras_fast.patch(model, caches=caches):
            torch.manual_seed(0)
            answers.append(model.generate(**batch, **options))
    expected, got = answers
    assert got.sequences.shape[1] == expected.sequences.shape[1] >= 90
    assert torch.equal(got.sequences, expected.sequences)
    assert GROWING in kinds(got.past_key_values)


@pytest.mark.usefixtures("however_small")
def test_a_prompt_that_many_questions_share():
    model = llava()
    with ras_fast.patch(model), torch.no_grad():
        past = returned_cache(model(torch.tensor([[1, 2, 3]]), use_cache=True))
        for _ in range(3):
            step(model, past)
        assert kinds(past) == {GROWING}
        branches = [copy.deepcopy(past) for _ in range(2)]
        for branch in branches:
            for token in (4, 5, 6):
                logits = model(torch.tensor([[token]]), **{cache_name(model): branch}).logits
        fresh = model(torch.tensor([[1, 2, 3, 1, 1, 1, 4, 5, 6]])).logits[:, -1:]
    assert_close(logits, fresh, rtol=1e-5, atol=1e-5)
    assert past.get_seq_length() == 6


@pytest.mark.usefixtures("however_small")
def test_statistics_and_steering_follow():
    model, batch = llava(), inputs(["ttItttt"])
    options = {"max_new_tokens": 6, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    masses = []
    for caches in (False, True):
        with ras_fast.patch(model, caches=caches):
            masses.append(model.generate(**batch, **options).attentions)
    for expected, got in zip(*masses, strict=True):
        assert_close(got, expected, rtol=0, atol=1e-6)
