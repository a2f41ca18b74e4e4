"""add_rms_norm and add_layer_norm: the CPU kernel and the reference against float64, and the contract's edge cases."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import ras_fast
from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, a prime, one short of and one past a vector, LLaVA's and Llama's widths, an odd large one.
WIDTHS = [1, 7, 15, 17, 768, 769, 5120, 8191]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def exact_norm(x, residual, weight, bias, eps, *, rms, offset=0.0):
    """The unsteered norm in float64, without any rounding."""
    h = x.double() + (0 if residual is None else residual.double())
    centred = h if rms else h - h.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)
    return (y if bias is None else y + bias.double()), h


def torchs_own(x, residual, weight, bias, eps, *, rms):
    h = x if residual is None else x + residual
    if rms:
        return functional.rms_norm(h, weight.shape, weight, eps), h
    return functional.layer_norm(h, weight.shape, weight, bias, eps), h


def call(x, residual, weight, bias, eps, *, rms, **kwargs):
    if rms:
        return ops.add_rms_norm(x, residual, weight, eps, **kwargs)
    return ops.add_layer_norm(x, residual, weight, bias, eps, **kwargs)


@BACKENDS
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_unsteered(backend, width, dtype, rms, rounding):
    x, residual = torch.randn(2, 5, width).to(dtype), torch.randn(2, 5, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    bias = None if rms else torch.randn(width).to(dtype)
    y, h, dots = call(x, residual, weight, bias, 1e-5, rms=rms, rounding=rounding)
    assert dots is None
    assert y.dtype == h.dtype == dtype
    exact_y, exact_h = exact_norm(x, residual, weight, bias, 1e-5, rms=rms)
    torch_y, torch_h = torchs_own(x, residual, weight, bias, 1e-5, rms=rms)
    # In "hf" the normalised value is rounded once more than in torch's own rms_norm: one more ulp of y.
    slack = 4 * ULP[dtype] * exact_y.abs().max().item()
    for actual, exact, own in ((y, exact_y, torch_y), (h, exact_h, torch_h)):
        error, allowed = (actual.double() - exact).abs().max(), 2 * (own.double() - exact).abs().max() + slack
        assert error <= allowed


@BACKENDS
@pytest.mark.parametrize("rms", [True, False])
def test_without_residual_h_is_x(backend, rms):
    x, weight = torch.randn(3, 64), torch.randn(64)
    y, h, _ = call(x, None, weight, None, 1e-6, rms=rms)
    assert h is x
    torch.testing.assert_close(y.double(), exact_norm(x, None, weight, None, 1e-6, rms=rms)[0], atol=1e-5, rtol=1e-5)
    assert call(x, None, weight, None, 1e-6, rms=rms, steer_mode="lerp", **steering(3, 64))[1] is x


def steering(tokens, width, vectors=3, dtype=torch.float32):
    slot = torch.randint(-1, vectors, (tokens,), dtype=torch.int32)
    return {
        "steer_vectors": torch.randn(vectors, width).to(dtype),
        "steer_slot": slot,
        "steer_alpha": torch.rand(tokens),
    }


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("rms", [True, False])
def test_steered(backend, rms, mode, dtype):
    width, tokens = 769, 12
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((tokens, width), (tokens, width), (width,)))
    steer = steering(tokens, width, dtype=dtype)
    y, h, _ = call(x, residual, weight, None, 1e-6, rms=rms, steer_mode=mode, rounding="fp32", **steer)
    alpha = torch.where(steer["steer_slot"] < 0, 0, steer["steer_alpha"]).double()[:, None]
    direction = steer["steer_vectors"][steer["steer_slot"].clamp(min=0).long()].double()
    if mode == "add":
        exact_y, exact_h = exact_norm(x, residual.double() + alpha * direction, weight, None, 1e-6, rms=rms)
    else:
        exact_y, exact_h = exact_norm(x, residual, weight, None, 1e-6, rms=rms)
        exact_y = (1 - alpha) * exact_y + alpha * direction
    for actual, exact in ((y, exact_y), (h, exact_h)):
        torch.testing.assert_close(actual.double(), exact, atol=4 * ULP[dtype], rtol=4 * ULP[dtype])


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("rms", [True, False])
def test_unsteered_rows_are_bit_identical(backend, rms, mode, dtype):
    """Slot −1 and α = 0 take the unsteered path, whatever the vectors hold."""
    x, residual, weight = torch.randn(6, 96).to(dtype), torch.randn(6, 96).to(dtype), torch.randn(96).to(dtype)
    plain_y, plain_h, _ = call(x, residual, weight, None, 1e-6, rms=rms)
    y, h, _ = call(
        x, residual, weight, None, 1e-6, rms=rms, steer_mode=mode,
        steer_vectors=torch.full((2, 96), torch.nan).to(dtype),
        steer_slot=torch.tensor([-1, 0, 1, -1, 0, 1], dtype=torch.int32),
        steer_alpha=torch.tensor([0.5, 0.0, 0.0, torch.nan, 0.0, 1.0]),
    )  # fmt: skip
    assert torch.equal(y[:5], plain_y[:5])
    assert torch.equal(h[:5], plain_h[:5])
    assert y[5].isnan().all()


@BACKENDS
@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("alpha", [torch.nan, torch.inf])
def test_non_finite_alpha_stays_in_its_row(backend, alpha, mode):
    x, weight = torch.randn(4, 40), torch.randn(40)
    strengths = torch.tensor([0.5, alpha, 0.5, 0.5])
    y, _, _ = ops.add_rms_norm(
        x, None, weight, 1e-6, steer_vectors=torch.randn(1, 40), steer_slot=torch.zeros(4, dtype=torch.int32),
        steer_alpha=strengths, steer_mode=mode,
    )  # fmt: skip
    assert not y[1].isfinite().all()
    assert y[[0, 2, 3]].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("slot", [-2, 3, 2**31 - 1, -(2**31)])
def test_slot_out_of_range_poisons_its_row_only(backend, slot, mode):
    """It cannot raise without a host sync, and must never pass for "not steered"."""
    x, residual, weight = torch.randn(3, 33), torch.randn(3, 33), torch.randn(33)
    slots = torch.tensor([-1, slot, 2], dtype=torch.int32)
    y, h, dots = ops.add_rms_norm(
        x, residual, weight, 1e-6, steer_vectors=torch.randn(3, 33), steer_slot=slots, steer_alpha=torch.ones(3),
        steer_mode=mode, probes=torch.randn(1, 33),
    )  # fmt: skip
    for output in (y, h, dots):
        assert output[1].isnan().all()
        assert output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("settings", [{"steer_mode": "add"}, {"steer_mode": "lerp"}, {"weight_offset": 1.0}], ids=str)
def test_rounds_where_the_reference_rounds(settings):
    """A value rounded once more or once less shows in every third element, of which no one is off by more than a unit."""
    x, residual, weight = torch.randn(6, 1000).bfloat16(), torch.randn(6, 1000).bfloat16(), torch.randn(1000)
    steer = steering(6, 1000) if "steer_mode" in settings else {}
    found = ops.add_rms_norm(x, residual, weight, 1e-6, **settings, **steer)
    ras_fast.set_backend("torch")
    try:
        expected = ops.add_rms_norm(x, residual, weight, 1e-6, **settings, **steer)
    finally:
        ras_fast.set_backend("auto")
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        assert (actual != wanted).float().mean() < 0.02


@BACKENDS
@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("bits", [0x7F800001, -1])
@pytest.mark.parametrize("where", ["steer_alpha", "steer_vectors", "weight"])
def test_nan_of_any_bits_is_nan_in_the_output(backend, where, bits, mode):
    """Rounded to bfloat16 carelessly it would be infinite or 0."""
    given = {"steer_vectors": torch.ones(1, 40), "steer_slot": torch.zeros(2, dtype=torch.int32),
             "steer_alpha": torch.full((2,), 0.5), "weight": torch.ones(40)}  # fmt: skip
    given[where].view(torch.int32).fill_(bits)
    x = torch.randn(2, 40).bfloat16()
    assert ops.add_rms_norm(x, None, eps=1e-6, steer_mode=mode, **given)[0].isnan().all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_probes(backend, dtype):
    """Dots with h as the norm sees it, steering included, and its squared norm."""
    x, residual, weight = torch.randn(2, 3, 769).to(dtype), torch.randn(2, 3, 769).to(dtype), torch.randn(769).to(dtype)
    probes, steer = torch.randn(4, 769), steering(6, 769, dtype=dtype)
    _, h, dots = ops.add_rms_norm(x, residual, weight, 1e-6, probes=probes, **steer)
    flat = h.double().view(6, 769)
    exact = torch.cat([flat @ probes.double().T, flat.square().sum(-1, keepdim=True)], -1)
    assert dots.dtype == torch.float32
    torch.testing.assert_close(dots.double(), exact, atol=2e-3, rtol=1e-5)


@BACKENDS
def test_weight_offset_is_gemmas_one_plus_w(backend):
    x, weight = torch.randn(4, 64), torch.randn(64)
    y, _, _ = ops.add_rms_norm(x, None, weight, 1e-6, weight_offset=1.0)
    expected, _ = exact_norm(x, None, weight, None, 1e-6, rms=True, offset=1.0)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@BACKENDS
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_x_with_a_norm_of_its_own(backend, width, dtype, offset, rounding):
    x, residual = 5 * torch.randn(2, 3, width).to(dtype), torch.randn(2, 3, width).to(dtype)
    weight, x_weight = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    settings = {"weight_offset": offset, "rounding": rounding}
    y, h, _ = ops.add_rms_norm(x, residual, weight, 1e-5, x_weight=x_weight, **settings)
    normed, _ = exact_norm(x, None, x_weight, None, 1e-5, rms=True, offset=offset)
    exact_y, exact_h = exact_norm(normed, residual, weight, None, 1e-5, rms=True, offset=offset)
    for actual, exact in ((h, exact_h), (y, exact_y)):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=6 * ULP[dtype] * (1 + exact.abs().max().item()))


@BACKENDS
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_with_a_norm_of_its_own_is_one_call_for_two(backend, dtype, offset):
    """Bit for bit, steered, read by probes, with tables of another dtype, and without a residual."""
    for width in (33, 768):
        x, residual = torch.randn(6, width).to(dtype), torch.randn(6, width).to(dtype)
        weight, x_weight, probes = torch.randn(width), torch.randn(width), torch.randn(2, width)
        settings = {"weight_offset": offset, "probes": probes}
        normed, _, _ = ops.add_rms_norm(x, None, x_weight, 1e-5, weight_offset=offset)
        for added in (residual, None):
            for mode in ("add", "lerp"):
                steer = steering(6, width) | {"steer_mode": mode}
                expected = ops.add_rms_norm(normed, added, weight, 1e-5, **settings, **steer)
                found = ops.add_rms_norm(x, added, weight, 1e-5, x_weight=x_weight, **settings, **steer)
                for actual, wanted in zip(found, expected, strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
        own_x, own_residual = x.clone(), residual.clone()
        expected = ops.add_rms_norm(x, residual, weight, 1e-5, x_weight=x_weight, **settings)
        written = ops.add_rms_norm_(own_x, own_residual, weight, 1e-5, x_weight=x_weight, **settings)
        for actual, wanted in zip(written, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@BACKENDS
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_x_is_scaled_before_it_is_added(backend, width, dtype, rounding):
    """As eager code does it, bit for bit, in every dtype: the product is rounded, and not fused into the sum."""
    x, residual, weight = (torch.randn(*shape, width).to(dtype) for shape in ((2, 3), (2, 3), ()))
    for added in (residual, None):
        y, h, _ = ops.add_rms_norm(x, added, weight, 1e-5, x_scale=0.22, rounding=rounding)
        eager = x * 0.22 if added is None else added + x * 0.22
        if rounding == "hf":
            assert torch.equal(h, eager)
        else:
            eager = x.float() * 0.22 + (0 if added is None else added.float())
            torch.testing.assert_close(h.float(), eager, rtol=ULP[dtype], atol=ULP[dtype])
        exact, _ = exact_norm(eager, None, weight, None, 1e-5, rms=True)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=6 * ULP[dtype] * (1 + exact.abs().max().item()))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_is_scaled_beside_all_else(backend, dtype):
    """Bit for bit what it gives when x is scaled first: steered, read, in place; and behind a norm of its own."""
    for width in (33, 768):
        x, residual, weight, x_weight = (torch.randn(*shape, width).to(dtype) for shape in ((6,), (6,), (), ()))
        normed, _, _ = ops.add_rms_norm(x, None, x_weight, 1e-5)
        for mode in ("add", "lerp"):
            settings = steering(6, width) | {"steer_mode": mode, "probes": torch.randn(2, width)}
            for own, branch in (({}, x), ({"x_weight": x_weight}, normed)):
                expected = ops.add_rms_norm(branch * -1.7, residual, weight, 1e-5, **settings)
                found = ops.add_rms_norm(x, residual, weight, 1e-5, x_scale=-1.7, **own, **settings)
                written = ops.add_rms_norm_(x.clone(), residual.clone(), weight, 1e-5, x_scale=-1.7, **own, **settings)
                for actual, in_place, wanted in zip(found, written, expected, strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
                    torch.testing.assert_close(in_place, wanted, rtol=0, atol=0, equal_nan=True)


@BACKENDS
def test_a_factor_that_is_no_number_is_seen(backend):
    x, weight = torch.randn(2, 40, dtype=torch.bfloat16), torch.randn(40, dtype=torch.bfloat16)
    y, h, _ = ops.add_rms_norm(x, x, weight, 1e-5, x_scale=math.nan)
    assert y.isnan().all()
    assert h.isnan().all()


@BACKENDS
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("scale_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_scaled_before_it_is_steered(backend, dtype, scale_dtype, rounding):
    for width in (33, 768):
        x, residual = torch.randn(6, width).to(dtype), torch.randn(6, width).to(dtype)
        weight, x_weight, scale = torch.randn(width).to(dtype), torch.randn(width).to(dtype), torch.tensor([0.37])
        scale = scale.to(scale_dtype or dtype)
        settings = {"rounding": rounding, "x_weight": x_weight}
        _, plain, _ = ops.add_rms_norm(x.float(), residual.float(), weight.float(), 1e-5, x_weight=x_weight.float())
        _, h, _ = ops.add_rms_norm(x, residual, weight, 1e-5, scale=scale, **settings)
        exact = plain.double() * scale.double()
        torch.testing.assert_close(h.double(), exact, rtol=0, atol=4 * ULP[dtype] * (1 + exact.abs().max().item()))
        for mode in ("add", "lerp"):
            steer = steering(6, width) | {"steer_mode": mode, "probes": torch.randn(2, width)}
            y, steered, dots = ops.add_rms_norm(x, residual, weight, 1e-5, scale=scale, **settings, **steer)
            expected = ops.add_rms_norm(h, None, weight, 1e-5, rounding=rounding, **steer)
            own = x.clone(), residual.clone()
            written = ops.add_rms_norm_(*own, weight, 1e-5, scale=scale, **settings, **steer)
            for actual, wanted in zip(written, (y, steered, dots), strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
            if rounding == "hf":  # then the kernel holds what it stores
                for actual, wanted in zip((y, steered, dots), expected, strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


@BACKENDS
def test_a_scale_that_is_no_number_is_seen(backend):
    bits = torch.tensor([-1], dtype=torch.int32)  # a NaN that rounding could lose
    x, weight = torch.randn(2, 40, dtype=torch.bfloat16), torch.randn(40, dtype=torch.bfloat16)
    y, h, _ = ops.add_rms_norm(x, x, weight, 1e-5, x_weight=weight, scale=bits.view(torch.float32))
    assert y.isnan().all()
    assert h.isnan().all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_x_with_a_norm_of_its_own_as_in_gemma(backend, dtype):
    """The sum of a residual and a norm's output, where Hugging Face's code rounds."""
    module = copy.deepcopy(hf_modules()["gemma3"][0])
    module.weight.normal_()
    module = module.to(dtype)
    x, residual = 9 * torch.randn(64, 256).to(dtype), torch.randn(64, 256).to(dtype)
    _, h, _ = ops.add_rms_norm(x, residual, module.weight, 1e-6, weight_offset=1.0, x_weight=module.weight)
    eager = residual + module(x)
    assert (h != eager).float().mean() < 0.02 or dtype == torch.float32
    torch.testing.assert_close(h, eager, rtol=2 * ULP[dtype], atol=2 * ULP[dtype] * eager.abs().max().item())


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_without_copies(backend, dtype):
    """Sliced, transposed and expanded leading dimensions; only the last must be contiguous."""
    weight = torch.randn(65).to(dtype)
    wide = torch.randn(4, 6, 130).to(dtype)
    views = [wide[:, ::2, :65], wide[:, :5, :65], wide.transpose(0, 1)[..., 65:], wide[:1, :1, :65].expand(3, 5, 65),
             wide[0, :, :65]]  # fmt: skip
    for x in views:
        residual = torch.randn(x.shape).to(dtype)
        for first, second in ((x, residual), (residual, x), (x, x)):
            y, h, _ = ops.add_rms_norm(first, second, weight, 1e-6)
            dense_y, dense_h, _ = ops.add_rms_norm(first.contiguous(), second.contiguous(), weight, 1e-6)
            assert torch.equal(y, dense_y)
            assert torch.equal(h, dense_h)
            assert y.is_contiguous()


@BACKENDS
def test_inputs_are_not_written(backend):
    x = torch.randn(4, 48)
    before = x.clone()
    ops.add_rms_norm(x, x, torch.ones(48), 1e-6, **steering(4, 48))
    assert torch.equal(x, before)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty_batch(backend, shape):
    y, h, dots = ops.add_rms_norm(torch.empty(shape), torch.empty(shape), torch.ones(64), 1e-6, probes=torch.randn(2, 64))
    assert y.shape == h.shape == shape
    assert dots.shape == (0, 3)


@BACKENDS
def test_mixed_dtype_tables(backend):
    x, residual = torch.randn(5, 70).bfloat16(), torch.randn(5, 70).bfloat16()
    weight, steer = torch.randn(70), steering(5, 70, dtype=torch.float16)
    y, h, _ = ops.add_rms_norm(x, residual, weight, 1e-6, rounding="fp32", **steer)
    alpha = torch.where(steer["steer_slot"] < 0, 0, steer["steer_alpha"]).double()[:, None]
    push = alpha * steer["steer_vectors"][steer["steer_slot"].clamp(min=0).long()].double()
    exact_y, exact_h = exact_norm(x, residual.double() + push, weight, None, 1e-6, rms=True)
    torch.testing.assert_close(y.double(), exact_y, atol=0.02, rtol=2**-7)
    torch.testing.assert_close(h.double(), exact_h, atol=0.02, rtol=2**-7)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("converted", [True, False])
def test_tables_whose_rows_overlap(backend, dtype, converted):
    """Windows over one buffer, of a dtype that the kernel converts or reads as it is."""
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(8).to(dtype)
    table = torch.randn(12).to(torch.float16 if converted else dtype).unfold(0, 8, 1)
    steer = steering(3, 8) | {"steer_slot": torch.tensor([4, -1, 2], dtype=torch.int32)}
    found, expected = (
        ops.add_rms_norm(x, None, weight, 1e-6, probes=rows, **steer | {"steer_vectors": rows})
        for rows in (table, table.contiguous())
    )
    tolerance = 1e-6 if backend == "torch" else 0  # its products of a matrix depend on how it lies in memory, by a rounding
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("alpha", [torch.inf, -torch.inf])
def test_infinite_alpha_in_a_row_of_any_width(backend, alpha, rms, dtype):
    """What fills a row's last vector is no part of it: ∞ · 0 there must not reach the sums."""
    steer = {"steer_vectors": torch.ones(1, 33).to(dtype), "steer_slot": torch.zeros(2, dtype=torch.int32)}
    x, weight, probes = torch.randn(2, 33).to(dtype), torch.ones(33).to(dtype), torch.ones(1, 33).to(dtype)
    steer["steer_alpha"] = torch.full((2,), alpha)
    for rounding in ("hf", "fp32"):
        _, _, dots = call(x, None, weight, None, 1e-6, rms=rms, rounding=rounding, probes=probes, **steer)
        assert torch.equal(dots, torch.tensor([[alpha, torch.inf]] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [True, False])
def test_nan_in_one_row_stays_there(rms, dtype):
    x = torch.randn(3, 100).to(dtype)
    x[1, 37] = torch.nan
    y, h, _ = call(x, x, torch.ones(100).to(dtype), None, 1e-6, rms=rms)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert h[1].isnan().sum() == 1


def hf_modules():
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer  # noqa: F401  (its norms are nn.LayerNorm)
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    width = 256
    return {
        "llama": (LlamaRMSNorm(width, 1e-6), 0.0),
        "qwen2": (Qwen2RMSNorm(width, 1e-6), 0.0),
        "gemma": (GemmaRMSNorm(width, 1e-6), 1.0),
        "gemma3": (Gemma3RMSNorm(width, 1e-6), 1.0),
        "clip": (torch.nn.LayerNorm(width, 1e-5), 0.0),
    }


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma3", "clip"])
@torch.no_grad()
def test_rounds_where_hugging_face_rounds(backend, family, dtype):
    """Within one ulp of the module applied to the eager sum, in every element; the sum itself bit for bit."""
    module, offset = hf_modules()[family]
    module.weight.normal_()
    module = copy.deepcopy(module).to(dtype)
    x, residual = torch.randn(64, 256).to(dtype) * 3, torch.randn(64, 256).to(dtype)
    eager_h = residual + x
    eager_y = module(eager_h)
    if family == "clip":
        y, h, _ = ops.add_layer_norm(x, residual, module.weight, module.bias, 1e-5)
    else:
        y, h, _ = ops.add_rms_norm(x, residual, module.weight, 1e-6, weight_offset=offset)
    assert torch.equal(h, eager_h)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 4e-6}[dtype]
    torch.testing.assert_close(y, eager_y, rtol=tolerance, atol=4e-6 if dtype == torch.float32 else 2**-14)


