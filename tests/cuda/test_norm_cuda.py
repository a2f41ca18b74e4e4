"""The CUDA norm kernels on a GPU: against the float64 reference, in graphs, next to kernels they overlap with."""

import pytest
import torch

import ras_fast
from ras_fast import ops

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _cuda_backend():
    ras_fast.set_backend("cuda")
    yield
    ras_fast.set_backend("auto")


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def steering(tokens, d, dtype=torch.float32):
    return {
        "steer_vectors": rand(3, d, dtype=dtype),
        "steer_slot": torch.randint(-1, 3, (tokens,), dtype=torch.int32, device="cuda"),
        "steer_alpha": torch.rand(tokens, device="cuda"),
    }


def reference(name, *args, **kwargs):
    ras_fast.set_backend("torch")
    try:
        return getattr(ops, name)(*args, **kwargs)
    finally:
        ras_fast.set_backend("cuda")


def assert_agree(name, x, *args, **kwargs):
    expected = reference(name, x, *args, **kwargs)
    poison = torch.full((2 * x.numel() + 64,), torch.nan, device="cuda", dtype=x.dtype)
    del poison  # what the outputs are allocated from
    actual = getattr(ops, name)(x, *args, **kwargs)
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
            continue
        scale = 1 + e.nan_to_num(0).abs().amax().item() if e.numel() else 0
        torch.testing.assert_close(a, e, rtol=4 * ULP[x.dtype], atol=2 * ULP[x.dtype] * scale, equal_nan=True)


