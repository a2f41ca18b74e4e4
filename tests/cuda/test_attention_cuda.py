"""The attention ops on a GPU, by whichever kernel attention_plan.py picks: against the float64 reference, and in a graph."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ras_fast
from ras_fast import ops
from ras_fast.ops import attention_plan, attention_reference
from ras_fast.ops.attention import REDUCTIONS
from ras_fast.ops.attention_plan import Case
from ras_fast.patching import range_mask
from ras_fast.patching.attention import attention as patched_attention

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]

ATOL = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def states(length_q, length_k, dim=128, dtype=torch.bfloat16, batch=2, heads=8, kv_heads=2):
    shapes = ((batch, length_q, heads, dim), (batch, length_k, kv_heads, dim), (batch, length_k, kv_heads, dim))
    return tuple(torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes)


def image_ids(batch, length):
    ids = torch.full((batch, length), -1, dtype=torch.int32, device="cuda")
    ids[:, length // 8 : length // 2] = 0
    ids[:, length // 2 + 5 : length - length // 4] = 1
    return ids


def check(query, key, value, ids, masks=(), mass_rows=None, sinks=None, bias=None):
    masks = masks or (0.1, True, None, None, 0, 0.0)
    rows = query.shape[2] if mass_rows is None else mass_rows
    args = (ids, 2, *masks, sinks, bias, rows)
    exact = attention_reference.region_attention(query.double(), key.double(), value.double(), *args)
    out, lse, mass = torch.ops.ras_fast.region_attention(query, key, value, *args)
    again = torch.ops.ras_fast.region_mass(query, key, exact[1], ids, 2, *masks, bias, rows)
    atol = ATOL[query.dtype]
    torch.testing.assert_close(out.double(), exact[0], atol=atol, rtol=0)
    torch.testing.assert_close(lse, exact[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mass, exact[2], atol=2e-3, rtol=0)
    torch.testing.assert_close(again, exact[2], atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 3000), (1, 17), (3, 500), (16, 1000)])
def test_decode(length_q, length_k, dim, dtype):
    query, key, value = states(length_q, length_k, dim, dtype)
    assert ops.explain(query, key, value, image_ids(2, length_k), 2).kernel == "decode"
    check(query, key, value, image_ids(2, length_k))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*ATOL, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("rows", "heads"), [(1, 8), (1, 14), (3, 8), (64, 8), (200, 8)])
def test_key_scores(rows, heads, dim, dtype, reduce):
    """Up to 8 rows in half precision by the CUDA kernel, alone and with the masses of the same rows; else by Triton."""
    query, key, value = states(300, 700, dim, dtype, heads=heads)
    start, end = (torch.tensor(bound, dtype=torch.int32, device="cuda") for bound in ([0, 90], [650, 400]))
    ids, bias = image_ids(2, 700), torch.randn(2, heads, 2, device="cuda")
    masks = (0.1, True, start, end, 300, 5.0)
    native = dtype != torch.float32 and rows <= attention_plan.SCORED_ROWS
    assert attention_plan.plan_statistics(query, key, False, rows) == ("cuda" if native else "triton")
    wide = (query.double(), key.double())
    lse = attention_reference.region_attention(*wide, value.double(), ids, 2, *masks, None, bias, 300)[1]
    exact = attention_reference.key_attention(*wide, lse, rows, reduce, ids, *masks, bias)
    alone = torch.ops.ras_fast.key_attention(query, key, lse, rows, reduce, ids, *masks, bias)
    mass, scores = torch.ops.ras_fast.region_statistics(query, key, lse, ids, 2, rows, reduce, *masks, bias)
    for found in (alone, scores):
        torch.testing.assert_close(found, exact, atol=2e-3 * (rows if reduce == "sum" else 1), rtol=0)
    exact_mass = attention_reference.region_mass(*wide, lse, ids, 2, *masks, bias, rows)
    torch.testing.assert_close(mass, exact_mass, atol=2e-3, rtol=0)


def test_decode_options():
    query, key, value = states(2, 700)
    bounds = [torch.tensor(bound, dtype=torch.int32, device="cuda") for bound in ([0, 90], [650, 400])]
    sinks, bias = torch.randn(8, device="cuda"), torch.randn(2, 8, 2, device="cuda")
    check(query, key, value, image_ids(2, 700), (0.1, True, *bounds, 300, 5.0), 1, sinks, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [4, 8, 32])
def test_rows_with_bounds_of_their_own(heads, dtype):
    """Two sequences over one cache, which see stretches that overlap, lie apart, or are empty. float32: Triton."""
    query, key, value = states(2, 700, dtype=dtype, heads=heads)
    bounds = ([[300, 120], [650, 0]], [[700, 480], [650, 90]])
    start, end = (torch.tensor(bound, dtype=torch.int32, device="cuda") for bound in bounds)
    ids, sinks, bias = image_ids(2, 700), torch.randn(heads, device="cuda"), torch.randn(2, heads, 2, device="cuda")
    options = {"is_causal": False, "kv_start": start, "kv_end": end}
    kernel = "decode" if dtype == torch.bfloat16 else "triton"
    assert ops.explain(query, key, value, ids, 2, **options).kernel == kernel
    args = (ids, 2, 0.1, False, start, end, 0, 5.0, sinks, bias, 1)
    exact = attention_reference.region_attention(query.double(), key.double(), value.double(), *args)
    found = torch.ops.ras_fast.region_attention(query, key, value, *args)
    for got, expected, atol in zip(found, exact, (2e-2, 1e-3, 2e-3), strict=True):
        torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=1e-3)


@pytest.mark.parametrize("dtype", [*ATOL, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [64, 300])
def test_an_image_whose_tokens_see_each_other(rows, dim, dtype):
    """Many rows with bounds of their own, as in Gemma 3's prompts: Triton, for the statistics as well."""
    query, key, value = states(300, 300, dim, dtype)
    row = torch.arange(300, device="cuda")
    end = torch.where((row > 40) & (row < 200), 200, row + 1).expand(2, -1)
    start = torch.tensor([[0], [11]], device="cuda").expand(2, 300)
    start, end = (bound.int().contiguous() for bound in (start, end))
    ids, bias = image_ids(2, 300), torch.randn(2, 8, 2, device="cuda")
    options = {"is_causal": False, "kv_start": start, "kv_end": end, "softcap": 5.0, "region_bias": bias}
    assert ops.explain(query, key, value, ids, 2, **options).kernel == "triton"
    masks = (dim**-0.5, False, start, end, 0, 5.0)
    wide = query.double(), key.double(), value.double()
    exact = attention_reference.region_attention(*wide, ids, 2, *masks, None, bias, rows)
    out, lse, mass = ops.region_attention(query, key, value, ids, 2, mass_rows=rows, **options)
    torch.testing.assert_close(out.double(), exact[0], atol=ATOL.get(dtype, 1e-4), rtol=0)
    torch.testing.assert_close(lse, exact[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mass, exact[2], atol=2e-3, rtol=0)
    found = ops.region_statistics(query, key, exact[1], ids, 2, rows=rows, **options)
    expected = attention_reference.region_statistics(*wide[:2], exact[1], ids, 2, rows, "mean", *masks, bias)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("length_q", [1, 2])
def test_patched_attention_under_a_range(length_q):
    """What a captured step of the engine, or of a static cache, runs instead of SDPA under a mask."""
    query, key, value = states(length_q, 500)
    ends = torch.tensor([[460, 90], [33, 500]], device="cuda")[:, :length_q]
    mask = range_mask(torch.zeros_like(ends), ends) if length_q > 1 else range_mask(ends[:, 0] * 0, ends[:, 0])
    module = torch.nn.Module().eval()
    out, _ = patched_attention(module, query, key, value, mask, scaling=0.1)
    seen = torch.arange(500, device="cuda") < ends[:, None, :, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=seen, scale=0.1, enable_gqa=True
    )
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), atol=2e-2, rtol=0)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("mass_rows", [1, 640])
def test_a_nan_is_not_hidden_from_the_masses(mass_rows, hopper, monkeypatch):
    """Flash attention's LSE of a row whose sum is NaN is +inf, from which every mass would be 0."""
    if not hopper:
        monkeypatch.setattr(attention_plan, "is_hopper", lambda device: False)
    query, key, value = states(640, 640)
    key[0, :, 3] = torch.nan  # in no region
    _, lse, mass = ops.region_attention(query, key, value, image_ids(2, 640), 2, mass_rows=mass_rows)
    assert mass[0, :, -1].isnan().all()
    assert lse[0, :, -1].isnan().all()
    assert mass[1].isfinite().all()