def steered_args(dtype=torch.float32):
    x, residual = torch.randn(2, 3, 40).to(dtype), torch.randn(2, 3, 40).to(dtype)
    steer = steering(6, 40, dtype=dtype)
    return x, residual, torch.randn(40).to(dtype), 1e-6, *steer.values(), False, 0.0, True, torch.randn(2, 40), None, 1.0, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", ["plain", "steered", "lerp", "no_residual", "lerp_without_residual", "x_weight", "x_scale", "scale"]
)
def test_opcheck(case, dtype):
    args = list(steered_args(dtype))
    if case == "plain":
        args[4:7], args[10] = [None] * 3, None
    elif case == "lerp":
        args[7] = True
    elif case == "no_residual":
        args[1], args[4:7] = None, [None] * 3
    elif case == "lerp_without_residual":
        args[1], args[7] = None, True
    elif case == "x_weight":
        args[1], args[7], args[11] = None, True, torch.randn(40).to(dtype)
    elif case == "x_scale":  # h is another than x even where nothing is added
        args[1], args[4:7], args[12] = None, [None] * 3, 0.5
    elif case == "scale":
        args[11], args[13] = torch.randn(40).to(dtype), torch.randn(1)
    torch.library.opcheck(torch.ops.ras_fast.add_rms_norm.default, tuple(args))
    layer = (*args[:3], None, *args[3:8], *args[9:11])
    torch.library.opcheck(torch.ops.ras_fast.add_layer_norm.default, layer)