@pytest.mark.parametrize("d", [256, 769, 4096, 16384, 40001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_in_place_writes_what_the_functional_op_returns(name, dtype, d):
    x, residual, weight = rand(300, d, dtype=dtype), rand(300, d, dtype=dtype), rand(d, dtype=dtype)
    rest = (rand(d, dtype=dtype),) if name == "add_layer_norm" else ()
    kwargs = steering(300, d, dtype) | {"probes": rand(2, d)}
    expected = getattr(ops, name)(x, residual, weight, *rest, 1e-6, **kwargs)
    actual = getattr(ops, name + "_")(x.clone(), residual.clone(), weight, *rest, 1e-6, **kwargs)
    for written, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(written, wanted, rtol=0, atol=0, equal_nan=True)


# Rows of a warp, of a block with few and with many rows, longer than a block's registers, odd, unaligned.
@pytest.mark.parametrize("d", [1, 7, 256, 768, 769, 4096, 5120, 8191, 8192, 16384, 32768, 40001])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_agrees_with_the_reference(name, dtype, tokens, d):
    x, residual, weight = rand(tokens, d, dtype=dtype), rand(tokens, d, dtype=dtype), rand(d, dtype=dtype)
    bias = [] if name == "add_rms_norm" else [rand(d, dtype=dtype)]
    for rounding in ("hf", "fp32"):
        assert_agree(name, x, residual, weight, *bias, 1e-5, rounding=rounding)
    for mode in ("add", "lerp"):
        assert_agree(name, x, residual, weight, *bias, 1e-5, steer_mode=mode, probes=rand(2, d) / d**0.5, **steering(tokens, d))


@pytest.mark.parametrize("d", [7, 256, 769, 4096, 8192, 16384, 40001])
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_with_a_norm_of_its_own(dtype, tokens, d):
    x, residual, weight, x_weight = (rand(*shape, d, dtype=dtype) for shape in ((tokens,), (tokens,), (), ()))
    for offset in (0.0, 1.0):
        settings = {"x_weight": x_weight, "weight_offset": offset}
        assert_agree("add_rms_norm", x, residual, weight, 1e-5, **settings)
        for scale in (rand(1), rand(1, dtype=dtype)):
            assert_agree("add_rms_norm", x, residual, weight, 1e-5, scale=scale, **settings, **steering(tokens, d))
        assert_agree("add_rms_norm", x, None, weight, 1e-5, probes=rand(2, d) / d**0.5, **settings, **steering(tokens, d))
        written = ops.add_rms_norm_(x.clone(), residual.clone(), weight, 1e-5, **settings)
        for actual, wanted in zip(written, ops.add_rms_norm(x, residual, weight, 1e-5, **settings), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("d", [7, 256, 769, 4096, 8192, 16384, 40001])
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_is_scaled_before_it_is_added(dtype, tokens, d):
    x, residual, weight, x_weight = (rand(*shape, d, dtype=dtype) for shape in ((tokens,), (tokens,), (), ()))
    _, h, _ = ops.add_rms_norm(x, residual, weight, 1e-5, x_scale=0.22)
    assert torch.equal(h, residual + x * 0.22)
    for own in ({}, {"x_weight": x_weight}):
        assert_agree("add_rms_norm", x, residual, weight, 1e-5, x_scale=0.22, **own, **steering(tokens, d))
        assert_agree("add_rms_norm", x, None, weight, 1e-5, x_scale=0.22, rounding="fp32", **own)


@pytest.mark.parametrize("d", [512, 769, 4096, 16384])
@pytest.mark.parametrize("mode", ["add", "lerp"])
def test_unsteered_rows_are_bit_identical(mode, d):
    for tokens in (3, 600):
        x, residual, weight = (rand(*shape, dtype=torch.bfloat16) for shape in ((tokens, d), (tokens, d), (d,)))
        y, h, _ = ops.add_rms_norm(x, residual, weight, 1e-6)
        steer = {
            "steer_vectors": torch.full((1, d), torch.nan, device="cuda"),
            "steer_slot": (torch.arange(tokens, device="cuda") % 2 - 1).int(),
            "steer_alpha": torch.zeros(tokens, device="cuda"),
        }
        steered_y, steered_h, _ = ops.add_rms_norm(x, residual, weight, 1e-6, steer_mode=mode, **steer)
        assert torch.equal(y, steered_y)
        assert torch.equal(h, steered_h)


def test_bad_rows_stay_alone():
    slots = torch.tensor([-1, 0, -2, 3, 1, 0], dtype=torch.int32, device="cuda")
    alphas = torch.tensor([0.5, torch.nan, 0.0, 0.5, 0.5, torch.inf], device="cuda")
    for d in (256, 4097):
        x, weight, vectors = rand(6, d), rand(d), rand(3, d)
        y, h, _ = ops.add_rms_norm(x, x, weight, 1e-6, steer_vectors=vectors, steer_slot=slots, steer_alpha=alphas)
        for output in (y, h):
            assert output[[1, 2, 3]].isnan().all()
            assert output[[0, 4]].isfinite().all()


def test_strides_and_misaligned_pointers():
    wide = rand(4, 3, 5, 520, dtype=torch.bfloat16)
    views = [wide[..., 1:513], wide.transpose(0, 2)[..., 8:520], wide[:, :, ::2, :512], wide[:1, ..., 3:].expand(6, 3, 5, 517)]
    for x in views:
        assert_agree("add_rms_norm", x, rand(*x.shape, dtype=torch.bfloat16), rand(x.shape[-1]), 1e-6)
    assert_agree("add_rms_norm", wide, wide, rand(521)[1:], 1e-6)


def test_more_than_2_to_the_31_elements():
    rows, d = 2**19 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.zeros(rows, d, device="cuda", dtype=torch.bfloat16)
    x[-3:] = rand(3, d, dtype=torch.bfloat16)
    weight = rand(d, dtype=torch.bfloat16)
    y, _, _ = ops.add_rms_norm(x, None, weight, 1e-6)
    expected, _, _ = reference("add_rms_norm", x[-3:].clone(), None, weight, 1e-6)
    torch.testing.assert_close(y[-3:], expected, rtol=2**-7, atol=2**-8)


def test_overlapping_launches_see_finished_inputs():
    """A chain in which each call reads what the one before it wrote: started early, every call must still wait."""
    x = rand(16, 4096)
    weight = torch.ones(4096, device="cuda")
    chained = x
    for _ in range(200):
        chained, _, _ = ops.add_rms_norm(chained, x, weight, 1e-6)
    expected = x
    for _ in range(200):
        expected, _, _ = ops.add_rms_norm(expected, x, weight, 1e-6)
        torch.cuda.synchronize()
    assert torch.equal(chained, expected)


def test_cuda_graph_follows_its_buffers():
    """Risk, slots and vectors live in buffers: a replay steers by what they hold then."""
    x, residual, weight, steer = rand(8, 512), rand(8, 512), rand(512), steering(8, 512)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.add_rms_norm(x, residual, weight, 1e-6, **steer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = ops.add_rms_norm(x, residual, weight, 1e-6, **steer)
    for _ in range(3):
        x.normal_()
        steer["steer_alpha"].uniform_()
        steer["steer_slot"].random_(-1, 3)
        graph.replay()
        eager = ops.add_rms_norm(x, residual, weight, 1e-6, **steer)
        for replayed, now in zip(outputs[:2], eager[:2], strict=True):
            assert torch.equal(replayed, now)


def test_compiles_without_graph_breaks():
    def block(x, residual, weight):
        y, h, _ = ops.add_rms_norm(x * 2, residual, weight, 1e-6)
        return y + 1, h

    args = rand(4, 256), rand(4, 256), rand(256)
    for compiled, eager in zip(torch.compile(block, fullgraph=True)(*args), block(*args), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_what_would_read_out_of_bounds_is_refused():
    x, weight = rand(2, 8), rand(8)
    with pytest.raises(ValueError, match="weight"):
        ops.add_rms_norm(x, None, rand(7), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm(x, rand(2, 9), weight, 1e-6)
    with pytest.raises(ValueError, match="steer_slot"):
        ops.add_rms_norm(x, None, weight, 1e-6, **steering(2, 8) | {"steer_slot": torch.zeros_like(x[:1, 0]).int()})
    with pytest.raises((ValueError, RuntimeError), match="float"):
        ops.add_rms_norm(x, None, weight.double(), 1e-6)