HOPPER = CUDA.available and not attention_plan.hopper_refuses(*states(1, 1), Case())


@pytest.mark.parametrize(("mass_rows", "kernel"), [(0, "flash"), (1, "flash"), (64, "flash"), (640, "triton")])
@pytest.mark.parametrize("hopper", [False, pytest.param(True, marks=pytest.mark.skipif(not HOPPER, reason="needs sm_90a"))])
def test_prefill(mass_rows, kernel, hopper, monkeypatch):
    if not hopper:
        monkeypatch.setattr(attention_plan, "is_hopper", lambda device: False)
    query, key, value = states(640, 640)
    found = ops.explain(query, key, value, image_ids(2, 640), 2, mass_rows=mass_rows).kernel
    assert found == ("hopper" if hopper else kernel)
    check(query, key, value, image_ids(2, 640), mass_rows=mass_rows)


@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0 and a library built for sm_90a")
@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("dim", [40, 64, 80, 128, 256])
@pytest.mark.parametrize("regions", [0, 2, 40])
@pytest.mark.parametrize(
    ("length_q", "length_k", "heads"),
    [(128, 128, 8), (640, 640, 8), (300, 1111, 8), (700, 333, 8), (2048, 2048, 8), (640, 640, 72), (200, 700, 150)],
)
def test_hopper_prefill(length_q, length_k, heads, regions, dim, dtype):
    """40 regions: scattered. Many heads: a block walks several tiles, of three consumers for narrow heads."""
    query, key, value = states(length_q, length_k, dim, dtype, heads=heads)
    ids = None if not regions else image_ids(2, length_k)
    if regions == 40:
        ids = torch.randint(-1, 40, (2, length_k), dtype=torch.int32, device="cuda")
    for is_causal in (True, False):
        arguments = (ids, regions, 0.1, is_causal, None, None, 0, 0.0, None, None, length_q)
        exact = attention_reference.region_attention(query.double(), key.double(), value.double(), *arguments)
        for _ in range(3):  # what is wrong in the order of asynchronous copies may show only now and then
            out, lse, mass = torch.ops.ras_fast.hopper_prefill(query, key, value, *arguments)
            torch.testing.assert_close(out.double(), exact[0], atol=ATOL[dtype], rtol=0)
            torch.testing.assert_close(lse, exact[1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mass, exact[2], atol=2e-3, rtol=0)


@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0 and a library built for sm_90a")
def test_hopper_prefill_on_new_threads():
    """A thread that has not used CUDA has no context, which tensor maps want. Calls with other numbers of regions need other
    amounts of shared memory, and come between one another."""
    query, key, value = states(640, 640)
    ids = {regions: torch.arange(1280, dtype=torch.int32, device="cuda").view(2, 640) % regions for regions in (1, 120)}

    def masses(regions):
        options = (ids[regions], regions, 0.1, True, None, None, 0, 0.0, None, None, 640)
        return [torch.ops.ras_fast.hopper_prefill(query, key, value, *options)[2] for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(masses, ids))
    for expected, others in zip(map(masses, ids), found, strict=True):
        assert all(torch.equal(mass, expected[0]) for mass in others)


@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1000), (300, 300)])
def test_graph_replay_follows_its_inputs(length_q, length_k):
    """kv_end lives on the device: a captured step must see the cache grow."""
    query, key, value = states(length_q, length_k)
    ids, end = image_ids(2, length_k), torch.full((2,), length_k // 2, dtype=torch.int32, device="cuda")
    args = (query, key, value, ids, 2, 0.1, True, None, end, 0, 0.0, None, None, 1)
    torch.ops.ras_fast.region_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.ras_fast.region_attention(*args)
    end.fill_(length_k)
    query.copy_(torch.randn_like(query))
    graph.replay()
    for actual, expected in zip(captured, torch.ops.ras_fast.region_attention(*args), strict=True):
        torch.testing.assert_close(actual, expected)