def test_compiles_without_graph_breaks():
    def block(x, residual, weight, vectors, slot, alpha):
        y, h, dots = ops.add_rms_norm(x, residual, weight, 1e-6, steer_vectors=vectors, steer_slot=slot, steer_alpha=alpha,
                                      probes=vectors, x_weight=weight)  # fmt: skip
        return y * 2, h, dots

    args = steered_args()
    args = (*args[:3], *args[4:7])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(block(*args), compiled(*args), strict=True):
        torch.testing.assert_close(eager, traced)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    rms=st.booleans(),
    lerp=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_kernel_agrees_with_reference(shape, width, dtype, rms, lerp, seed):
    torch.manual_seed(seed)
    x, residual, weight = (torch.randn(*size).to(dtype) for size in ((*shape, width), (*shape, width), (width,)))
    tokens = x.numel() // width
    kwargs = steering(tokens, width, dtype=dtype) | {"steer_mode": "lerp" if lerp else "add", "probes": torch.randn(2, width)}
    outputs = {}
    for name in ("cpu", "torch"):
        ras_fast.set_backend(name)
        try:
            outputs[name] = call(x, residual, weight, None, 1e-6, rms=rms, **kwargs)
        finally:
            ras_fast.set_backend("auto")
    for actual, expected in zip(outputs["cpu"], outputs["torch"], strict=True):
        scale = expected.abs().max().item() if expected.numel() else 0.0
        # A width-1 layer norm divides rounding noise by sqrt(eps): a thousandfold.
        magnified = 1e3 if not rms and width < 4 else 4
        torch.testing.assert_close(actual, expected, rtol=4 * ULP[dtype], atol=magnified * ULP[dtype] * (1 + scale))


