"""The Triton norm kernel: the ops' Triton twins against the reference, interpreted on the CPU unless a GPU is there."""

import pytest
import torch

import ras_fast
from ras_fast import ops

pytest.importorskip("triton")
norm = pytest.importorskip("ras_fast.triton_kernels.norm")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def steering(slots, alphas, d, dtype=torch.float32):
    return {
        "steer_vectors": rand(3, d, dtype=dtype),
        "steer_slot": torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        "steer_alpha": torch.tensor(alphas, device=DEVICE),
    }


def both(x, residual, weight, bias, *, rms, **kwargs):
    """The outputs of the Triton kernel and of the reference for the same call."""
    outputs = []
    for backend in ("triton", "torch"):
        ras_fast.set_backend(backend)
        try:
            if rms:
                outputs.append(ops.add_rms_norm(x, residual, weight, 1e-5, **kwargs))
            else:
                outputs.append(ops.add_layer_norm(x, residual, weight, bias, 1e-5, **kwargs))
        finally:
            ras_fast.set_backend("auto")
    return outputs


def assert_agree(x, residual, weight, bias, *, rms, **kwargs):
    for actual, expected in zip(*both(x, residual, weight, bias, rms=rms, **kwargs), strict=True):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        # Of x's type even for the fp32 dots: Triton's interpreter cuts bfloat16 off where the hardware rounds.
        ulp = 2 * ULP[x.dtype]
        scale = 1 + expected.nan_to_num(0).abs().amax().item() if expected.numel() else 0
        torch.testing.assert_close(actual, expected, rtol=2 * ulp, atol=ulp * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 768, 769, 5120, 8191])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_odd_and_even_widths(d, dtype, rms):
    x, residual, weight, bias = rand(3, d, dtype=dtype), rand(3, d, dtype=dtype), rand(d, dtype=dtype), rand(d, dtype=dtype)
    for rounding in ("hf", "fp32"):
        assert_agree(x, residual, weight, bias, rms=rms, rounding=rounding)


# Three roundings one after the other show that Triton's interpreter cuts bfloat16 off.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("d", [7, 768, norm.MAX_BLOCK + 1])
def test_x_with_a_norm_of_its_own(d, offset, dtype):
    x, residual, weight, x_weight = (rand(*shape, d, dtype=dtype) for shape in ((3,), (3,), (), ()))
    for rounding in ("hf", "fp32"):
        settings = {"weight_offset": offset, "rounding": rounding, "x_weight": x_weight}
        assert_agree(x, residual, weight, None, rms=True, **settings)
        steer = steering([1, -1, 0], [0.5, 0.5, 0.5], d) | {"probes": rand(2, d) / d**0.5}
        assert_agree(x, None, weight, None, rms=True, **settings, **steer)
        assert_agree(x, residual, weight, None, rms=True, scale=rand(1), **settings, **steer)


@pytest.mark.parametrize("d", [norm.MAX_BLOCK + 1, 2 * norm.MAX_BLOCK])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_rows_longer_than_registers(d, rms):
    x, residual, weight = rand(2, d, dtype=torch.float16), rand(2, d, dtype=torch.float16), rand(d)
    steer = steering([1, -1], [0.5, 0.5], d)
    assert_agree(x, residual, weight, rand(d), rms=rms, probes=rand(2, d) / d**0.5, **steer)


