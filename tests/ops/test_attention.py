"""Attention and its statistics: the CPU path and the reference against an explicit float64 loop-free twin."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import ras_fast
from ras_fast import ops
from ras_fast.ops import attention_cpu, attention_reference
from ras_fast.ops.attention_plan import Plan

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(batch=2, heads=4, kv_heads=2, length_q=9, length_k=9, dim=16, dtype=torch.float32):
    shapes = ((batch, heads, length_q, dim), (batch, kv_heads, length_k, dim), (batch, kv_heads, length_k, dim))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def image_ids(batch, length, regions=2):
    """Two "images" of contiguous tokens in each row, text around them."""
    ids = torch.full((batch, length), -1, dtype=torch.int32)
    for region in range(regions):
        start = 1 + region * (length - 1) // regions
        ids[:, start : start + max(1, (length - 2) // (2 * regions))] = region
    return ids


def exact(query, key, value, ids, regions, *, scale=None, is_causal=True, kv_start=None, kv_end=None, window=None,
          softcap=None, sinks=None, region_bias=None):  # fmt: skip
    """Every row on its own, in float64, from the definition: (out, lse, mass, p)."""
    batch, heads, length_q, dim = query.shape
    length_k, group = key.shape[2], heads // key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, length_q, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, length_q), -torch.inf, dtype=torch.float64)
    p = torch.zeros(batch, heads, length_q, length_k, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length_q):
                start, end = (
                    blank if bound is None else int(bound[b] if bound.dim() == 1 else bound[b, i])
                    for bound, blank in ((kv_start, 0), (kv_end, length_k))
                )
                own = i + end - length_q
                high = min(end, own + 1) if is_causal else end
                low = max(start, own - window + 1) if window else start
                seen = torch.arange(low, max(low, high))
                s = query[b, h, i].double() @ key[b, h // group, seen].double().T * scale
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                if region_bias is not None:
                    table = (region_bias if region_bias.dim() == 2 else region_bias[b])[h].double()
                    region = ids[b, seen].long()
                    s = s + torch.where(region >= 0, table[region.clamp(min=0)], 0)
                logits = torch.cat([s, sinks[h : h + 1].double()]) if sinks is not None else s
                if logits.numel():
                    lse[b, h, i] = torch.logsumexp(logits, 0)
                    p[b, h, i, seen] = torch.exp(s - lse[b, h, i])
                    out[b, h, i] = p[b, h, i, seen] @ value[b, h // group, seen].double()
    one_hot = (ids[..., None] == torch.arange(regions)).double() if ids is not None else p.new_zeros(batch, length_k, 0)
    return out, lse, torch.einsum("bhqk,bkr->bhqr", p, one_hot), p


def options(name, batch, heads, length_k, regions):
    int32 = {"dtype": torch.int32}
    return {
        "plain": {},
        "scale": {"scale": 0.4},
        "negative_scale": {"scale": -0.3},
        "no_scale": {"scale": 0.0},
        "bidirectional": {"is_causal": False},
        "left_padding": {"kv_start": torch.arange(batch, **int32) * 2},
        "static_cache": {"kv_end": length_k - torch.arange(batch, **int32)},
        "both_ends": {"kv_start": torch.arange(batch, **int32), "kv_end": length_k - torch.ones(batch, **int32)},
        "window": {"window": 3},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(heads)},
        "bias": {"region_bias": torch.randn(heads, regions)},
        "batched_bias": {"region_bias": torch.randn(batch, heads, regions), "softcap": 5.0, "sinks": torch.randn(heads)},
    }[name]


OPTIONS = ["plain", "scale", "negative_scale", "no_scale", "bidirectional", "left_padding", "static_cache", "both_ends",
           "window", "softcap", "sinks", "bias", "batched_bias"]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lengths", [(9, 9), (1, 9), (4, 9), (34, 36)])
def test_against_definition(backend, lengths, option, dtype):
    query, key, value = inputs(length_q=lengths[0], length_k=lengths[1], dtype=dtype)
    ids = image_ids(2, lengths[1])
    kwargs = options(option, 2, 4, lengths[1], 2)
    out, lse, mass = ops.region_attention(query, key, value, ids, 2, **kwargs)
    exact_out, exact_lse, exact_mass, p = exact(query, key, value, ids, 2, **kwargs)
    assert out.dtype == dtype
    assert lse.dtype == mass.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact_out, atol=ATOL[dtype], rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=ATOL[dtype], rtol=0)
    torch.testing.assert_close(mass.double(), exact_mass, atol=ATOL[dtype], rtol=0)
    again = ops.region_mass(query, key, exact_lse.float(), ids, 2, **kwargs)
    torch.testing.assert_close(again.double(), exact_mass, atol=5e-6, rtol=0)
    biased = {"region_ids": ids} if "region_bias" in kwargs else {}
    for reduce, expected in (("sum", p.sum(2)), ("mean", p.mean(2)), ("max", p.amax(2))):
        scores = ops.key_attention(query, key, exact_lse.float(), reduce=reduce, **kwargs, **biased)
        torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=0)
        both = ops.region_statistics(query, key, exact_lse.float(), ids, 2, reduce=reduce, **kwargs)
        torch.testing.assert_close(both, (again, scores), atol=1e-6, rtol=1e-6)


def plan_for(monkeypatch, kernel):
    """As where the prefill kernel, which otherwise is called without a plan, is not built or not the fastest."""
    monkeypatch.setattr("ras_fast.ops.attention.op_of", lambda *_: "region_attention")
    monkeypatch.setattr(attention_cpu, "plan_cpu_prefill", lambda *_: Plan(kernel, ""))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("lengths", [(34, 36), (33, 80), (40, 34)])
@pytest.mark.parametrize("option", OPTIONS)
def test_chunks_of_rows(backend, option, lengths, monkeypatch):
    """What runs where no kernel is built and torch's flash attention does not do."""
    monkeypatch.setattr(attention_cpu, "CHUNK_ROWS", 7)
    plan_for(monkeypatch, "softmax")
    query, key, value = inputs(length_q=lengths[0], length_k=lengths[1])
    ids = image_ids(2, lengths[1])
    kwargs = options(option, 2, 4, lengths[1], 2)
    found = ops.region_attention(query, key, value, ids, 2, **kwargs, mass_rows=10)
    expected = list(exact(query, key, value, ids, 2, **kwargs)[:3])
    expected[2] = expected[2][:, :, -10:]
    torch.testing.assert_close(found, tuple(expected), atol=2e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("option", ["plain", "bidirectional"])
def test_flash_and_recomputed_masses(backend, option, monkeypatch):
    """What runs on processors with matrix instructions."""
    plan_for(monkeypatch, "flash")
    query, key, value = inputs(length_q=40, length_k=40)
    kwargs = options(option, 2, 4, 40, 2)
    found = ops.region_attention(query, key, value, image_ids(2, 40), 2, **kwargs)
    expected = exact(query, key, value, image_ids(2, 40), 2, **kwargs)[:3]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("heads", "lengths", "dim"), [((4, 4), (150, 150), 64), ((14, 2), (131, 300), 40), ((6, 1), (300, 131), 72)]
)
def test_blocks_of_keys_and_tiles_of_rows(backend, heads, lengths, dim, option, dtype):
    """Several of each, none of them full, under every option; masses of the last rows, whose regions begin within a block."""
    query, key, value = inputs(2, *heads, *lengths, dim, dtype)
    ids = image_ids(2, lengths[1])
    kwargs = options(option, 2, heads[0], lengths[1], 2)
    found = ops.region_attention(query, key, value, ids, 2, **kwargs, mass_rows=20)
    arguments = (query.double(), key.double(), value.double(), ids, 2, kwargs.get("scale", dim**-0.5),
                 kwargs.get("is_causal", True), kwargs.get("kv_start"), kwargs.get("kv_end"), kwargs.get("window", 0),
                 kwargs.get("softcap", 0.0), kwargs.get("sinks"), kwargs.get("region_bias"), 20)  # fmt: skip
    exact_parts = attention_reference.region_attention(*arguments)
    for got, expected, atol in zip(found, exact_parts, (2 * ATOL[dtype], 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads", [(6, 2), (9, 1)])
def test_decode_in_pieces_of_the_cache(backend, heads, option):
    """Their peaks, and so the factors by which they are merged, are far apart."""
    query, key, value = inputs(1, *heads, 1, 900, 24)
    key[:, :, 300:600] *= 3
    ids, kwargs = image_ids(1, 900, 5), options(option, 1, heads[0], 900, 5)
    found = ops.region_attention(query, key, value, ids, 5, **kwargs)
    expected = exact(query, key, value, ids, 5, **kwargs)[:3]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("window", [5, 70])
@pytest.mark.parametrize("length_q", range(69, 75))
def test_windows_that_begin_anywhere_in_a_block(backend, length_q, window):
    """A tile's first rows, or the first of those that go together, see a block's keys from the second on or only the last."""
    query, key, value = inputs(1, 32, 16, length_q, length_q + 80, 8)
    found = ops.region_attention(query, key, value, window=window, mass_rows=0)
    masks = (8**-0.5, True, None, None, window, 0.0)
    exact = (tensor.double() for tensor in (query, key, value))
    expected = attention_reference.region_attention(*exact, None, 0, *masks, None, None, 0)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("option", ["plain", "window", "softcap", "bias"])
def test_memory_is_linear(option):
    """Twice the length takes at most twice the memory, and little more than that for rounding."""
    peaks = []
    for length in (1024, 2048):
        query, key, value = inputs(1, 4, 2, length, length, 16)
        kwargs = options(option, 1, 4, length, 2) | {"mass_rows": 64}
        peaks.append(peak_bytes(partial(ops.region_attention, query, key, value, image_ids(1, length), 2, **kwargs)))
    assert peaks[1] < 2.2 * peaks[0]


def peak_bytes(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_statistics_take_little_memory_however_many_threads(backend, kv_heads):
    """Masses of 2 MB in chunks of keys of their own: within 4 MB together, or not at all where that gives one head too few."""
    query, key, _ = inputs(1, 8, kv_heads, 512, 2048)
    ids, lse = torch.randint(-1, 128, (1, 2048), dtype=torch.int32), torch.full((1, 8, 512), 8.0)
    threads, masks = torch.get_num_threads(), (0.25, True, None, None, 0, 0.0, None)
    torch.set_num_threads(12)
    try:
        peak = peak_bytes(partial(ops.region_statistics, query, key, lse, ids, 128))
        found = ops.region_statistics(query, key, lse, ids, 128)
    finally:
        torch.set_num_threads(threads)
    assert peak < 8 << 20
    torch.testing.assert_close(found, attention_reference.region_statistics(query, key, lse, ids, 128, 512, "mean", *masks))


@BACKENDS
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_last_rows_only(backend, rows):
    query, key, value = inputs(length_q=40, length_k=48, dim=32)
    ids = image_ids(2, 48)
    _, lse, everything = ops.region_attention(query, key, value, ids, 2)
    _, _, last = ops.region_attention(query, key, value, ids, 2, mass_rows=rows)
    assert last.shape == (2, 4, rows, 2)
    torch.testing.assert_close(last, everything[:, :, 40 - rows :], atol=1e-6, rtol=0)
    torch.testing.assert_close(ops.region_mass(query, key, lse, ids, 2, mass_rows=rows), last, atol=1e-6, rtol=0)
    p = exact(query, key, value, ids, 2)[3][:, :, 40 - rows :]
    scores = ops.key_attention(query, key, lse, rows=rows, reduce="sum")
    torch.testing.assert_close(scores.double(), p.sum(2), atol=1e-5, rtol=0)
    mean = ops.key_attention(query, key, lse, rows=rows)
    torch.testing.assert_close(mean.double(), p.sum(2) / max(rows, 1), atol=1e-6, rtol=0)
    both = ops.region_statistics(query, key, lse, ids, 2, rows=rows, reduce="sum")
    torch.testing.assert_close(both, (last, scores), atol=1e-5, rtol=0)


@BACKENDS
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_statistics_of_many_rows_and_keys(backend, reduce):
    """Several chunks of keys on the CPU and several row tiles in Triton, whose parts are put together."""
    query, key, value = inputs(length_q=150, length_k=700, dim=16)
    scattered = torch.randint(-1, 5, (2, 700), dtype=torch.int32)
    for ids in (image_ids(2, 700), scattered):
        _, lse, mass = ops.region_attention(query, key, value, ids, 5)
        scores = ops.key_attention(query, key, lse, reduce=reduce)
        both = ops.region_statistics(query, key, lse, ids, 5, reduce=reduce)
        masks = (0.25, True, None, None, 0, 0.0, None)
        expected = attention_reference.region_statistics(query.double(), key.double(), lse, ids, 5, 150, reduce, *masks)
        for found in (both, (mass, scores)):
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
@pytest.mark.parametrize("length_q", [1, 2, 5, 12])
@pytest.mark.parametrize("rows", [None, 1])
def test_rows_with_bounds_of_their_own(backend, length_q, rows):
    """Several sequences over one cache: each row sees its own stretch, or nothing."""
    query, key, value = inputs(length_q=length_q, length_k=40)
    ids, start = image_ids(2, 40), torch.randint(0, 30, (2, length_q), dtype=torch.int32)
    kwargs = {"is_causal": False, "kv_start": start, "kv_end": start + torch.arange(length_q, dtype=torch.int32) * 4,
              "sinks": torch.randn(4), "softcap": 4.0, "region_bias": torch.randn(4, 2)}  # fmt: skip
    kwargs["kv_end"].clamp_(max=34)
    value[0, :, 34:] = torch.nan  # which nobody sees
    expected = exact(query, key, value, ids, 2, **kwargs)
    out, lse, mass = ops.region_attention(query, key, value, ids, 2, mass_rows=rows, **kwargs)
    torch.testing.assert_close(out.double(), expected[0], atol=3e-6, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=3e-6, rtol=0)
    torch.testing.assert_close(mass.double(), expected[2][:, :, -(rows or length_q) :], atol=3e-6, rtol=0)
    assert out.transpose(1, 2).is_contiguous()
    kernels = {"cpu": "prefill" if length_q > 8 else "decode"}
    assert ops.explain(query, key, value, ids, 2, **kwargs).kernel == kernels.get(backend, backend)


# (start, end) of each row's keys.
OWN_BOUNDS = {
    "an image": lambda i, keys: (0 * i, torch.where((i > 30) & (i < 90), 91, i + 1)),
    "a prefix": lambda i, keys: (0 * i + 7, (i + 1).clamp(min=100)),
    "sequences": lambda i, keys: (i // 30 * 30, i + 1),
    "far apart": lambda i, keys: (i % 7 * 20, i % 7 * 20 + 9 + i % 3),
    "backwards": lambda i, keys: (keys - 2 * i, keys - 2 * i + 3),
    "any": lambda i, keys: (torch.randint(-5, keys, i.shape), torch.randint(-5, keys + 5, i.shape)),
    "none": lambda i, keys: (i, i),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", OWN_BOUNDS)
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((6, 1), 40)])
def test_many_rows_with_bounds_of_their_own(backend, heads, dim, layout, dtype):
    """Keys that no row sees, some of them between those that do, are not even numbers."""
    length_q, length_k = 130, 150
    query, key, value = inputs(2, *heads, length_q, length_k, dim, dtype)
    row = torch.arange(length_q).expand(2, -1)
    start, end = (bound.int().contiguous() for bound in OWN_BOUNDS[layout](row, length_k))
    position = torch.arange(length_k)
    unseen = ~((position >= start[..., None]) & (position < end[..., None])).any(1)
    for tensor in (key, value):
        tensor.masked_fill_(unseen[:, None, :, None], torch.nan)
    ids = image_ids(2, length_k)
    shared = {"kv_start": start, "kv_end": end, "softcap": 5.0, "region_bias": torch.randn(heads[0], 2)}
    masks = (dim**-0.5, False, start, end, 0, 5.0)
    clean = query.double(), key.double().nan_to_num(), value.double().nan_to_num()
    sinks = torch.randn(heads[0])
    expected = attention_reference.region_attention(*clean, ids, 2, *masks, sinks, shared["region_bias"], 20)
    found = ops.region_attention(query, key, value, ids, 2, is_causal=False, sinks=sinks, mass_rows=20, **shared)
    for got, exact_part, atol in zip(found, expected, (2 * ATOL[dtype], 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(got.double(), exact_part.double(), atol=atol, rtol=1e-5)
    lse, options = expected[1], {"is_causal": False, **shared}
    for rows in (20, length_q):
        mass = attention_reference.region_mass(*clean[:2], lse, ids, 2, *masks, shared["region_bias"], rows)
        again = ops.region_mass(query, key, lse, ids, 2, mass_rows=rows, **options)
        torch.testing.assert_close(again, mass, atol=1e-5, rtol=0)
        for reduce in ("mean", "max"):
            scores = attention_reference.key_attention(*clean[:2], lse, rows, reduce, ids, *masks, shared["region_bias"])
            alone = ops.key_attention(query, key, lse, rows=rows, reduce=reduce, region_ids=ids, **options)
            both = ops.region_statistics(query, key, lse, ids, 2, rows=rows, reduce=reduce, **options)
            torch.testing.assert_close((alone, *both), (scores, mass, scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("kernel", ["softmax", "prefill"])
def test_bounds_that_say_what_a_causal_mask_says(backend, kernel, monkeypatch):
    """Also by chunks of rows, where no kernel is built."""
    monkeypatch.setattr(attention_cpu, "CHUNK_ROWS", 7)
    plan_for(monkeypatch, kernel)
    query, key, value = inputs(length_q=34, length_k=50)
    ids, limit = image_ids(2, 50), (torch.arange(34, dtype=torch.int32) + 17).expand(2, -1)
    causal = ops.region_attention(query, key, value, ids, 2, mass_rows=10)
    own = ops.region_attention(query, key, value, ids, 2, is_causal=False, kv_end=limit, mass_rows=10)
    torch.testing.assert_close(own, causal, atol=2e-6, rtol=1e-6)
    since = {"kv_start": (limit - 5).clamp(min=0), "is_causal": False, "mass_rows": 10}
    open_ended = ops.region_attention(query, key, value, ids, 2, **since)
    expected = exact(query, key, value, ids, 2, kv_start=since["kv_start"], is_causal=False)[:3]
    torch.testing.assert_close(open_ended[:2], expected[:2], atol=2e-6, rtol=1e-6, check_dtype=False)
    torch.testing.assert_close(open_ended[2].double(), expected[2][:, :, -10:], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (7, 1)])
@pytest.mark.parametrize("mass_rows", [0, 1, 6])
def test_rows_over_one_long_cache_are_those_of_calls_of_their_own(heads, kv_heads, mass_rows, dtype):
    """In several pieces, over stretches that overlap, lie in each other or apart, and none."""
    query, key, value = inputs(heads=heads, kv_heads=kv_heads, length_q=6, length_k=1300, dim=20, dtype=dtype)
    start = torch.tensor([[0, 250, 300, 700, -4, 900], [513, 0, 40, 39, 0, 1299]], dtype=torch.int32)
    end = torch.tensor([[600, 1000, 900, 700, 9, 1400], [514, 1300, 41, 41, 512, 1300]], dtype=torch.int32)
    ids, bias = (torch.arange(1300, dtype=torch.int32) // 100 % 7 - 1).expand(2, -1).contiguous(), torch.randn(heads, 6)
    masks = (0.3, False, start, end, 0, 20.0, torch.randn(heads), bias, mass_rows)
    decode = torch.ops.ras_fast.decode_attention
    expected = [
        decode(query[:, :, row : row + 1], key, value, ids, 6, 0.3, False, start[:, row].contiguous(), end[:, row].contiguous(),
               *masks[4:-1], int(row >= 6 - mass_rows))
        for row in range(6)
    ]  # fmt: skip
    for kernel, close in ((decode, 2e-6), (torch.ops.ras_fast.prefill_attention, 4e-6)):
        found = kernel(query, key, value, ids, 6, *masks)
        for own, others, tolerance in zip(found, zip(*expected, strict=True), (ATOL[dtype], close, close), strict=True):
            torch.testing.assert_close(own, torch.cat(others, 2), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_causal", "window"), [(True, 0), (True, 700), (True, 3), (False, 0)])
def test_few_rows_get_the_same_from_the_decode_and_the_prefill_kernel(is_causal, window, dtype):
    query, key, value = inputs(heads=6, kv_heads=2, length_q=5, length_k=1300, dim=20, dtype=dtype)
    start, end = torch.tensor([0, 350], dtype=torch.int32), torch.tensor([1290, 353], dtype=torch.int32)
    ids, bias = (torch.arange(1300, dtype=torch.int32) // 100 % 7 - 1).expand(2, -1).contiguous(), torch.randn(6, 6)
    masks = (0.3, is_causal, start, end, window, 20.0, torch.randn(6), bias, 4)
    found = torch.ops.ras_fast.decode_attention(query, key, value, ids, 6, *masks)
    expected = torch.ops.ras_fast.prefill_attention(query, key, value, ids, 6, *masks)
    for own, others, tolerance in zip(found, expected, (ATOL[dtype], 4e-6, 4e-6), strict=True):
        torch.testing.assert_close(own, others, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_one_row_sees_does_not_reach_the_others(backend, broken):
    """The reference only hides what no row sees."""
    query, key, value = inputs(length_q=3, length_k=300)
    start, end = (torch.tensor([bounds] * 2, dtype=torch.int32) for bounds in ((0, 100, 280), (150, 290, 300)))
    key[:, :, 200], value[:, :, 210] = broken, broken  # which row 1 sees alone
    out, lse, mass = ops.region_attention(query, key, value, image_ids(2, 300), 2, is_causal=False, kv_start=start, kv_end=end)
    for result in (out, lse, mass):
        assert result[:, :, [0, 2]].isfinite().all()
    assert not out[:, :, 1].isfinite().any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mass_error_within_twice_torchs(backend, dtype):
    """Against float64; the yardstick: float32 softmax sums over scores that torch computes in that dtype."""
    query, key, value = inputs(batch=1, heads=8, kv_heads=2, length_q=200, length_k=200, dim=64, dtype=dtype)
    ids = image_ids(1, 200)
    _, _, mass = ops.region_attention(query, key, value, ids, 2)
    s = (query @ key.repeat_interleave(4, 1).mT) * 64**-0.5
    s = s.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
    one_hot = (ids[..., None] == torch.arange(2)).float()
    own = torch.softmax(s.float(), -1) @ one_hot[:, None]
    exact_s = (query.double() @ key.double().repeat_interleave(4, 1).mT) / 8
    truth = torch.softmax(exact_s.masked_fill(s == -torch.inf, -torch.inf), -1) @ one_hot[:, None].double()
    assert (mass - truth).abs().max() <= 2 * (own - truth).abs().max() + 1e-6


@BACKENDS
@pytest.mark.parametrize("regions", [1, 2, 16, 64, 1000])
def test_partition_sums_to_one(backend, regions):
    query, key, value = inputs(length_q=30, length_k=1200, heads=2, kv_heads=1, dim=8)
    ids = (torch.arange(1200, dtype=torch.int32) * regions // 1200).expand(2, -1).contiguous()
    _, _, mass = ops.region_attention(query, key, value, ids, regions)
    assert mass.shape == (2, 2, 30, regions)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2, 30), atol=1e-5, rtol=0)


@BACKENDS
def test_scattered_regions_and_empty_region(backend):
    query, key, value = inputs(length_q=20, length_k=20)
    ids = torch.randint(-1, 3, (2, 20), dtype=torch.int32)  # region 3 has no token
    mass = ops.region_attention(query, key, value, ids, 4)[2]
    torch.testing.assert_close(mass.double(), exact(query, key, value, ids, 4)[2], atol=2e-6, rtol=0)
    assert (mass[..., 3] == 0).all()


@BACKENDS
@pytest.mark.parametrize("sink", [None, 0.7])
def test_rows_without_a_key(backend, sink):
    """Lq > Lk: the first rows see nothing. Their out and mass are 0, their LSE is −inf or the sink's logit."""
    query, key, value = inputs(length_q=7, length_k=4)
    sinks = None if sink is None else torch.full((4,), sink)
    out, lse, mass = ops.region_attention(query, key, value, image_ids(2, 4), 2, sinks=sinks)
    assert (out[:, :, :3] == 0).all()
    assert (mass[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == (-torch.inf if sink is None else sink)).all()
    assert torch.equal(ops.region_mass(query, key, lse, image_ids(2, 4), 2)[:, :, :3], torch.zeros(2, 4, 3, 2))
    assert out[:, :, 3:].isfinite().all()
    exact_out = exact(query, key, value, image_ids(2, 4), 2, sinks=sinks)[0]
    torch.testing.assert_close(out.double(), exact_out, atol=2e-6, rtol=0)


@BACKENDS
@pytest.mark.parametrize("length_q", [1, 3])
@pytest.mark.parametrize("softcap", [0.01, 0.5, 1e4, 1e7, 1e12])
def test_softcaps_of_any_size(backend, softcap, length_q):
    """One far above the scores leaves them as they are."""
    query, key, value = inputs(length_q=length_q, length_k=40)
    ids = image_ids(2, 40)
    expected = exact(query, key, value, ids, 2, softcap=softcap)[:3]
    found = ops.region_attention(query, key, value, ids, 2, softcap=softcap)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0, check_dtype=False)
    mass = ops.region_mass(query, key, expected[1].float(), ids, 2, softcap=softcap)
    torch.testing.assert_close(mass.double(), expected[2], atol=3e-6, rtol=0)


@BACKENDS
@pytest.mark.parametrize("sink", [None, -1.0])
@pytest.mark.parametrize("bias", [-1e4, -1e9])
@pytest.mark.parametrize("length_q", [1, 3])
def test_probabilities_add_up_to_1_where_the_lse_is_large(backend, length_q, bias, sink):
    """Where its rounding shows, exp(s - lse) would not."""
    query, key, value = inputs(length_q=length_q, length_k=40)
    ids, sinks = torch.zeros(2, 40, dtype=torch.int32), None if sink is None else torch.full((4,), sink + bias)
    options = {"is_causal": False, "region_bias": torch.full((4, 1), bias), "sinks": sinks}
    out, _, mass = ops.region_attention(query * 0, key, value, ids, 1, **options)
    share = 1.0 if sink is None else 40 / (40 + float(torch.exp(sinks[0] - bias)))
    expected = share * value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mass, torch.full_like(mass, share), atol=1e-5, rtol=0)


@BACKENDS
@pytest.mark.parametrize("length_q", [1, 3])
def test_an_infinite_sink_takes_everything(backend, length_q):
    query, key, value = inputs(length_q=length_q)
    out, lse, mass = ops.region_attention(query, key, value, image_ids(2, 9), 2, sinks=torch.full((4,), torch.inf))
    assert not out.any()
    assert not mass.any()
    assert (lse == torch.inf).all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length_q", [1, 3])
def test_a_nan_sink_is_nan_without_a_key(backend, length_q, dtype):
    query, key, value = inputs(length_q=length_q, dtype=dtype)
    none = torch.zeros(2, dtype=torch.int32)
    sinks = torch.full((4,), torch.nan)
    for result in ops.region_attention(query, key, value, image_ids(2, 9), 2, sinks=sinks, kv_end=none):
        assert result.isnan().all()


@BACKENDS
def test_bounds_of_no_row(backend):
    query, key, value = inputs(length_q=0)
    bounds = torch.zeros(2, 0, dtype=torch.int32)
    out, lse, mass = ops.region_attention(query, key, value, image_ids(2, 9), 2, is_causal=False, kv_end=bounds)
    assert (out.shape, lse.shape, mass.shape) == (query.shape, (2, 4, 0), (2, 4, 0, 2))


@BACKENDS
@pytest.mark.parametrize("length_q", [1, 5])
def test_bounds_beyond_the_keys(backend, length_q):
    """They are clamped to the keys that there are."""
    query, key, value = inputs(length_q=length_q)
    bounds = {"kv_start": torch.tensor([-3, 2], dtype=torch.int32), "kv_end": torch.tensor([9, 12], dtype=torch.int32)}
    clamped = {name: bound.clamp(0, 9) for name, bound in bounds.items()}

    def everything(**bounds):
        out, lse, mass = ops.region_attention(query, key, value, image_ids(2, 9), 2, **bounds)
        return out, lse, mass, *ops.region_statistics(query, key, lse, image_ids(2, 9), 2, **bounds)

    torch.testing.assert_close(everything(**bounds), everything(**clamped))


@BACKENDS
@pytest.mark.parametrize(("batch", "length_q", "length_k"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(backend, batch, length_q, length_k):
    query, key, value = inputs(batch=batch, length_q=length_q, length_k=length_k)
    ids = torch.zeros(batch, length_k, dtype=torch.int32)
    out, lse, mass = ops.region_attention(query, key, value, ids, 1)
    assert out.shape == query.shape
    assert mass.shape == (batch, 4, length_q, 1)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (mass == 0).all()
    assert ops.key_attention(query, key, lse).shape == (batch, 4, length_k)
    mass, scores = ops.region_statistics(query, key, lse, image_ids(batch, length_k), 2)
    assert (mass.shape, scores.shape) == ((batch, 4, length_q, 2), (batch, 4, length_k))
    assert not mass.any()
    assert not scores.any()


@BACKENDS
@pytest.mark.parametrize("dim", [1, 7, 80, 129, 600])
def test_head_dimensions(backend, dim):
    query, key, value = inputs(dim=dim)
    ids = image_ids(2, 9)
    out, lse, mass = ops.region_attention(query, key, value, ids, 2)
    exact_out, _, exact_mass, _ = exact(query, key, value, ids, 2)
    torch.testing.assert_close(out.double(), exact_out, atol=5e-6, rtol=0)
    torch.testing.assert_close(mass.double(), exact_mass, atol=5e-6, rtol=0)
    torch.testing.assert_close(ops.region_mass(query, key, lse, ids, 2), mass, atol=5e-6, rtol=0)


def beyond(tensor):
    """The same values with NaN after each row, and as strides no others have."""
    wide = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    return wide[tuple(map(slice, tensor.shape))].copy_(tensor)


@BACKENDS
@pytest.mark.parametrize("dim", [16, 37])
@pytest.mark.parametrize("length_q", [1, 9])
def test_strides_as_transformers_hands_them(backend, length_q, dim):
    """q, k, v as [B, L, H, D] transposed, caches longer than what is used, the others as views of wider tensors: no two of them
    have the same strides, and what lies between their rows is not read."""
    query = beyond(torch.randn(2, length_q, 4, dim)).transpose(1, 2)
    key, value = beyond(torch.randn(2, 2, 29, dim)), beyond(torch.randn(2, 31, 2, dim)).transpose(1, 2)[:, :, :29]
    ids, bias = image_ids(2, 50)[:, :29], beyond(torch.randn(2, 4, 2))
    lse = beyond(torch.randn(2, 4, length_q) + 4)

    def everything(query, key, value, ids, bias, lse):
        biased = {"region_ids": ids, "region_bias": bias}
        return (
            *ops.region_attention(query, key, value, num_regions=2, **biased), ops.key_attention(query, key, lse, **biased),
            ops.region_mass(query, key, lse, num_regions=2, **biased),
            *ops.region_statistics(query, key, lse, num_regions=2, **biased),
        )  # fmt: skip

    tensors = query, key, value, ids, bias, lse
    assert not any(tensor.is_contiguous() for tensor in tensors)
    torch.testing.assert_close(everything(*tensors), everything(*(tensor.contiguous() for tensor in tensors)))


@BACKENDS
def test_nan_stays_in_its_batch_element(backend):
    query, key, value = inputs()
    ids = image_ids(2, 9)
    clean = ops.region_attention(query, key, value, ids, 2)
    for tensor in (query, key, value):
        poisoned = [t.clone() for t in (query, key, value)]
        index = next(i for i, t in enumerate((query, key, value)) if t is tensor)
        poisoned[index][0, 0, 3, 2] = torch.nan
        out, lse, mass = ops.region_attention(*poisoned, ids, 2)
        assert out[0].isnan().any()
        for actual, expected in zip((out, lse, mass), clean, strict=True):
            torch.testing.assert_close(actual[1], expected[1])
    key = key.clone()
    key[0, 0, 3] = torch.nan
    out, lse, mass = ops.region_attention(query, key, value, ids, 2)
    assert mass[0, 0, 8].isnan().any()
    assert ops.key_attention(query, key, lse)[0, 0].isnan().any()
    assert ops.key_attention(query, key, lse, reduce="max")[1].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("row", [0, 4, 8])
def test_nan_of_one_row_is_in_the_scores_of_the_keys_that_it_sees(backend, row, reduce):
    """Also where rows without NaN come after it."""
    query, key, value = inputs()
    _, lse, _ = ops.region_attention(query, key, value)
    query[0, 1, row] = torch.nan
    lse[0, 1, row] = torch.nan
    for scores in (ops.key_attention(query, key, lse, reduce=reduce), ops.region_statistics(
        query, key, lse, image_ids(2, 9), 2, reduce=reduce)[1]):  # fmt: skip
        assert scores[0, 1, : row + 1].isnan().all()
        assert scores[1].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length_q", [3, 12])
def test_garbage_outside_the_valid_keys_is_never_read(backend, length_q, dtype):
    """Static caches hold uninitialised memory past kv_end and padding before kv_start; odd bounds cut pairs of keys apart."""
    query, key, value = inputs(length_q=length_q, length_k=12, dtype=dtype)
    bounds = {"kv_start": torch.tensor([3, 0], dtype=torch.int32), "kv_end": torch.tensor([9, 7], dtype=torch.int32)}
    ids = image_ids(2, 12)
    clean = ops.region_attention(query, key, value, ids, 2, **bounds)
    for b in range(2):
        for tensor in (key, value):
            tensor[b, :, : bounds["kv_start"][b]] = torch.nan
            tensor[b, :, bounds["kv_end"][b] :] = torch.inf
    for actual, expected in zip(ops.region_attention(query, key, value, ids, 2, **bounds), clean, strict=True):
        torch.testing.assert_close(actual, expected)


@BACKENDS
def test_without_regions_it_is_plain_attention(backend):
    query, key, value = inputs(kv_heads=4)
    out, _, mass = ops.region_attention(query, key, value)
    assert mass.shape == (2, 4, 9, 0)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(query, key, value, is_causal=True))


@pytest.mark.parametrize("option", ["plain", "both_ends", "batched_bias"])
def test_opcheck(option):
    query, key, value = inputs()
    ids = image_ids(2, 9)
    absent = {"kv_start": None, "kv_end": None, "softcap": 0.0, "sinks": None, "region_bias": None}
    kwargs = absent | options(option, 2, 4, 9, 2)
    masks = (0.25, True, kwargs["kv_start"], kwargs["kv_end"], 0, kwargs["softcap"])
    arguments = (query, key, value, ids, 2, *masks, kwargs["sinks"], kwargs["region_bias"], 4)
    torch.library.opcheck(torch.ops.ras_fast.region_attention.default, arguments)
    torch.library.opcheck(torch.ops.ras_fast.hopper_prefill.default, arguments)  # off the GPU, the reference
    own = torch.arange(18, dtype=torch.int32).view(2, 9) % 5
    row_by_row = (*arguments[:6], False, own, own + 4, *arguments[9:])
    torch.library.opcheck(torch.ops.ras_fast.region_attention.default, row_by_row)
    torch.library.opcheck(torch.ops.ras_fast.prefill_attention.default, row_by_row)
    lse = torch.randn(2, 4, 9) + 3
    mass_args = (query, key, lse, ids, 2, *masks, kwargs["region_bias"], 9)
    torch.library.opcheck(torch.ops.ras_fast.region_mass.default, mass_args)
    score_args = (5, "max", *masks, kwargs["region_bias"])
    torch.library.opcheck(torch.ops.ras_fast.key_attention.default, (query, key, lse, 5, "max", ids, *score_args[2:]))
    torch.library.opcheck(torch.ops.ras_fast.region_statistics.default, (query, key, lse, ids, 2, *score_args))


@pytest.mark.parametrize("length_k", [40, 70])
def test_opcheck_where_flash_attention_runs(length_k):
    """Its LSE lies in memory as [B, Lq, Hq]; the op's does not."""
    query, key, value = inputs(length_q=40, length_k=length_k)
    arguments = (query, key, value, None, 0, 0.25, True, None, None, 0, 0.0, None, None, 40)
    torch.library.opcheck(torch.ops.ras_fast.region_attention.default, arguments)
    assert ops.region_attention(query, key, value)[1].is_contiguous()


@BACKENDS
@pytest.mark.parametrize("length_q", [1, 5])
def test_a_region_that_its_bias_shuts_out(backend, length_q):
    """−inf is as if its keys were not there, also where a whole piece of the cache has no other keys."""
    query, key, value = inputs(1, 2, 1, length_q, 600)
    ids = torch.full((1, 600), -1, dtype=torch.int32)
    ids[:, :300] = 0
    out, lse, mass = ops.region_attention(query, key, value, ids, 1, region_bias=torch.full((2, 1), -torch.inf))
    expected = ops.region_attention(query, key[:, :, 300:], value[:, :, 300:])
    torch.testing.assert_close((out, lse), expected[:2], atol=2e-6, rtol=1e-6)
    assert not mass.any()


@BACKENDS
@pytest.mark.parametrize("length_q", [1, 5])
def test_rows_whose_bias_shuts_out_every_key(backend, length_q):
    """As rows without a key, in the statistics as well."""
    query, key, value = inputs(1, 2, 1, length_q, 600)
    ids, bias = torch.zeros(1, 600, dtype=torch.int32), torch.full((2, 1), -torch.inf)
    out, lse, mass = ops.region_attention(query, key, value, ids, 1, region_bias=bias)
    assert (lse == -torch.inf).all()
    for statistic in (out, mass, *ops.region_statistics(query, key, lse, ids, 1, region_bias=bias)):
        assert not statistic.any()


@pytest.mark.parametrize("length_q", [1, 5])
def test_ids_out_of_range_count_as_none_where_nothing_looks_at_them(length_q):
    """As in a compiled graph, which calls the ops themselves."""
    query, key, value = inputs(1, 2, 1, length_q, 70)
    ids = torch.randint(-1, 3, (1, 70), dtype=torch.int32)
    strange = torch.where(ids == -1, torch.tensor([[3, -7]], dtype=torch.int32).repeat(1, 35), ids)
    masks, bias, lse = (0.25, True, None, None, 0, 0.0), torch.randn(2, 3), torch.randn(1, 2, length_q) + 4

    def everything(ids):
        return (
            *torch.ops.ras_fast.decode_attention(query, key, value, ids, 3, *masks, None, bias, length_q),
            *torch.ops.ras_fast.prefill_attention(query, key, value, ids, 3, *masks, None, bias, length_q),
            torch.ops.ras_fast.region_mass(query, key, lse, ids, 3, *masks, bias, length_q),
            *torch.ops.ras_fast.region_statistics(query, key, lse, ids, 3, length_q, "sum", *masks, bias),
        )

    torch.testing.assert_close(everything(strange), everything(ids), atol=0, rtol=0)


@BACKENDS
def test_a_sink_that_takes_nothing(backend):
    query, key, value = inputs(1, 2, 2, 3, 2)
    out, lse, _ = ops.region_attention(query, key, value, sinks=torch.full((2,), -torch.inf))
    expected = ops.region_attention(query, key, value)
    torch.testing.assert_close((out, lse), expected[:2])  # the first row sees no key


@BACKENDS
@pytest.mark.parametrize("where", ["sinks", "region_bias"])
@pytest.mark.parametrize("length_q", [1, 3])
def test_nan_of_any_bits_is_nan_in_the_output(backend, length_q, where):
    query, key, value = inputs(1, 2, 2, length_q, 40, dtype=torch.bfloat16)
    nan = torch.full((2, 1), -1, dtype=torch.int32).view(torch.float32)  # rounding it to bf16 carelessly gives 0
    ids = torch.zeros(1, 40, dtype=torch.int32)
    options = {"sinks": nan[:, 0]} if where == "sinks" else {"region_bias": nan}
    assert ops.region_attention(query, key, value, ids, 1, **options)[0].isnan().all()


@BACKENDS
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("length_q", [1, 3])
def test_ties_round_to_even(backend, length_q, dtype, unit):
    """The mean of two neighbours lies between them."""
    query, key = torch.zeros(1, 1, length_q, 2).to(dtype), torch.zeros(1, 1, 2, 2).to(dtype)
    value = torch.tensor([[1, 1 + unit], [1 + unit, 1 + 2 * unit]]).to(dtype)[None, None]
    out = ops.region_attention(query, key, value, is_causal=False)[0]
    assert torch.equal(out, torch.tensor([1, 1 + 2 * unit]).to(dtype).expand(1, 1, length_q, 2))


@BACKENDS
@pytest.mark.parametrize("window", [40, 2**31 - 1, 2**32 + 5, 2**63 - 1])
def test_windows_beyond_the_keys(backend, window):
    query, key, value = inputs(length_q=30, length_k=40)
    torch.testing.assert_close(ops.region_attention(query, key, value, window=window), ops.region_attention(query, key, value))


@BACKENDS
def test_statistics_stay_float32_under_autocast(backend):
    query, key, value = inputs(length_k=20, length_q=20)
    ids = image_ids(2, 20)

    def statistics():
        _, lse, mass = ops.region_attention(query, key, value, ids, 2, softcap=5.0)
        both = ops.region_statistics(query, key, lse, ids, 2, softcap=5.0)
        return lse, mass, ops.key_attention(query, key, lse), ops.region_mass(query, key, lse, ids, 2, softcap=5.0), *both

    expected = statistics()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(statistics(), expected, atol=0, rtol=0)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traces_with_regions(mode):
    """Tracing has no values: nothing looks whether the ids are in range."""

    def mass(query, key, value, ids):
        return ops.region_attention(query, key, value, ids, 2)[2]

    arguments = (*inputs(), image_ids(2, 9))
    traced = make_fx(mass, tracing_mode=mode)(*arguments)
    torch.testing.assert_close(traced(*arguments), mass(*arguments))


def test_vmap_over_region_ids():
    query, key, value = inputs()
    ids = torch.stack([image_ids(2, 9), image_ids(2, 9).flip(1)])
    got = torch.vmap(lambda ids: ops.region_attention(query, key, value, ids, 2)[2])(ids)
    for mass, each in zip(got, ids, strict=True):
        assert torch.equal(mass, ops.region_attention(query, key, value, each, 2)[2])


@pytest.mark.parametrize("name", ["sinks", "region_bias", "lse"])
def test_a_gradient_is_never_dropped_silently(name):
    query, key, value = inputs(length_q=1)
    ids, given = image_ids(2, 9), {"sinks": torch.zeros(4), "region_bias": torch.zeros(4, 2), "lse": torch.zeros(2, 4, 1)}
    option = {name: given[name].requires_grad_()}
    run = partial(ops.region_mass, query, key) if name == "lse" else partial(ops.region_attention, query, key, value)
    with pytest.raises(RuntimeError, match="requires grad"):
        run(region_ids=ids, num_regions=2, **option)


def test_compiles_without_graph_breaks():
    def block(query, key, value, ids):
        out, lse, mass = ops.region_attention(query, key, value, ids, 2, mass_rows=2)
        return out + 1, mass, ops.key_attention(query, key, lse, rows=1), *ops.region_statistics(query, key, lse, ids, 2)

    args = (*inputs(), image_ids(2, 9))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(block(*args), compiled(*args), strict=True):
        torch.testing.assert_close(eager, traced)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length_q=st.integers(0, 40),
    length_k=st.integers(0, 70),
    dim=st.integers(1, 40),
    regions=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_kernels_agree_with_reference(batch, kv_heads, group, length_q, length_k, dim, regions, dtype, seed):
    torch.manual_seed(seed)
    query, key, value = inputs(batch, kv_heads * group, kv_heads, length_q, length_k, dim, dtype)
    ids = torch.randint(-1, regions, (batch, length_k), dtype=torch.int32).sort(-1)[0]
    start = torch.randint(0, length_k + 1, (batch,), dtype=torch.int32)
    kwargs = {"kv_start": start, "kv_end": (start + 20).clamp(max=length_k), "sinks": torch.randn(kv_heads * group)}
    kwargs["window"] = seed % 7 or None
    outputs = {}
    for name in ("cpu", "torch"):
        ras_fast.set_backend(name)
        try:
            out, lse, mass = ops.region_attention(query, key, value, ids, regions, **kwargs)
            scores = ops.key_attention(query, key, lse, reduce="sum", **kwargs)
            both = ops.region_statistics(query, key, lse, ids, regions, reduce="sum", **kwargs)
            outputs[name] = out, lse, mass, scores, *both
        finally:
            ras_fast.set_backend("auto")
    for actual, expected in zip(outputs["cpu"], outputs["torch"], strict=True):
        torch.testing.assert_close(actual, expected, atol=3 * ATOL[dtype], rtol=2e-5)


q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8)
ids = torch.zeros(2, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((q[0], k, v), {}, "query is of shape"),
        ((q.int(), k.int(), v.int()), {}, "query is of dtype"),
        ((q, k.bfloat16(), v), {}, "key is of dtype"),
        ((q, k[:, :, :, :4], v), {}, r"key is of (shape|strides)"),
        ((q[:, :3], k, v), {}, "key is of 2 heads"),
        ((q, k[:, :0], v[:, :0]), {}, "key is of 0 heads"),
        ((q, k[0, 0, 0], v), {}, "key is of shape"),
        ((q, k, v[:, :, :5]), {}, "value is of shape"),
        ((q, k, v, ids, 0), {}, "num_regions is 0"),
        ((q, k, v, ids, 1.5), {}, "num_regions is 1.5"),
        ((q, k, v, None, 3), {}, "num_regions is 3"),
        ((q, k, v, ids.long(), 2), {}, "region_ids is of dtype torch.int64"),
        ((q, k, v, ids[:, :5], 2), {}, "region_ids is of shape"),
        ((q, k, v, ids + 2, 2), {}, "region_ids is in 2..2"),
        ((q, k, v, ids - 2, 2), {}, "region_ids is in -2..-2"),
        ((q, k, v), {"kv_start": torch.zeros(2)}, "kv_start is of dtype"),
        ((q, k, v), {"kv_end": torch.zeros(2, 9, dtype=torch.int32)}, r"kv_end is \[B, Lq\] with is_causal=True"),
        (
            (q, k, v),
            {"kv_start": torch.zeros(2, dtype=torch.int32), "kv_end": torch.zeros(2, 9, dtype=torch.int32), "is_causal": False},
            r"kv_start is of shape \(2,\); it must be \[B, Lq\], as the other bound is",
        ),
        ((q, k, v), {"kv_end": torch.zeros(3, dtype=torch.int32)}, "kv_end is of shape"),
        ((q, k, v), {"kv_start": 0}, r"kv_start is 0; it must be None or a tensor \[B\]"),
        ((q, k, v), {"window": 0}, "window is 0"),
        ((q, k, v), {"window": 1.5}, "window is 1.5"),
        ((q, k, v), {"window": 3, "is_causal": False}, "window is 3 with is_causal=False"),
        ((q, k, v), {"is_causal": None}, "is_causal is None"),
        ((q, k, v), {"is_causal": "no"}, "is_causal is 'no'"),
        ((q, k, v), {"softcap": -1.0}, "softcap is -1.0"),
        ((q, k, v), {"softcap": float("inf")}, "softcap is inf"),
        ((q, k, v), {"softcap": 1e-46}, "softcap is 1e-46"),
        ((q, k, v), {"softcap": 1e39}, r"softcap is 1e\+39"),
        ((q, k, v), {"sinks": torch.zeros(3)}, "sinks is of shape"),
        ((q, k, v), {"region_bias": torch.zeros(4, 2)}, "region_bias is given without region_ids"),
        ((q, k, v, ids, 2), {"region_bias": torch.zeros(4, 3)}, "region_bias is of shape"),
        ((q, k, v, ids, 2), {"mass_rows": 6}, "mass_rows is 6"),
        ((q, k, v, ids, 2), {"mass_rows": 1.5}, "mass_rows is 1.5"),
        ((q, k, v, ids, 2), {"mass_rows": "a"}, "mass_rows is 'a'"),
    ],
)
def test_bad_arguments_are_named(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.region_attention(*args, **kwargs)


def test_bad_statistics_arguments_are_named():
    lse = torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match="lse is of shape"):
        ops.region_mass(q, k, lse[:, :, :4], ids, 1)
    with pytest.raises(ValueError, match="region_ids is None"):
        ops.region_mass(q, k, lse, None, 1)
    with pytest.raises(ValueError, match="reduce is 'median'"):
        ops.key_attention(q, k, lse, reduce="median")
    with pytest.raises(ValueError, match="rows is 9"):
        ops.key_attention(q, k, lse, rows=9)
    with pytest.raises(ValueError, match="region_ids is None"):
        ops.region_statistics(q, k, lse, None, 1)
    with pytest.raises(ValueError, match="reduce is 'median'"):
        ops.region_statistics(q, k, lse, ids, 1, reduce="median")
    with pytest.raises(ValueError, match="lse is of dtype"):
        ops.region_statistics(q, k, lse.double(), ids, 1)
    with pytest.raises(ValueError, match="kv_end is of shape"):
        ops.region_mass(q, k, lse, ids, 1, kv_end=torch.zeros(3, dtype=torch.int32))
    own = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kv_start is \[B, Lq\] with is_causal=True"):
        ops.key_attention(q, k, lse, kv_start=own)
    with pytest.raises(ValueError, match=r"kv_end is of shape \(2, 4\)"):
        ops.region_statistics(q, k, lse, ids, 1, is_causal=False, kv_end=own[:, :4])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_kernels_called_directly_refuse_what_they_would_misread(backend, name):
    def run(ids=ids, regions=2, sinks=None, bias=None, value=v[:, :, :1]):
        masks = (1.0, True, None, None, 0, 0.0)
        ids = None if ids is None else ids[:, :1]
        return getattr(torch.ops.ras_fast, name)(q[:, :, :1], k[:, :, :1], value, ids, regions, *masks, sinks, bias, 1)

    assert run()[2].shape == (2, 4, 1, 2)
    with pytest.raises(RuntimeError, match="region_bias must be"):
        run(bias=torch.zeros(4, 1))
    with pytest.raises(RuntimeError, match="sinks"):
        run(sinks=torch.zeros(1).expand(4))
    with pytest.raises(RuntimeError, match="num_regions"):
        run(ids=None)
    with pytest.raises(RuntimeError, match="on one device"):
        run(value=v[:, :, :1].to("meta"))


@pytest.mark.parametrize("name", ["region_mass", "key_attention", "region_statistics"])
def test_statistics_called_directly_need_one_device(name):
    masks, lse = (1.0, True, None, None, 0, 0.0, None), torch.zeros(2, 4, 5, device="meta")
    arguments = {
        "region_mass": (ids, 2, *masks, 5),
        "key_attention": (5, "sum", None, *masks),
        "region_statistics": (ids, 2, 5, "sum", *masks),
    }[name]
    with pytest.raises(RuntimeError, match=f"{name} needs all tensors on one device"):
        getattr(torch.ops.ras_fast, name)(q, k, lse, *arguments)


def test_gradients_are_refused_not_dropped():
    with pytest.raises(RuntimeError, match="no backward"):
        ops.region_attention(q.clone().requires_grad_(), k, v)