@BACKENDS
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
def test_in_place_writes_what_the_functional_op_returns(backend, rms, dtype, rounding):
    """Bit for bit, steered rows, probes and a slot that poisons its row included; the buffers stay where they are."""
    for width in (1, 31, 96, 5001):
        x, residual, weight = (torch.randn(*shape, width).to(dtype) for shape in ((2, 3), (2, 3), ()))
        for mode in ("add", "lerp"):
            kwargs = steering(6, width, dtype=dtype) | {"steer_mode": mode, "rounding": rounding}
            kwargs["probes"] = torch.randn(2, width)
            kwargs["steer_slot"][4] = 99
            expected = call(x, residual, weight, None, 1e-5, rms=rms, **kwargs)
            own_x, own_residual = x.clone(), residual.clone()
            name = "add_rms_norm_" if rms else "add_layer_norm_"
            versions = own_x._version, own_residual._version
            y, h, dots = getattr(ops, name)(own_x, own_residual, weight, *(() if rms else (None,)), 1e-5, **kwargs)
            assert y is own_x
            assert h is own_residual
            assert own_x._version > versions[0]
            assert own_residual._version > versions[1]
            for actual, wanted in zip((y, h, dots), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
            assert getattr(ops, name)(own_x, own_residual, weight, *(() if rms else (None,)), 1e-5)[2] is None


@BACKENDS
def test_in_place_refuses_what_it_would_corrupt(backend):
    x, weight = torch.randn(4, 16), torch.ones(8)
    whole = torch.randn(5, 8)
    for arguments, message in [
        ((x[:, :8], torch.randn(4, 8)), "x is with strides"),
        ((torch.randn(4, 8), x[:, 8:]), "residual is with strides"),
        ((whole[:4], whole[:4]), "residual is overlapping x"),
        ((whole[:4], whole[1:]), "residual is overlapping x"),
        ((torch.randn(4, 8), None), "residual is None"),
        ((torch.randn(4, 8), torch.randn(4, 7)), "residual is of shape"),
    ]:
        before = [None if tensor is None else tensor.clone() for tensor in arguments]
        for function, rest in ((ops.add_rms_norm_, (weight,)), (ops.add_layer_norm_, (weight, None))):
            with pytest.raises(ValueError, match=message):
                function(*arguments, *rest, 1e-6)
        assert all(old is None or torch.equal(old, new) for old, new in zip(before, arguments, strict=True))
    ops.add_rms_norm_(whole[:2], whole[2:4], weight, 1e-6)  # neighbours do not overlap


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_in_place(dtype):
    args = list(steered_args(dtype))
    torch.library.opcheck(torch.ops.ras_fast.add_rms_norm_.default, tuple(args))
    torch.library.opcheck(torch.ops.ras_fast.add_layer_norm_.default, (*args[:3], None, *args[3:8], *args[9:11]))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_in_place_without_addresses(device):
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x, residual, weight = torch.empty(3, 8), torch.empty(3, 8), torch.empty(8)
        assert ops.add_rms_norm_(x, residual, weight, 1e-6)[0] is x


def test_in_place_under_functionalize():
    """What torch says of it, not that two tensors without addresses overlap."""

    def block(x, residual):
        return ops.add_rms_norm_(x, residual, w, 1e-6)[0]

    with pytest.raises(RuntimeError, match="custom"):
        torch.func.functionalize(block)(torch.randn(3, 8), torch.randn(3, 8))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_bad_arguments_are_named_without_values(device):
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x, weight = torch.empty(3, 8), torch.empty(7)
        with pytest.raises(ValueError, match="weight is of shape"):
            ops.add_rms_norm(x, None, weight, 1e-6)


def test_in_place_compiles_without_graph_breaks():
    def block(x, residual, weight):
        y, h, _ = ops.add_rms_norm_(x * 2, residual, weight, 1e-6)
        return y + 1, h

    x, residual, weight = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    expected_residual = residual.clone()
    expected, _ = block(x, expected_residual, weight)
    actual, _ = torch.compile(block, fullgraph=True, backend="aot_eager")(x, residual, weight)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(residual, expected_residual)



x, w = torch.zeros(2, 8), torch.zeros(8)
ok = {"steer_vectors": torch.zeros(2, 8), "steer_slot": torch.zeros(2, dtype=torch.int32), "steer_alpha": torch.zeros(2)}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(()), None, w, 1e-6), {}, "x is of shape"),
        ((torch.zeros(2, 8, dtype=torch.int32), None, w, 1e-6), {}, "x is of dtype torch.int32"),
        ((torch.zeros(8, 2).T, None, w, 1e-6), {}, "x is of strides"),
        ((x, torch.zeros(2, 7), w, 1e-6), {}, "residual is of shape"),
        ((x, x.bfloat16(), w, 1e-6), {}, "residual is of dtype"),
        ((x, x.to("meta"), w, 1e-6), {}, "residual is on device meta"),
        ((x, None, torch.zeros(7), 1e-6), {}, "weight is of shape"),
        ((x, None, None, 1e-6), {}, r"weight is None; it must be a tensor \[d\]"),
        ((x, None, w, 1e-6), {"rounding": "up"}, "rounding is 'up'"),
        ((x, None, w, 1e-6), {"steer_mode": "mul"}, "steer_mode is 'mul'"),
        ((x, None, w, 1e-6), {"steer_vectors": torch.zeros(2, 8)}, "steer_slot is None"),
        ((x, None, w, 1e-6), ok | {"steer_vectors": torch.zeros(2, 7)}, "steer_vectors is of shape"),
        ((x, None, w, 1e-6), ok | {"steer_vectors": torch.zeros(0, 8)}, "steer_vectors is of shape"),
        ((x, None, w, 1e-6), ok | {"steer_slot": torch.zeros(2)}, "steer_slot is of dtype"),
        ((x, None, w, 1e-6), ok | {"steer_slot": torch.zeros(3, dtype=torch.int32)}, "steer_slot is of shape"),
        ((x, None, w, 1e-6), ok | {"steer_alpha": torch.zeros(2).double()}, "steer_alpha is of dtype"),
        ((x, None, w, 1e-6), {"probes": torch.zeros(8)}, "probes is of shape"),
        ((x, None, w.double(), 1e-6), {}, "weight is of dtype torch.float64; it must be float32"),
        ((x, None, w, 1e-6), {"probes": torch.zeros(1, 8).double()}, "probes is of dtype torch.float64"),
        # Behind a table that is not of x's dtype either.
        ((x.bfloat16(), None, w, 1e-6), {"probes": torch.zeros(1, 8).double()}, "probes is of dtype torch.float64"),
        ((x.bfloat16(), None, w, 1e-6), {"probes": torch.zeros(1, 8).long()}, "probes is of dtype torch.int64"),
        ((x.bfloat16(), None, w, 1e-6), ok | {"steer_vectors": torch.zeros(2, 8).bool()}, "steer_vectors is of dtype"),
    ],
)
def test_bad_arguments_are_named(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.add_rms_norm(*args, **kwargs)


def test_gradients_are_refused_not_dropped():
    weight = torch.ones(8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward"):
        ops.add_rms_norm(x, None, weight, 1e-6)
    with torch.no_grad():
        assert not ops.add_rms_norm(x, None, weight, 1e-6)[0].requires_grad


def test_forward_mode_derivatives_are_refused():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="add_rms_norm has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.add_rms_norm(x, None, weight, 1e-6)[0], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(ops.add_rms_norm(x, None, weight, 1e-6)[1], x)
        with pytest.raises(RuntimeError, match="add_layer_norm has no forward-mode derivative"):
            ops.add_layer_norm(torch.autograd.forward_ad.make_dual(x, x), None, weight, None, 1e-6)
