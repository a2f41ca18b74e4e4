import hashlib
import math
import sys
import tracemalloc
from dataclasses import replace

import pytest
import torch

from ras_fast.engine.batch import TENSOR_BYTES, Prefix
from ras_fast.engine.kv_cache import ENTRY_BYTES, ByteBoundedCache, KVPool
from ras_fast.regions import RegionMap


def states(rows, length, seed):
    torch.manual_seed(seed)
    return [(torch.randn(rows, 3, length, 4), torch.randn(rows, 3, length, 4)) for _ in range(2)]


def fed(pool, slots, seen, new, rows=slice(None)):
    """What attention sees of each layer when ``new`` is written into ``slots``, a list for each row."""
    pool.aim(torch.tensor(slots), seen, rows)
    return [pool.update(keys, values, layer) for layer, (keys, values) in enumerate(new)]


def test_a_forward_writes_its_slots_in_place_and_sees_its_window():
    pool = KVPool(["full_attention"] * 2, 2, 8)
    prompt = states(1, 3, seed=1)
    for (keys, values), (own_keys, own_values) in zip(fed(pool, [[4, 3, 2]], None, prompt, slice(1, 2)), prompt, strict=True):
        assert torch.equal(keys, own_keys)  # its own tokens alone, in their order
        assert torch.equal(values, own_values)
    assert (pool.get_seq_length(), pool.layers[0].get_mask_sizes(3)) == (0, (3, 0))
    address = pool.layers[0].keys.data_ptr()
    step = states(2, 2, seed=2)
    for layer, (keys, values) in enumerate(fed(pool, [[0, 5], [1, 7]], (0, 8), step)):
        assert torch.equal(keys[0][:, [0, 5]], step[layer][0][0])
        assert torch.equal(values[1][:, [1, 7]], step[layer][1][1])
        assert torch.equal(keys[1][:, [4, 3, 2]], prompt[layer][0][0])
        assert not keys[0, :, [1, 2, 3, 4, 6, 7]].any()
        assert not keys[1, :, [0, 5, 6]].any()
    assert pool.layers[0].keys.data_ptr() == address
    assert (pool.get_seq_length(), pool.layers[0].get_mask_sizes(2)) == (6, (8, 0))
    with pytest.raises(ValueError, match="holds 8 tokens and cannot take slots 0 to 9"):
        pool.aim(torch.tensor([[8]]), (0, 9))


def test_a_prefix_read_from_one_row_can_be_written_to_another_pool():
    pool, prompt = KVPool(["full_attention"] * 2, 1, 6), states(1, 4, seed=3)
    fed(pool, [[1, 2, 3, 4]], (1, 5), prompt)
    entry = pool.read(0, 1, 4)
    pool.layers[0].keys.zero_()
    other = KVPool(["full_attention"] * 2, 2, 9)
    other.write(1, 5, entry)
    for layer, (keys, values) in zip(other.layers, prompt, strict=True):
        assert torch.equal(layer.keys[1, :, 5:8], keys[0, :, :3])
        assert torch.equal(layer.values[1, :, 5:8], values[0, :, :3])
        assert not layer.keys[0].any()
        assert not layer.keys[1, :, :5].any()


def test_rows_move_to_the_front_and_a_grown_pool_holds_the_same():
    pool, prompt = KVPool(["full_attention"] * 2, 3, 6), states(3, 6, seed=4)
    fed(pool, [[*range(6)]] * 3, (0, 6), prompt)
    new = pool.grown(3)
    assert new.capacity == 9
    for layer, (keys, values) in zip(new.layers, prompt, strict=True):
        assert torch.equal(layer.keys[:, :, 3:], keys)
        assert torch.equal(layer.values[:, :, 3:], values)
        assert not layer.keys[:, :, :3].any()
    pool.keep_rows([0, 2])
    for layer, (keys, values) in zip(pool.layers, prompt, strict=True):
        assert torch.equal(layer.keys[:2], keys[[0, 2]])
        assert torch.equal(layer.values[:2], values[[0, 2]])
    pool.reset()
    assert not any(tensor.any() for layer in pool.layers for tensor in (layer.keys, layer.values))