@pytest.mark.parametrize("d", [96, 769, norm.MAX_BLOCK + 1])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_in_place_writes_what_the_functional_op_returns(backend, d, rms):
    x, residual, weight = rand(4, d, dtype=torch.float16), rand(4, d, dtype=torch.float16), rand(d)
    name, rest = ("add_rms_norm", ()) if rms else ("add_layer_norm", (rand(d),))
    kwargs = steering([0, -1, 2, 7], [0.5, 0.5, -0.3, 1.0], d) | {"probes": rand(2, d)}
    expected = getattr(ops, name)(x, residual, weight, *rest, 1e-5, **kwargs)
    actual = getattr(ops, name + "_")(x.clone(), residual.clone(), weight, *rest, 1e-5, **kwargs)
    for written, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(written, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steering(dtype, rms, mode):
    """Every kind of row at once: none, alpha 0, steered, NaN alpha, slots that name no vector."""
    d = 96
    x, residual, weight = rand(2, 4, d, dtype=dtype), rand(2, 4, d, dtype=dtype), rand(d, dtype=dtype)
    steer = steering([-1, 0, 1, 2, 2, -2, 3, 0], [0.5, 0.0, 0.7, -1.5, torch.nan, 0.5, 0.5, 1.0], d, dtype)
    assert_agree(x, residual, weight, None, rms=rms, steer_mode=mode, probes=rand(2, d), **steer)


@pytest.mark.parametrize("mode", ["add", "lerp"])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_unsteered_rows_are_bit_identical(rms, mode):
    x, residual, weight = (rand(*s, dtype=torch.bfloat16) for s in ((4, 200), (4, 200), (200,)))
    steer = steering([-1, 0, -1, 2], [1.0, 0.0, torch.nan, 1.0], 200)
    steer["steer_vectors"].fill_(torch.nan)
    (plain_y, plain_h, _), _ = both(x, residual, weight, None, rms=rms)
    (y, h, _), _ = both(x, residual, weight, None, rms=rms, steer_mode=mode, **steer)
    assert torch.equal(y[:3], plain_y[:3])
    assert torch.equal(h[:3], plain_h[:3])
    assert y[3].isnan().all()


def test_strides_without_copies():
    wide = rand(2, 4, 2, 130, dtype=torch.float16)
    weight = rand(65)
    merged, apart = wide[:1, ::2, 0, :65].expand(2, 2, 65), wide.permute(2, 1, 0, 3)[:, :3, :, 65:]
    for x in (merged, apart, wide[0, 0, 0, :65]):
        residual = rand(*x.shape, dtype=torch.float16)
        assert_agree(x, residual, weight, None, rms=True)
        assert_agree(residual, x, weight, None, rms=True)
    assert_agree(apart, apart, weight, None, rms=False)


@pytest.mark.parametrize("settings", [{"steer_mode": "add"}, {"steer_mode": "lerp"}, {"weight_offset": 1.0}], ids=str)
def test_rounds_where_the_reference_rounds(settings):
    """A value rounded once more or once less shows in every third element, of which no one is off by more than a unit."""
    steer = steering([1, 2, 1, 2], [0.7, -1.5, 0.3, 0.6], 1000) if "steer_mode" in settings else {}
    x, residual, weight = rand(4, 1000, dtype=torch.float16), rand(4, 1000, dtype=torch.float16), rand(1000)
    (y, h, _), (expected_y, expected_h, _) = both(x, residual, weight, None, rms=True, **settings, **steer)
    assert (y != expected_y).float().mean() < 0.02
    assert (h != expected_h).float().mean() < 0.02


def test_tables_of_any_stride():
    x, weight = rand(3, 33), rand(33)
    steer, wide = steering([1, -1, 2], [0.5, 0.5, -0.3], 33), rand(3, 40)
    assert_agree(x, None, weight, None, rms=True, probes=wide[:, 7:], **steer | {"steer_vectors": wide[:, :33]})


def test_no_residual_and_weight_offset():
    x, weight = rand(5, 64, dtype=torch.bfloat16), rand(64)
    assert_agree(x, None, weight, None, rms=True, weight_offset=1.0)
    for rms in (True, False):
        assert_agree(x, None, weight, None, rms=rms, probes=rand(1, 64), **steering([0] * 5, [0.5] * 5, 64))


def test_empty_batch():
    assert_agree(rand(0, 64), rand(0, 64), rand(64), None, rms=True, probes=rand(2, 64))
