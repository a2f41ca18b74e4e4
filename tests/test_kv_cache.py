import pytest
import torch

from ras_fast.kv_cache import ByteBoundedCache, KVBuffer


def filled(rows, length, capacity, seed=0, starts=None):
    """A buffer of two layers whose first ``length`` slots are random."""
    torch.manual_seed(seed)
    buffer = KVBuffer(2, capacity, starts or [0] * rows)
    for layer in range(2):
        buffer.update(torch.randn(rows, 3, length, 4), torch.randn(rows, 3, length, 4), layer)
    return buffer


def test_update_writes_in_place_and_returns_what_is_filled():
    buffer = filled(2, 3, 5)
    address = buffer.layers[0].keys.data_ptr()
    new = torch.randn(2, 3, 2, 4)
    keys, values = buffer.update(new, -new, 0)
    assert keys.data_ptr() == address
    assert keys.shape == values.shape == (2, 3, 5, 4)
    assert torch.equal(keys[:, :, 3:], new)
    assert torch.equal(values[:, :, 3:], -new)
    assert buffer.layers[0].get_mask_sizes(1) == (6, 0)
    with pytest.raises(ValueError, match="holds 5 tokens and cannot take 6"):
        buffer.update(new[:, :, :1], new[:, :, :1], 0)


def test_branches_are_right_aligned_and_shorter_feeds_keep_their_tokens():
    long, short = filled(1, 6, 6, seed=1), filled(2, 4, 4, seed=2, starts=[0, 1])
    branch = KVBuffer.branch([(long, 0, 5), (short, 1, 3)], feeds=[1, 4], room=2)
    # Rows end up with 6 and 7 tokens; a chunk of 4 is fed into slots 3..6.
    assert branch.starts == [1, 0]
    assert branch.length == 3
    chunk = torch.randn(2, 3, 4, 4)
    branch.protect(torch.tensor([[False, False, False, True], [True] * 4]))
    for number, layer in enumerate(branch.layers):
        keys, values = branch.update(chunk, -chunk, number)
        assert keys.shape[2] == 7
        assert layer.capacity == 9
        assert torch.equal(keys[0, :, 1:6], long.layers[number].keys[0, :, :5])
        assert torch.equal(values[0, :, 1:6], long.layers[number].values[0, :, :5])
        assert torch.equal(keys[0, :, 6], chunk[0, :, 3])
        assert torch.equal(keys[0, :, 0], torch.zeros(3, 4))
        assert torch.equal(keys[1, :, :3], short.layers[number].keys[1, :, 1:4])
        assert torch.equal(values[1, :, 3:], -chunk[1])
    branch.protect(None)
    assert branch.nbytes == 2 * 2 * 2 * 3 * 9 * 4 * 4


def test_least_recently_used_goes_first_and_the_bound_holds():
    cache = ByteBoundedCache(100)
    for key in "abc":
        cache.put(key, key.upper(), 40)
        cache.get("a")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("A", None, "C")
    cache.put("huge", 1, 101)
    cache.put("a", "again", 40)
    assert (len(cache), cache.nbytes, cache.get("a")) == (2, 80, "A")
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_no_limit_means_off():
    cache = ByteBoundedCache(0)
    cache.put("a", 1, 1)
    assert cache.get("a") is None
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        ByteBoundedCache(-1)


def test_a_cache_that_is_off_keeps_not_even_an_empty_value():
    """An empty context has no bytes; kept without its image's hash it would be found for every other image."""
    cache = ByteBoundedCache(0)
    cache.put("context", "", 0)
    assert cache.get("context") is None
