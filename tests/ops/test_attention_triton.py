"""The Triton attention kernels, interpreted on the CPU where there is no GPU, against the float64 reference."""

import pytest
import torch

from ras_fast.ops import attention_reference

triton_attention = pytest.importorskip("ras_fast.triton_kernels.attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton.runtime.interpreter")  # log2(0), NaN
# Tensor cores make a product of float32 from three of TF32 and cut sums off where the interpreter rounds them.
EXACT = 3e-6 if DEVICE == "cpu" else 2e-5
ATOL = {torch.float32: EXACT, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # probabilities meet the values in the input dtype


def inputs(batch, heads, kv_heads, length_q, length_k, dim=16, dtype=torch.float32):
    """q, k, v as transformers hands them over: [B, L, H, D] seen as [B, H, L, D]."""
    shapes = ((batch, length_q, heads, dim), (batch, length_k, kv_heads, dim), (batch, length_k, kv_heads, dim))
    return tuple(torch.randn(shape, device=DEVICE).to(dtype).transpose(1, 2) for shape in shapes)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def runs(batch, length, regions):
    """Regions of contiguous keys with gaps, their borders not at multiples of any block."""
    ids = torch.arange(length, device=DEVICE) * (2 * regions + 1) // max(length, 1)
    return torch.where(ids % 2 == 1, ids // 2, -1).int().expand(batch, -1).contiguous()


def scattered(batch, length, regions):
    return torch.randint(-1, regions, (batch, length), dtype=torch.int32, device=DEVICE)


def arguments(
    query, scale=0.25, is_causal=True, kv_start=None, kv_end=None, window=0, softcap=0.0, sinks=None, region_bias=None,
    mass_rows=None,
):  # fmt: skip
    """The tail of the ops' arguments: (masks, sinks, bias, rows)."""
    rows = query.shape[2] if mass_rows is None else mass_rows
    return (scale, is_causal, kv_start, kv_end, window, softcap), sinks, region_bias, rows


def attend(query, key, value, ids, regions, **kwargs):
    masks, sinks, bias, rows = arguments(query, **kwargs)
    return triton_attention.region_attention(query, key, value, ids, regions, *masks, sinks, bias, rows)


def attend64(query, key, value, ids, regions, **kwargs):
    masks, sinks, bias, rows = arguments(query, **kwargs)
    wide = (tensor.double() for tensor in (query, key, value))
    return attention_reference.region_attention(*wide, ids, regions, *masks, sinks, bias, rows)


def heat_map(query, key, lse, rows, reduce="mean", ids=None, **kwargs):
    masks, _, bias, _ = arguments(query, **kwargs)
    return triton_attention.key_attention(query, key, lse, rows, reduce, ids, *masks, bias)


def check(query, key, value, ids, regions, **kwargs):
    """region_attention and region_mass against float64; returns what region_attention gave."""
    got = attend(query, key, value, ids, regions, **kwargs)
    out, lse, mass = attend64(query, key, value, ids, regions, **kwargs)
    atol = ATOL[query.dtype]
    torch.testing.assert_close(got[0].double(), out, atol=atol, rtol=0)
    torch.testing.assert_close(got[1], lse, atol=2 * EXACT, rtol=1e-6)
    torch.testing.assert_close(got[2], mass, atol=atol, rtol=0)
    masks, _, bias, rows = arguments(query, **kwargs)
    again = triton_attention.region_mass(query, key, lse, ids, regions, *masks, bias, rows)
    torch.testing.assert_close(again, mass, atol=atol, rtol=0)
    return got


OPTIONS = {
    "plain": {},
    "bidirectional": {"is_causal": False},
    "bounds": {"kv_start": int32([0, 37]), "kv_end": int32([70, 51])},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
    "window": {"window": 20},
    "softcap": {"softcap": 1.5, "scale": 0.5},
    "sinks": {"sinks": torch.linspace(-1, 4, 4, device=DEVICE)},
    "bias": {"region_bias": torch.linspace(-2, 2, 12, device=DEVICE).view(4, 3)},
    "rows' own bounds": {"is_causal": False, "softcap": 3.0, "sinks": torch.linspace(-1, 4, 4, device=DEVICE)},
    "everything": {
        "kv_start": int32([3, 0]), "kv_end": int32([66, 70]), "window": 40, "softcap": 4.0,
        "sinks": torch.linspace(-1, 4, 4, device=DEVICE),
        "region_bias": torch.linspace(-2, 2, 24, device=DEVICE).view(2, 4, 3), "mass_rows": 2,
    },
}  # fmt: skip


# The others are slow in the interpreter where there are many rows.
FEW = ("plain", "bounds", "softcap", "bias", "rows' own bounds", "everything")


@pytest.mark.parametrize(
    ("option", "length_q"),
    [
        pytest.param(option, rows, marks=() if rows == 2 or option in FEW or DEVICE != "cpu" else pytest.mark.slow)
        for option in OPTIONS
        for rows in (70, 2)
    ],
)
def test_options(option, length_q):
    """Lq = 70: prefill tiles. Lq = 2: heads of a group packed into one tile, splits merged."""
    query, key, value = inputs(2, 4, 2, length_q, 70)
    check(query, key, value, runs(2, 70, 3), 3, **OPTIONS[option], **(own_bounds(length_q) if "own" in option else {}))


def own_bounds(rows):
    """Rows of an image, of two sequences, and such as see nothing."""
    row = torch.arange(70 - rows, 70, device=DEVICE)
    start = torch.stack([0 * row, torch.where(row < 50, 0, 50)]).int()
    end = torch.stack([torch.where((row > 9) & (row < 60), 60, row + 1), torch.where(row % 9 == 1, 0, row + 1)]).int()
    return {"kv_start": start, "kv_end": end}


@pytest.mark.parametrize("given", ["kv_start", "kv_end"])
def test_one_bound_of_each_row_s_own(given):
    query, key, value = inputs(2, 4, 2, 20, 70)
    check(query, key, value, runs(2, 70, 3), 3, is_causal=False, **{given: own_bounds(20)[given]})


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("rows", [5, 66])
def test_what_keys_receive_from_rows_of_their_own(rows, reduce):
    query, key, value = inputs(2, 4, 2, 70, 70)
    ids, bounds = runs(2, 70, 2), own_bounds(70) | {"is_causal": False}
    masks = arguments(query, **bounds)[0]
    lse = attend64(query, key, value, ids, 2, **bounds)[1]
    expected = attention_reference.region_statistics(query.double(), key.double(), lse, ids, 2, rows, reduce, *masks, None)
    found = triton_attention.region_statistics(query, key, lse, ids, 2, rows, reduce, *masks, None)
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(heat_map(query, key, lse, rows, reduce, **bounds), expected[1], atol=EXACT, rtol=EXACT)


def test_garbage_between_the_rows_keys_is_never_used():
    query, key, value = inputs(1, 2, 1, 24, 90)
    start = (torch.arange(24, device=DEVICE) // 8 * 37)[None].int()
    bounds = {"is_causal": False, "kv_start": start, "kv_end": start + 9}
    clean = attend(query, key, value, runs(1, 90, 2), 2, **bounds)
    for tensor in (key, value):
        for unseen in (slice(9, 37), slice(46, 74), slice(83, 90)):
            tensor[:, :, unseen] = torch.nan
    dirty = attend(query, key, value, runs(1, 90, 2), 2, **bounds)
    torch.testing.assert_close(dirty, clean)


@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length_q", [70, 1])
def test_half_precision(dtype, length_q):
    query, key, value = inputs(1, 4, 2, length_q, 140, dim=32, dtype=dtype)
    mass = check(query, key, value, runs(1, 140, 2), 2)[2]
    own = torch.softmax(((query @ key.repeat_interleave(2, 1).mT) * 0.25).float()[:, :, -1:], -1)
    one_hot = (runs(1, 140, 2)[..., None] == torch.arange(2, device=DEVICE)).float()
    exact = attend64(query, key, value, runs(1, 140, 2), 2)[2][:, :, -1:]
    allowed = 2 * (own @ one_hot[:, None] - exact).abs().max() + 1e-4
    assert (mass[:, :, -1:] - exact).abs().max() <= allowed


@pytest.mark.parametrize("regions", [1, 5, 16, 17, 1000])
@pytest.mark.parametrize("layout", [runs, scattered])
def test_regions(regions, layout):
    """More regions than one one-hot product holds; borders inside and between blocks; regions without a key."""
    query, key, value = inputs(1, 2, 1, 1, 150)
    check(query, key, value, layout(1, 150, regions), regions)


def test_scattered_regions_in_prefill():
    query, key, value = inputs(1, 2, 2, 40, 100)
    check(query, key, value, scattered(1, 100, 20), 20)


def test_ids_out_of_range_count_as_none():
    """Between the regions and in whole blocks of keys."""
    query, key, value = inputs(1, 2, 1, 3, 150)
    ids, bias = runs(1, 150, 1), torch.randn(2, 1, device=DEVICE)
    strange = torch.where(ids == -1, int32(1), ids)
    got, expected = (attend(query, key, value, table, 1, region_bias=bias) for table in (strange, ids))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("length_q", [1, 20])
def test_a_maximum_that_grows_within_a_region(length_q):
    """What its running sum held before has to shrink."""
    query, key, value = inputs(1, 2, 1, length_q, 100)
    key *= torch.linspace(0.1, 4, 100, device=DEVICE)[:, None]
    check(query, key, value, torch.zeros(1, 100, dtype=torch.int32, device=DEVICE), 1)


def test_partition_sums_to_one():
    query, key, value = inputs(1, 2, 1, 33, 90)
    ids = (torch.arange(90, dtype=torch.int32, device=DEVICE) // 10)[None].contiguous()
    mass = attend(query, key, value, ids, 9)[2]
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sinks", [None, "sinks"])
@pytest.mark.parametrize(("length_q", "length_k"), [(40, 5), (3, 0), (70, 0)])
def test_rows_without_a_key(length_q, length_k, sinks):
    query, key, value = inputs(2, 4, 2, length_q, length_k)
    kwargs = {} if sinks is None else {"sinks": torch.linspace(-1, 4, 4, device=DEVICE)}
    out, lse, mass = check(query, key, value, runs(2, length_k, 1), 1, **kwargs)
    empty = slice(0, length_q - length_k)
    assert (out[:, :, empty] == 0).all()
    assert (mass[:, :, empty] == 0).all()
    expected = kwargs["sinks"][:, None] if sinks else torch.tensor(-torch.inf, device=DEVICE)
    torch.testing.assert_close(lse[:, :, empty], expected.expand_as(lse[:, :, empty]))


@pytest.mark.parametrize(("batch", "length_q"), [(0, 3), (2, 0)])
def test_empty(batch, length_q):
    query, key, value = inputs(batch, 2, 1, length_q, 5)
    out, lse, mass = attend(query, key, value, runs(batch, 5, 1), 1)
    assert (out.shape, lse.shape, mass.shape) == ((batch, 2, length_q, 16), (batch, 2, length_q), (batch, 2, length_q, 1))
    assert heat_map(query, key, lse, length_q).eq(0).all()


@pytest.mark.parametrize("dim", [7, 80])
@pytest.mark.parametrize("group", [1, 3])
def test_head_dimension_and_group_need_not_be_powers_of_two(dim, group):
    query, key, value = inputs(1, 2 * group, 2, 2, 50, dim=dim)
    check(query, key, value, runs(1, 50, 2), 2)


@pytest.mark.parametrize("length_q", [1, 33])
def test_nan_stays_in_its_batch_element_and_is_not_hidden(length_q):
    query, key, value = inputs(2, 2, 1, length_q, 90)
    ids = runs(2, 90, 2)
    clean = attend(query, key, value, ids, 2)
    key[0, 0, 3] = torch.nan
    out, lse, mass = attend(query, key, value, ids, 2)
    for actual, expected in zip((out, lse, mass), clean, strict=True):
        torch.testing.assert_close(actual[1], expected[1])
    assert out[0, :, -1].isnan().all()
    assert lse[0, :, -1].isnan().all()
    assert mass[0, :, -1].isnan().all()
    for reduce in ("mean", "max"):
        assert heat_map(query, key, lse, length_q, reduce)[0].isnan().any()


def test_garbage_outside_the_valid_keys_is_never_used():
    query, key, value = inputs(2, 2, 1, 3, 90)
    bounds = {"kv_start": int32([20, 0]), "kv_end": int32([60, 33])}
    clean = attend(query, key, value, runs(2, 90, 2), 2, **bounds)
    for b, (start, end) in enumerate([(20, 60), (0, 33)]):
        for tensor in (key, value):
            tensor[b, :, :start] = torch.nan
            tensor[b, :, end:] = torch.inf
    dirty = attend(query, key, value, runs(2, 90, 2), 2, **bounds)
    for actual, expected in zip(dirty, clean, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("rows", [1, 9, 75])
def test_key_attention(rows, reduce):
    """rows = 75: more than one row tile, so keys stay and rows stream."""
    query, key, _ = inputs(2, 6, 2, 80, 80)
    bounds = {"kv_start": int32([0, 9]), "kv_end": int32([80, 70]), "window": 50}
    masks = arguments(query, **bounds)[0]
    lse = torch.randn(2, 6, 80, device=DEVICE) + 4
    expected = attention_reference.key_attention(query.double(), key.double(), lse.double(), rows, reduce, None, *masks, None)
    torch.testing.assert_close(heat_map(query, key, lse, rows, reduce, **bounds), expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize(
    ("rows", "reduce"),
    [(75, "mean"), (7, "max"), *(pytest.param(*own, marks=pytest.mark.slow) for own in ((75, "max"), (7, "mean")))],
)
def test_mass_and_heat_map_in_one_launch(rows, reduce, monkeypatch):
    query, key, value = inputs(2, 6, 2, 80, 80)
    ids = runs(2, 80, 2)
    _, lse, mass = attend(query, key, value, ids, 2, mass_rows=rows)
    masks = (0.25, True, None, None, 0, 0.0, None)
    expected = mass, heat_map(query, key, lse, rows, reduce)
    for alone in ("region_mass", "key_attention"):
        monkeypatch.delattr(triton_attention, alone)
    both = triton_attention.region_statistics(query, key, lse, ids, 2, rows, reduce, *masks)
    torch.testing.assert_close(both, expected, atol=2e-6, rtol=0)


def beyond(tensor):
    """The same values with NaN after each row, and as strides no others have."""
    wide = torch.full([size + 3 for size in tensor.shape], torch.nan, device=DEVICE)
    return wide[tuple(map(slice, tensor.shape))].copy_(tensor)


@pytest.mark.parametrize("length_q", [2, 65])
def test_no_two_tensors_of_the_same_strides(length_q):
    query, key, value = inputs(2, 4, 2, length_q, 40)
    ids = runs(2, 50, 3)[:, :40]
    bias, lse = torch.randn(2, 4, 3, device=DEVICE), torch.randn(2, 4, length_q, device=DEVICE) + 4

    masks = (0.25, True, None, None, 0, 0.0)

    def everything(attend, mass, scores, query, key, value, ids, bias, lse):
        return (
            *attend(query, key, value, ids, 3, *masks, None, bias, length_q),
            mass(query, key, lse, ids, 3, *masks, bias, length_q), scores(query, key, lse, length_q, "mean", ids, *masks, bias),
        )  # fmt: skip

    longer = beyond(torch.cat([value, value], 2).transpose(1, 2)).transpose(1, 2)[:, :, :40]
    strided = beyond(query), beyond(key), longer, ids, beyond(bias), beyond(lse)
    kernels = triton_attention.region_attention, triton_attention.region_mass, triton_attention.key_attention
    references = (getattr(attention_reference, kernel.__name__) for kernel in kernels)
    found, expected = everything(*kernels, *strided), everything(*references, query, key, value, ids, bias, lse)
    torch.testing.assert_close(found, expected, atol=2 * EXACT, rtol=1e-5)


@pytest.mark.parametrize("length_k", range(60, 76))
def test_masks_that_end_anywhere_in_a_block(length_k):
    """The causal limits and the windows of the rows fall on every key of a block, its first and its last included."""
    query, key, value = inputs(1, 1, 1, 20, length_k)
    found = attend(query, key, value, None, 0, window=40, mass_rows=0)
    expected = attend64(query, key, value, None, 0, window=40, mass_rows=0)
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=1e-6, check_dtype=False)


def test_a_sink_counts_once_among_splits():
    query, key, value = inputs(1, 2, 1, 1, 200)
    check(query, key, value, runs(1, 200, 2), 2, sinks=torch.tensor([1.0, 4.0], device=DEVICE))


@pytest.mark.parametrize("bias", [-1e4, -1e9])
def test_splits_whose_lse_is_large(bias):
    """Where its rounding shows, weights of exp(part - lse) would not add up to 1."""
    query, key, value = inputs(1, 2, 1, 1, 200)
    region_bias = torch.full((2, 1), bias, device=DEVICE)
    out, _, mass = attend(query, key, torch.ones_like(value), torch.zeros_like(runs(1, 200, 1)), 1, region_bias=region_bias)
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-6, rtol=0)
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)


def test_bounds_beyond_the_keys():
    """They are clamped to the keys that there are."""
    query, key, value = inputs(2, 2, 1, 3, 40)
    bounds = {"kv_start": int32([-70, 2]), "kv_end": int32([40, 90])}
    clamped = {name: bound.clamp(0, 40) for name, bound in bounds.items()}
    got, expected = (attend(query, key, value, runs(2, 40, 2), 2, **kwargs) for kwargs in (bounds, clamped))
    torch.testing.assert_close(got, expected)


def test_offsets_beyond_32_bits():
    """Two batch elements 2³¹ elements apart: the second is found only by 64-bit arithmetic. Most of the memory is untouched."""
    storage = torch.empty(2**31 + 10_000, dtype=torch.float16, device=DEVICE)
    key = storage.as_strided((2, 1, 40, 16), (2**31, 0, 16, 1))
    key.copy_(torch.randn(2, 1, 40, 16))
    query = torch.randn(2, 1, 2, 16, device=DEVICE).half()
    far = attend(query, key, key, runs(2, 40, 2), 2)
    near = attend(query, key.clone(), key.clone(), runs(2, 40, 2), 2)
    for actual, expected in zip(far, near, strict=True):
        torch.testing.assert_close(actual, expected)