def test_an_indexer_s_keys_lie_beside_those_that_it_chooses_among():
    pool, prompt, tokens = KVPool(["indexed_attention"] * 2, 3, 6), states(3, 2, seed=5), torch.randn(3, 2, 5)
    fed(pool, [[1, 2]] * 3, None, prompt)
    assert torch.equal(pool.update_indexer(tokens, 0), tokens)  # the second layer goes by what the first has chosen
    pool.aim(torch.tensor([[4], [3]]), (1, 6), slice(1, 3))
    seen = pool.update_indexer(step := torch.randn(2, 1, 5), 0)
    assert seen.shape == (2, 5, 5)
    assert torch.equal(seen[:, :2], tokens[1:])
    assert torch.equal(seen[[0, 1], [3, 2]], step[:, 0])
    entry = pool.read(1, 1, 5)
    assert [len(own) for own in entry] == [3, 2]
    new = pool.grown(2)
    assert torch.equal(new.layers[0].indexer_keys[:, 2:], pool.layers[0].indexer_keys)
    other = KVPool(["indexed_attention"] * 2, 1, 9)
    other.write(0, 3, entry)
    assert torch.equal(other.layers[0].indexer_keys[0, 3:7], torch.cat([tokens[1], torch.zeros(1, 5), step[0]]))
    other.clear(0, 5)
    assert torch.equal(other.layers[0].indexer_keys[0, 3:7], torch.cat([tokens[1], torch.zeros(2, 5)]))
    pool.keep_rows([0, 2])
    assert torch.equal(pool.layers[0].indexer_keys[1, 1:4], torch.cat([tokens[2], step[1]]))
    pool.reset()
    assert not pool.layers[0].indexer_keys.any()
    assert pool.layers[1].indexer_keys is None


def test_a_feed_that_is_longer_than_what_it_sees_follows_nothing():
    pool = KVPool(["full_attention"] * 2, 1, 4)
    fed(pool, [[0, 1, 3, 3, 3]], (0, 3), states(1, 5, seed=1))
    assert (pool.get_seq_length(), pool.layers[0].get_mask_sizes(5)) == (0, (3, 0))


def test_a_grown_pool_holds_the_keys_of_images():
    """A prefix that is read from it later is to have them."""
    pool, entry = KVPool(["cross_attention"], 2, 6, image_keys=4), [(torch.randn(3, 2, 5), torch.randn(3, 2, 5))]
    pool.write(1, 0, entry)
    new = pool.grown(3)
    assert new.read(0, 0, 0) == [None]
    for found, expected in zip(new.read(1, 0, 0)[0], entry[0], strict=True):
        assert torch.equal(found, expected)


def test_least_recently_used_goes_first_and_the_bound_holds():
    cache = ByteBoundedCache(100 + 2 * ENTRY_BYTES)
    for key in (b"a", b"b", b"c"):
        cache.put(key, key.upper(), 40)
        cache.get(b"a")
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c")) == (b"A", None, b"C")
    cache.put(b"huge", 1, 101 + ENTRY_BYTES)
    cache.put(b"a", b"again", 40)
    assert (len(cache), cache.nbytes, cache.get(b"a")) == (2, 80 + 2 * ENTRY_BYTES, b"A")
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_an_entry_as_large_as_the_limit_is_kept():
    cache = ByteBoundedCache(ENTRY_BYTES + 10)
    cache.put(b"too large", 1, 11)
    cache.put(b"fits", 2, 10)
    assert (cache.get(b"too large"), cache.get(b"fits")) == (None, 2)


def test_a_prefix_counts_all_that_it_keeps():
    states = [{("conv_states", 0): torch.zeros(3)}]
    prefix = Prefix(2, [(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), None], states, torch.zeros(1), None)
    assert prefix.nbytes == 32 + 32 + 12 + 4 + 4 * TENSOR_BYTES
    with_map = replace(prefix, regions=RegionMap(torch.zeros(1, 2, dtype=torch.int32), 1))
    assert with_map.nbytes == prefix.nbytes + 8 + TENSOR_BYTES


def test_no_limit_means_off():
    cache = ByteBoundedCache(0)
    cache.put(b"a", 1, 1)
    assert cache.get(b"a") is None


@pytest.mark.parametrize("limit", [-1, math.nan, math.inf, 1e6, "1GB", None])
def test_a_limit_that_bounds_nothing_is_refused(limit):
    with pytest.raises(ValueError, match=f"cache_bytes is {limit!r}; it needs to be an integer of at least 0"):
        ByteBoundedCache(limit)


def test_short_texts_take_no_more_than_the_limit():
    """Most of what they take is not their letters."""
    cache = ByteBoundedCache(100_000)
    tracemalloc.start()
    for i in range(1000):
        text = f"a short context {i}"
        cache.put(hashlib.sha256(text.encode()).digest(), text, sys.getsizeof(text))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 100 < len(cache) < 200
    assert taken < cache.nbytes <= cache.limit


def test_a_cache_that_is_off_keeps_not_even_an_empty_value():
    """An empty context has no bytes; kept without its image's hash it would be found for every other image."""
    cache = ByteBoundedCache(0)
    cache.put(b"context", "", 0)
    assert cache.get(b"context") is None
