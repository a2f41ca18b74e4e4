"""The attention and mask functions by themselves, against transformers' own."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from ras_fast import backend
from ras_fast.patching import attention as attention_module
from ras_fast.patching.attention import (
    STATE,
    _expand,
    attention,
    attention_mask,
    explicit_attention,
    explicit_mask,
    is_range,
    range_mask,
    sees_itself,
)
from ras_fast.patching.state import AttentionState, Collection, ModelState
from ras_fast.patching.tracking import Forward


class Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


class Tracker:
    forward, interrupted, attentions_asked = Forward(), False, False

    def __init__(self, ids, num_regions):
        self.keys = lambda batch, length: (ids, num_regions)


@pytest.fixture
def module():
    return Module().eval()


def qkv(length_q, length_k, batch=3, dim=8):
    generator = torch.Generator().manual_seed(length_q * 100 + length_k)
    shapes = ((batch, 4, length_q, dim), (batch, 2, length_k, dim), (batch, 2, length_k, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def padding(*starts, length):
    return torch.arange(length) >= torch.tensor(starts)[:, None]


PATTERNS = {"causal": (causal_mask_function, None), "sliding": (sliding_window_causal_mask_function(3), 3)}
# q_length, kv_length, q_offset, kv_offset, 2-D mask
GEOMETRIES = {
    "prefill": (6, 6, 0, 0, None),
    "left padding": (6, 6, 0, 0, padding(0, 2, 5, length=6)),
    "decode": (1, 6, 5, 0, padding(0, 2, 5, length=6)),
    "decode, no padding": (1, 6, 5, 0, padding(0, 0, 0, length=6)),
    "several tokens on a cache": (3, 8, 5, 0, padding(0, 2, 5, length=8)),
    "several tokens on a cache, no padding": (3, 8, 5, 0, None),
    "static cache, prefill": (4, 9, 0, 0, padding(0, 1, 2, length=4)),
    "static cache, decode": (1, 9, torch.tensor(5), 0, padding(0, 1, 2, length=6)),
    "static cache, no mask": (1, 9, torch.tensor(5), 0, None),
    "sliding cache": (1, 4, 9, 6, padding(0, 2, 8, length=10)),
    "nothing valid": (2, 4, 2, 0, padding(0, 4, 1, length=4)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_ranges_say_what_the_full_mask_says(pattern, geometry):
    function, window = PATTERNS[pattern]
    q_length, kv_length, q_offset, kv_offset, mask = GEOMETRIES[geometry]
    sizes = {"batch_size": 3, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    sizes |= {"mask_function": function, "attention_mask": mask}
    full = sdpa_mask(**sizes, allow_is_causal_skip=False)
    got = attention_mask(**sizes, local_size=window)
    assert got is None or is_range(got)
    assert (got is None) == (window is None and geometry in ("prefill", "decode, no padding"))
    if got is not None:
        assert torch.equal(_expand(got, q_length, kv_length, window).expand_as(full), full)


@pytest.mark.parametrize(("rows", "keys"), [(rows, keys) for keys in (2, 3, 4) for rows in range(1, keys + 1)])
def test_no_mask_only_where_transformers_gives_none_to_sdpa(rows, keys):
    """Or to a single token that sees every key. Such is the mask of a window of 3 keys as long as there are fewer."""
    sizes = {"batch_size": 1, "q_length": rows, "kv_length": keys, "q_offset": keys - rows}
    sizes |= {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    everything = rows == 1 and keys <= 3
    assert (attention_mask(**sizes) is None) == (sdpa_mask(**sizes) is None or everything)
    assert (explicit_mask(**sizes) is None) == everything


def test_an_explicit_mask_is_causal_whatever_the_module_says(module):
    query, key, value = qkv(6, 6)
    expected, _ = sdpa_attention_forward(module, query, key, value, torch.ones(6, 6, dtype=torch.bool).tril()[None, None])
    module.is_causal = False
    mask = explicit_mask(3, 6, 6, mask_function=causal_mask_function)
    assert torch.equal(explicit_attention(module, query, key, value, mask)[0], expected)
    module.is_causal = True
    nothing_hidden, _ = explicit_attention(module, query, key, value, None)
    assert torch.equal(nothing_hidden, sdpa_attention_forward(module, query, key, value, None, is_causal=False)[0])


def without_a_mask(length_q, length_k):
    """What SDPA lets the queries of a causal module see if it is given no mask."""
    return torch.ones(1, 1, length_q, length_k, dtype=torch.bool).tril(0 if length_q > 1 else length_k)


HOLES = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
SLIDING = sliding_window_causal_mask_function(2)


def with_images(*blocks, text=causal_mask_function):
    """Keys of a block see each other; −1: of none."""
    return or_masks(text, blockwise_overlay(torch.tensor([blocks] * 3)))


BLOCKS = with_images(-1, 0, 0, -1)
CHUNKS = chunked_causal_mask_function(2, torch.zeros(3, dtype=torch.long))
PACKED = and_masks(causal_mask_function, packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]] * 3)))
OWN_RANGES = {
    "right padding": (causal_mask_function, RIGHT),
    "right padding under a window": (SLIDING, RIGHT),
    "image": (BLOCKS, None),
    "image and left padding": (BLOCKS, padding(0, 1, 2, length=4)),
    "image and right padding": (BLOCKS, RIGHT),
    "image under a window": (with_images(-1, 0, 0, 0, text=SLIDING), None),
    "prefix": (with_images(0, 0, 0, 0), padding(0, 1, 2, length=4)),
    "two images": (with_images(0, 0, 1, 1), None),
    "chunks": (CHUNKS, None),
    "packed sequences": (PACKED, None),
    "nothing": (causal_mask_function, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()),
}


@pytest.mark.parametrize("given", OWN_RANGES)
def test_each_query_s_own_range(module, given):
    function, padded = OWN_RANGES[given]
    sizes = {"batch_size": 3, "q_length": 4, "kv_length": 4, "mask_function": function, "attention_mask": padded}
    full = sdpa_mask(**sizes, allow_is_causal_skip=False).expand(3, 1, 4, 4)
    got = attention_mask(**sizes, local_size=2 if "window" in given else None)
    assert is_range(got)
    assert torch.equal(_expand(got, 4, 4, None), full)
    own = torch.arange(4)
    assert torch.equal(sees_itself(got), full[:, 0, -1, -1])
    query, key, value = qkv(4, 4)
    out, _ = attention(module, query, key, value, got, sliding_window=2)  # which the mask has in it
    assert torch.equal(out, sdpa_attention_forward(module, query, key, value, full)[0])
    setattr(module, STATE, AttentionState(ModelState(Tracker(own.int().expand(3, 4), 4)), 0))
    _, mass = attention(module, query, key, value, got, sliding_window=2, output_attentions=True)
    scores = (query @ key.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~full, -torch.inf)
    assert (mass - scores.softmax(-1).nan_to_num(0)).abs().max() < 1e-6


@pytest.mark.parametrize("offset", [2, torch.tensor(2)], ids=str)
def test_right_padding_on_a_cache(offset):
    """Of which the first keys are gone, and which has room for one more."""
    padded = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    sizes = {"batch_size": 3, "q_length": 2, "kv_length": 4, "q_offset": offset, "kv_offset": 1}
    got = attention_mask(**sizes, mask_function=causal_mask_function, attention_mask=padded)
    assert got[:, 0].tolist() == [[[0, 2, 1], [0, 3, 2]], [[0, 2, 1], [0, 2, 2]], [[0, 1, 1], [0, 1, 2]]]
    assert sees_itself(got).tolist() == [True, False, False]
    left = attention_mask(**sizes, mask_function=causal_mask_function, attention_mask=padding(0, 2, 3, length=4))
    assert left.shape == (3, 1, 1, 2)
    assert sees_itself(left).all()
    callers = range_mask(torch.zeros(4, 2), torch.tensor([[2, 3], [2, 2], [1, 1], [1, 0]]))
    assert sees_itself(callers).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (causal_mask_function, HOLES),
        (with_images(0, -1, 0, -1), None),
        (bidirectional_mask_function, padding(0, 1, 2, length=4)),
        (lambda b, h, q, k: (k <= q) & (k != 1), None),
    ],
    ids=["holes", "images that see each other", "bidirectional", "someone's own"],
)
def test_what_is_no_range_stays_a_full_mask(function, mask):
    sizes = {"batch_size": 3, "q_length": 4, "kv_length": 4, "mask_function": function, "attention_mask": mask}
    got = attention_mask(**sizes)
    assert torch.equal(got, sdpa_mask(**sizes, allow_is_causal_skip=False))


def test_without_values_it_stays_a_full_mask():
    for mode, device in ((FakeTensorMode(), "cpu"), (nullcontext(), "meta")):
        with mode:
            mask = attention_mask(1, 4, 4, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 2), device=device)
        assert mask.shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (causal_mask_function, None),
        (sliding_window_causal_mask_function(3), 3),
        (BLOCKS, None),
        (CHUNKS, None),
        (lambda b, h, q, k: (k <= q) & (k != 1), None),
    ],
    ids=["causal", "sliding", "image blocks", "chunks", "someone's own"],
)
def test_in_a_graph_what_cannot_be_looked_into_stays_a_full_mask(function, window):
    torch._dynamo.reset()
    sizes = {"batch_size": 3, "q_length": 4, "kv_length": 4, "mask_function": function, "local_size": window}
    got = torch.compile(lambda: attention_mask(**sizes), fullgraph=True, backend="eager")()
    if function is causal_mask_function:
        assert got is None
    else:
        assert torch.equal(got, sdpa_mask(**sizes, allow_is_causal_skip=False))


SIZES = [(6, 6), (1, 6), (3, 8)]
MORE_QUERIES = (8, 3)  # as in cross-attention


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [(sizes, kind) for sizes in SIZES for kind in ("none", "range", "full", "additive")] + [(MORE_QUERIES, "none")],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str)
def test_output_and_mass(module, window, sizes, kind, options):
    length_q, length_k = sizes
    query, key, value = qkv(*sizes)
    starts = torch.tensor([0, 2, 4])
    ranges = range_mask(starts, torch.full((3,), length_k))
    full = _expand(ranges, length_q, length_k, window) if kind != "none" else without_a_mask(*sizes).expand(3, -1, -1, -1)
    additive = torch.zeros(full.shape).masked_fill(~full, -torch.inf)
    mask = {"none": None, "range": ranges, "full": full, "additive": additive}[kind]
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~full, -torch.inf)
    if "s_aux" in options:
        sink = options["s_aux"][:, None, None].expand(3, 4, length_q, 1)
        p = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        p = scores.softmax(-1).nan_to_num(0)
    expected = (p @ value.repeat_interleave(2, 1)).transpose(1, 2)
    ids = torch.randint(-1, 2, (3, length_k), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    sums = torch.stack([(p * (ids == r)[:, None, None]).sum(-1) for r in range(2)], -1)

    out, aux = attention(module, query, key, value, mask, scaling=0.3, sliding_window=window, **options)
    assert aux is None
    assert (out - expected).abs().max() < 1e-5

    model = ModelState(Tracker(ids, 2))
    setattr(module, STATE, AttentionState(model, 0))
    out, aux = attention(
        module, query, key, value, mask, scaling=0.3, sliding_window=window, output_attentions=True, **options
    )
    assert (out - expected).abs().max() < 1e-5
    assert (aux - sums).abs().max() < 1e-5

    for reduce in ("mean", "sum", "max"):
        model.collection = Collection(2, True, reduce, None)
        out, aux = attention(module, query, key, value, mask, scaling=0.3, sliding_window=window, **options)
        assert aux is None
        assert (out - expected).abs().max() < 1e-5
        assert (model.statistics.mass[0] - sums[:, :, -2:]).abs().max() < 1e-5
        wanted = p[:, :, -2:].amax(2) if reduce == "max" else getattr(p[:, :, -2:], reduce)(2)
        assert (model.statistics.scores[0] - wanted).abs().max() < 1e-5


def test_full_mask_statistics_in_chunks(module, monkeypatch):
    """The rows that a chunk boundary cuts are counted once."""
    query, key, value = qkv(7, 7)
    full = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    ids = torch.zeros(3, 7, dtype=torch.int32)
    model = ModelState(Tracker(ids, 1))
    model.collection = Collection(5, True, "sum", None)
    setattr(module, STATE, AttentionState(model, 0))
    results = []
    for chunk in (1 << 20, 2 * 3 * 4 * 7):
        monkeypatch.setattr("ras_fast.patching.attention._CHUNK", chunk)
        out, _ = attention(module, query, key, value, full)
        results.append((out, model.statistics.mass[0], model.statistics.scores[0]))
    for whole, parts in zip(*results, strict=True):
        assert (whole - parts).abs().max() < 1e-6
    assert (results[0][1] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("sizes", [*SIZES, MORE_QUERIES])
def test_no_mask_is_what_it_is_to_sdpa_bit_for_bit(module, sizes):
    query, key, value = qkv(*sizes)
    got, _ = attention(module, query, key, value, None, sliding_window=2)
    assert torch.equal(got, sdpa_attention_forward(module, query, key, value, None)[0])


def test_without_statistics_it_is_sdpa_bit_for_bit(module):
    query, key, value = qkv(6, 6)
    mask = range_mask(torch.tensor([0, 2, 5]), torch.full((3,), 6))
    got, _ = attention(module, query, key, value, mask)
    expected, _ = sdpa_attention_forward(module, query, key, value, _expand(mask, 6, 6, None))
    assert torch.equal(got, expected)


def test_the_mask_function_s_range_is_expanded_once_a_forward(module, monkeypatch):
    query, key, value = qkv(6, 6)
    calls = []
    monkeypatch.setattr("ras_fast.patching.attention._expand", lambda *args: calls.append(args) or _expand(*args))
    for window in (None, 3):
        mask = attention_mask(3, 6, 6, mask_function=causal_mask_function, attention_mask=padding(0, 2, 3, length=6))
        for _ in range(4):
            attention(module, query, key, value, mask, sliding_window=window)
    assert len(calls) == 2
    full = weakref.ref(attention_module._expand_once(mask, 6, 6, 3))
    del mask, calls[:]
    assert full() is None


def test_a_caller_s_range_is_not_remembered(module):
    query, key, value = qkv(6, 6)
    mask = range_mask(torch.tensor([0, 0, 0]), torch.full((3,), 6))
    before, _ = attention(module, query, key, value, mask)
    mask[..., 0] += 3
    after, _ = attention(module, query, key, value, mask)
    expected, _ = sdpa_attention_forward(module, query, key, value, _expand(mask, 6, 6, None))
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_a_copy_of_each_query_s_own_range_is_one(module):
    """It has lost its mark, and tells by its shape."""
    query, key, value = qkv(4, 6)
    own = range_mask(torch.tensor([[0, 1, 0, 2]] * 3), torch.tensor([[6, 2, 5, 3]] * 3))
    expected, _ = sdpa_attention_forward(module, query, key, value, _expand(own, 4, 6, None))
    for mask in (own, own.clone()):
        torch.testing.assert_close(attention(module, query, key, value, mask)[0], expected)


@pytest.mark.parametrize("additive", [False, True])
def test_keys_that_an_indexer_has_chosen(module, additive):
    """Of those that the mask shows; it may name hidden ones where there are too few."""
    query, key, value = qkv(3, 5)
    mask = torch.ones(3, 1, 3, 6, dtype=torch.bool).tril(2)
    indices = torch.stack([torch.randperm(5)[:3] for _ in range(9)]).view(3, 3, 3).int()
    seen = mask[..., :5] & torch.zeros(3, 3, 5, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    seen[0, 0, 0] = mask[0, 0, 0, :5] & (torch.arange(5) == 1)
    indices[0, 0] = torch.tensor([4, 1, 3])
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    got, _ = attention(module, query, key, value, given, indices=indices)
    expected = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    assert torch.equal(got, sdpa_attention_forward(module, query, key, value, expected)[0])
    with pytest.raises(ValueError, match="indices is given without a full attention_mask"):
        attention(module, query, key, value, None, indices=indices)


@pytest.mark.parametrize("name", ["position_bias", "cu_seq_lens_q", "cache", "head_mask", "block_indices", "sinks"])
def test_unsupported_keywords(module, name):
    with pytest.raises(ValueError, match=name):
        attention(module, *qkv(2, 2), None, **{name: torch.ones(1)})


def test_keywords_that_mean_nothing_to_attention(module):
    """Some families hand the inputs of their multimodal model down to every module."""
    given = dict.fromkeys(("pixel_values_videos", "image_grid_thw", "mm_token_type_ids", "position_ids"), torch.ones(1))
    out, _ = attention(module, *qkv(2, 2), None, block_indices=None, something=3, **given)
    assert torch.equal(out, attention(module, *qkv(2, 2), None)[0])
    setattr(module, STATE, AttentionState(ModelState(Tracker(torch.zeros(2, 2), 1)), 0))  # being tried, its heads not known yet
    with pytest.raises(ValueError, match=r"\w+ is given; attn_implementation='ras_fast' supports neither it"):
        attention(module, *qkv(2, 2), None, **given)


def test_dropout_and_training(module):
    with pytest.raises(ValueError, match=r"dropout is 0\.1"):
        attention(module, *qkv(2, 2), None, dropout=0.1)
    with pytest.raises(RuntimeError, match="training mode"):
        attention(module.train(), *qkv(2, 2), None)


def test_cross_attention_is_not_causal(module):
    query, key, value = qkv(3, 5)
    got, _ = attention(module, query, key, value, None, is_causal=False)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("starts", [None, (0, 2, 5)])
def test_a_decode_step_in_half_precision_is_as_accurate_as_sdpa(module, dtype, starts):
    query, key, value = (tensor.to(dtype) for tensor in qkv(1, 40))
    mask = None if starts is None else range_mask(torch.tensor(starts), torch.full((3,), 40))
    full = None if mask is None else _expand(mask, 1, 40, None)
    exact = sdpa_attention_forward(module, query.double(), key.double(), value.double(), full)[0]
    theirs = sdpa_attention_forward(module, query, key, value, full)[0]
    ours, _ = attention(module, query, key, value, mask)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    assert ours.is_contiguous()


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str)
def test_what_sdpa_lacks_is_computed_as_autocast_has_it(module, options):
    """Keys that were rotated in float32 come beside values in half precision."""
    query, key, value = qkv(6, 6)
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    expected, _ = attention(module, *half, None, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attention(module, query, key, half[2], None, **options)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_what_autocast_is_to_make_alike_is_left_to_sdpa(module):
    query, key, value = qkv(2, 40)
    own = range_mask(torch.zeros(3, 2), torch.tensor([[30, 31]] * 3))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attention(module, query, key, value.bfloat16(), own)
        expected, _ = sdpa_attention_forward(module, query, key, value.bfloat16(), _expand(own, 2, 40, None))
    assert torch.equal(got, expected)


def test_a_decode_step_in_float32_is_sdpa_bit_for_bit(module):
    query, key, value = qkv(1, 40)
    assert attention(module, query, key, value, None)[0].equal(sdpa_attention_forward(module, query, key, value, None)[0])


@pytest.mark.parametrize("length_q", [1, 2])
def test_ranges_of_each_query_s_own_take_the_decode_kernel(module, monkeypatch, length_q):
    """The engine's steps do, in float32 as well. A sequence's range, as left padding makes it, stays SDPA's bit for bit."""
    calls = []
    real = attention_module._region_attention
    monkeypatch.setattr(attention_module, "_region_attention", lambda *args: calls.append(1) or real(*args))
    query, key, value = qkv(length_q, 40)
    start, end = torch.tensor([0, 2, 5]), torch.full((3,), 30)
    prompt = attention_mask(3, 4, 4, mask_function=CHUNKS)  # transformers' own
    attention(module, *qkv(4, 4), prompt)
    assert not calls
    sequence = range_mask(start, end)
    own = range_mask(*(bound[:, None].expand(3, length_q) for bound in (start, end)))
    if length_q == 1:
        expected, _ = attention(module, query, key, value, sequence)
        assert not calls
        assert torch.equal(own, sequence)
    else:
        expected = sdpa_attention_forward(module, query, key, value, _expand(own, length_q, 40, None))[0]
    got, _ = attention(module, query, key, value, own)
    assert calls == ([1] if backend.resolve("decode_attention", query.device) == "cpu" else [])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
