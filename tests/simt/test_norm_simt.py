"""The CUDA norm kernels (csrc/cuda/norm.cuh), run by the host emulation, against float64 with the same rounding points."""

import ctypes
import os
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

SIZES = [1, 7, 256, 769, 5120, 8191]  # one element, fewer than a vector, a row per warp, odd, block per row, odd and large
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
PRECISION = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FORMS = IntEnum("FORMS", ("unaligned", "aligned", "plain"), start=0)  # enum class NormForm
POINTER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Matrix(ctypes.Structure):
    _fields_ = [("data", POINTER), ("dtype", INT), ("stride", INT)]


class Call(ctypes.Structure):
    """Mirrors struct Call of norm_simt.cpp."""

    _fields_ = [
        *[(name, POINTER) for name in ("x", "residual", "y", "h", "probe_dots")],
        *[(name, INT * 3) for name in ("x_stride", "residual_stride", "size")],
        *[(name, Matrix) for name in ("weight", "bias", "x_weight", "scale", "steer_vectors", "probes")],
        *[(name, POINTER) for name in ("steer_slot", "steer_alpha")],
        *[(name, INT) for name in ("slot_stride", "alpha_stride", "num_slots", "num_probes", "d", "dtype")],
        *[(name, INT) for name in ("multiprocessors", "layer_norm", "hf_rounding", "lerp")],
        *[(name, DOUBLE) for name in ("eps", "weight_offset", "x_scale")],
        ("plan", INT * 5),
    ]


def encode(values, dtype):
    """float64 → the nearest values of `dtype`; bfloat16 as uint16, which numpy lacks."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def decode(array, dtype):
    if dtype != "bfloat16":
        return array.astype(np.float64)
    return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def round_to(values, dtype):
    return decode(encode(values, dtype), dtype)


class Case:
    """A call with random inputs; keyword arguments say how it differs from a plain add + RMS norm in "hf" rounding."""

    def __init__(self, size, d, dtype, *, seed=0, layer_norm=False, hf=True, residual=True, bias=True, steer=None,
                 lerp=False, probes=0, weight_dtype=None, weight_offset=0.0, multiprocessors=132, make=None, sandwich=False,
                 x_scale=1.0, scaled=False):
        self.rng = np.random.default_rng(seed)
        self.size, self.d, self.dtype, self.layer_norm, self.hf, self.lerp = size, d, dtype, layer_norm, hf, lerp
        self.weight_offset, self.multiprocessors, self.eps = weight_offset, multiprocessors, 1e-5
        self.weight_dtype = weight_dtype or dtype
        make = make or self.dense
        self.x = make((*size, d))
        self.residual = self.x if residual == "x" else make((*size, d)) if residual else None
        self.weight = self.table((d,))
        self.bias = self.table((d,)) if layer_norm and bias else None
        self.x_weight = self.table((d,)) if sandwich else None
        self.x_scale = x_scale
        self.scale = self.table((1,)) if scaled else None
        self.probes = self.table((probes, d)) if probes else None
        self.vectors = self.slot = self.alpha = None
        if steer is not None:
            self.vectors = self.table((3, d))
            self.slot, self.alpha = np.array(steer[0], np.int32), np.array(steer[1], np.float32)

    def dense(self, shape):
        return encode(self.rng.standard_normal(shape), self.dtype)

    def table(self, shape):
        return encode(self.rng.standard_normal(shape), self.weight_dtype)

    def matrix(self, array):
        if array is None:
            return Matrix(None, 0, 0)
        stride = array.strides[0] // array.itemsize if array.ndim == 2 else 0
        return Matrix(array.ctypes.data, DTYPES[self.weight_dtype], stride)

    def run(self, emulator, in_place=False):
        """(y, h, probe_dots) as float64; h and probe_dots None where the kernel writes none. Outputs start as NaN, or
        in place as copies of x and residual, which the kernel then reads, too."""
        steered = self.slot is not None and not self.lerp
        stores_h = self.residual is not None or self.x_weight is not None or self.x_scale != 1 or steered
        y = self.x.copy() if in_place else encode(np.full((*self.size, self.d), np.nan), self.dtype)
        h = self.residual.copy() if in_place else y.copy() if stores_h else None
        dots = np.full((*self.size, len(self.probes) + 1), np.nan, np.float32) if self.probes is not None else None
        call = Call(weight=self.matrix(self.weight), bias=self.matrix(self.bias), probes=self.matrix(self.probes),
                    x_weight=self.matrix(self.x_weight), scale=self.matrix(self.scale),
                    steer_vectors=self.matrix(self.vectors), d=self.d, dtype=DTYPES[self.dtype],
                    multiprocessors=self.multiprocessors, layer_norm=self.layer_norm, hf_rounding=self.hf, lerp=self.lerp,
                    eps=self.eps, weight_offset=self.weight_offset, x_scale=self.x_scale, slot_stride=1, alpha_stride=1,
                    num_slots=3 if self.slot is not None else 0,
                    num_probes=len(self.probes) if self.probes is not None else 0)
        call.size[:] = self.size
        inputs, outputs = {}, {"y": y}
        for name in ("x", "residual", "weight", "bias", "x_weight", "scale", "probes", "vectors", "slot", "alpha"):
            array = getattr(self, name)
            if array is not None and not (in_place and name in ("x", "residual")):
                inputs[name] = array
        for name, array in (("x", y), ("residual", h)) if in_place else (("x", self.x), ("residual", self.residual)):
            if array is not None:
                setattr(call, name, array.ctypes.data)
                getattr(call, f"{name}_stride")[:] = [s // array.itemsize for s in array.strides[:3]]
        for name, array in (("y", y), ("h", h), ("probe_dots", dots), ("steer_slot", self.slot), ("steer_alpha", self.alpha)):
            if array is not None:
                setattr(call, name, array.ctypes.data)
        outputs.update({name: array for name, array in (("h", h), ("probe_dots", dots)) if array is not None})
        emulator.run("norm_run", ctypes.byref(call), inputs=inputs, outputs=outputs)
        self.plan = dict(zip(("elements", "threads", "rows_per_block", "form", "resident"), call.plan, strict=True))
        return decode(y, self.dtype), None if h is None else decode(h, self.dtype), dots

    def expected(self):
        """(y, h) in float64, rounded where "hf" rounds; NaN for rows whose slot names no vector."""
        rounded = (lambda v: round_to(v, self.dtype)) if self.hf else (lambda v: v)
        h = decode(self.x, self.dtype)
        if self.x_weight is not None:
            h = rounded(self.rms(h, self.x_weight, rounded))
        if self.x_scale != 1:
            h = rounded(h * float(np.float32(self.x_scale)))
        if self.residual is not None:
            h = rounded(h + decode(self.residual, self.dtype))
        if self.scale is not None:
            h = rounded(h * decode(self.scale, self.weight_dtype))
        if self.slot is not None:
            slot, alpha = (v.reshape(*self.size, 1) for v in (self.slot, self.alpha.astype(np.float64)))
            vectors = decode(self.vectors, self.weight_dtype)[np.clip(slot[..., 0], 0, 2)]
            steered = (slot != -1) & (alpha != 0)
            if not self.lerp:
                h = np.where(steered, rounded(h + alpha * vectors), h)
            h = np.where((slot < -1) | (slot > 2), np.nan, h)
        if self.layer_norm:
            y = self.normalised(h - h.mean(-1, keepdims=True)) * decode(self.weight, self.weight_dtype)
            y += 0 if self.bias is None else decode(self.bias, self.weight_dtype)
        else:
            y = self.rms(h, self.weight, rounded)
        if self.slot is not None and self.lerp:
            y = np.where(steered, (1 - alpha) * rounded(y) + alpha * vectors, y)
        return y, h

    def normalised(self, values):
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + self.eps)

    def rms(self, values, weight, rounded):
        weight = decode(weight, self.weight_dtype)
        if self.weight_offset == 0:
            return rounded(self.normalised(values)) * weight
        return self.normalised(values) * (weight + self.weight_offset)

    def verify(self, emulator):
        """Runs the kernel; y, h and dots are within three units in the last place for each norm. Returns them."""
        y, h, dots = self.run(emulator)
        expected_y, expected_h = self.expected()
        for actual, expected in ((y, expected_y), (h, expected_h)):
            if actual is not None:
                np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
                unit = PRECISION[self.dtype] * (np.abs(expected) + np.sqrt(np.nanmean(expected**2)))
                error = np.abs(actual - round_to(expected, self.dtype))
                allowed = (6 if self.x_weight is not None else 3) * unit
                assert np.nanmax(error - allowed, initial=0) <= 0, f"off by {np.nanmax(error / unit):.2f} units"
        if dots is not None:
            probes = decode(self.probes, self.weight_dtype)
            exact = np.concatenate([expected_h @ probes.T, (expected_h**2).sum(-1, keepdims=True)], -1)
            np.testing.assert_allclose(dots, exact, rtol=1e-3, atol=PRECISION[self.dtype] * self.d**0.5)
        return y, h, dots


@pytest.fixture(scope="module")
def norm(load_emulator):
    return load_emulator("norm_simt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
def test_odd_and_even_widths(norm, d, dtype, layer_norm):
    for hf in (True, False):
        Case((1, 1, 2), d, dtype, seed=d, layer_norm=layer_norm, hf=hf).verify(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("d", [64, 769, 4096, 8200, 16392])
def test_x_with_a_norm_of_its_own(norm, d, offset, dtype):
    """In warps, in blocks, unaligned and longer than registers; in place the same bits."""
    for hf in (True, False):
        Case((1, 1, 2), d, dtype, sandwich=True, hf=hf, weight_offset=offset).verify(norm)
    Case((1, 1, 2), d, dtype, sandwich=True, residual=None, weight_offset=offset).verify(norm)
    steer = ([0, -1, 2], [0.5, 1.0, -0.5])
    for lerp in (False, True):
        case = Case((1, 1, 3), d, dtype, sandwich=True, weight_offset=offset, probes=1, steer=steer, lerp=lerp)
        for written, wanted in zip(case.run(norm, in_place=True), case.verify(norm), strict=True):
            np.testing.assert_array_equal(written, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sandwich", [False, True], ids=["rms", "sandwich"])
@pytest.mark.parametrize("d", [64, 769, 4096, 16392])
def test_x_is_scaled_before_it_is_added(norm, d, sandwich, dtype):
    """In each of the forms that know of it; the product is rounded by itself, so that h is eager code's, bit for bit."""
    settings = {"x_scale": 0.22, "sandwich": sandwich}
    for hf in (True, False):
        case = Case((1, 1, 2), d, dtype, hf=hf, **settings)
        _, h, _ = case.verify(norm)
        assert FORMS(case.plan["form"]) != FORMS.plain
        if hf and not sandwich:
            product = round_to(decode(case.x, dtype) * float(np.float32(0.22)), dtype)
            np.testing.assert_array_equal(h, round_to(product + decode(case.residual, dtype), dtype))
    Case((1, 1, 2), d, dtype, residual=None, **settings).verify(norm)
    case = Case((1, 1, 3), d, dtype, steer=([0, -1, 2], [0.5, 1.0, -0.5]), probes=1, **settings)
    for written, wanted in zip(case.run(norm, in_place=True), case.verify(norm), strict=True):
        np.testing.assert_array_equal(written, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 769, 16392])
def test_a_sum_is_scaled_before_it_is_steered(norm, d, weight_dtype, dtype):
    settings = {"sandwich": True, "scaled": True, "weight_dtype": weight_dtype}
    Case((1, 1, 2), d, dtype, **settings).verify(norm)
    Case((1, 1, 3), d, dtype, steer=([0, -1, 2], [0.5, 1.0, -0.5]), probes=1, **settings).verify(norm)


def test_x_with_a_norm_of_its_own_steered_or_not(norm):
    """Rows that are not steered have the same bits in a call that steers others."""
    settings = {"sandwich": True, "weight_offset": 1.0}
    steered = Case((1, 1, 3), 768, "bfloat16", steer=([-1, 1, 0], [0.5, 0.0, 0.7]), **settings)
    plain = Case((1, 1, 3), 768, "bfloat16", **settings)
    for name in ("x", "residual", "weight", "x_weight"):
        setattr(plain, name, getattr(steered, name))
    for ours, theirs in zip(steered.verify(norm)[:2], plain.verify(norm)[:2], strict=True):
        np.testing.assert_array_equal(ours[..., :2, :], theirs[..., :2, :])


SLOTS = [-1, 0, 1, 2, 2, -2, 3, 1, -3]
ALPHAS = [0.5, 0.0, 0.7, -1.5, np.nan, 0.5, 0.5, np.inf, 0.5]


@pytest.mark.parametrize("d", [40, 769, 4096])
@pytest.mark.parametrize("lerp", [False, True], ids=["add", "lerp"])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:Mean of empty slice")
def test_steering(norm, d, lerp, layer_norm):
    """Each row for itself: not steered, alpha 0 whatever its vector holds, steered, alpha NaN or infinite, slots that name no
    vector."""
    settings = {"seed": d, "layer_norm": layer_norm, "lerp": lerp}
    steered = Case((1, 1, 9), d, "bfloat16", steer=(SLOTS, ALPHAS), **settings)
    steered.vectors[0] = encode(np.array(np.nan), "bfloat16")
    y, h, _ = steered.run(norm)
    expected_y, expected_h = steered.expected()
    rows = [0, 1, 2, 3]
    for actual, expected in ((y, expected_y), (h, expected_h)):
        error = np.abs(actual - round_to(expected, "bfloat16"))[..., rows, :]
        assert (error <= 2 * PRECISION["bfloat16"] * (np.abs(expected[..., rows, :]) + 1)).all()
    assert np.isnan(y[..., [4, 5, 6, 8], :]).all()
    assert not np.isfinite(y[..., 7, :]).any()
    assert np.isnan(h[..., [5, 6, 8], :]).all()
    plain = Case((1, 1, 9), d, "bfloat16", **settings)
    plain.x, plain.residual, plain.weight, plain.bias = steered.x, steered.residual, steered.weight, steered.bias
    plain_y, plain_h, _ = plain.run(norm)
    for row in (0, 1):
        np.testing.assert_array_equal(y[..., row, :], plain_y[..., row, :])
        np.testing.assert_array_equal(h[..., row, :], plain_h[..., row, :])


@pytest.mark.parametrize("settings", [
    {"steer": ([1, 2, 1], [0.7, -1.5, 0.3])},
    {"steer": ([1, 2, 1], [0.7, -1.5, 0.3]), "lerp": True},
    {"weight_offset": 1.0},
    {"sandwich": True},
    {"sandwich": True, "weight_offset": 1.0},
], ids=["add", "lerp", "offset", "sandwich", "sandwich with offset"])  # fmt: skip
def test_rounds_where_hugging_face_rounds(norm, settings):
    """A value rounded once more or once less shows in every third element, of which no one is off by more than a unit."""
    case = Case((1, 1, 3), 1024, "bfloat16", weight_dtype="float32", **settings)
    for actual, expected in zip(case.run(norm)[:2], case.expected(), strict=True):
        assert (actual != round_to(expected, "bfloat16")).mean() < 0.02


@pytest.mark.parametrize("d", [33, 40])
def test_infinite_alpha_and_probes(norm, d):
    """What a thread holds beyond the row's end is no part of it: ∞ · 0 there must not reach the sums."""
    case = Case((1, 1, 2), d, "float32", steer=([0, 0], [np.inf, -np.inf]), probes=1)
    case.vectors[:], case.probes[:] = 1, 1
    np.testing.assert_array_equal(case.run(norm)[2].reshape(2, 2), [[np.inf, np.inf], [-np.inf, np.inf]])


@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("d", [64, 4099])
def test_probes_read_the_row_that_the_norm_sees(norm, d, layer_norm):
    steer = ([0, -1, 2], [0.5, 1.0, -0.5])
    Case((1, 1, 3), d, "float16", probes=3, steer=steer, layer_norm=layer_norm).verify(norm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("d", [64, 769, 4096, 16392])
def test_in_place(norm, d, layer_norm, dtype):
    """y over x and h over residual, in warps, in blocks, unaligned and longer than registers: the same bits."""
    case = Case((1, 1, 3), d, dtype, probes=1, steer=([0, -1, 2], [0.5, 1.0, -0.5]), layer_norm=layer_norm)
    for written, wanted in zip(case.run(norm, in_place=True), case.run(norm), strict=True):
        np.testing.assert_array_equal(written, wanted)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [96, 97])
def test_operands_of_another_dtype(norm, d, dtype, weight_dtype):
    case = Case((1, 1, 2), d, dtype, weight_dtype=weight_dtype, probes=1, steer=([1, 0], [0.3, 0.6]), layer_norm=True)
    case.verify(norm)


@pytest.mark.parametrize("residual", [None, "x"], ids=["none", "aliases x"])
@pytest.mark.parametrize("d", [256, 257])
def test_residual_absent_or_aliased(norm, d, residual):
    _, h, _ = Case((1, 1, 3), d, "bfloat16", residual=residual, layer_norm=True, bias=False).verify(norm)
    assert (h is None) == (residual is None)
    _, h, _ = Case((1, 1, 3), d, "bfloat16", residual=residual, steer=([0, 1, -1], [1.0, 2.0, 0.0])).verify(norm)
    assert h is not None


def test_weight_offset(norm):
    """Gemma: 1 + w, and no rounding before the weight."""
    Case((1, 1, 3), 128, "bfloat16", weight_offset=1.0).verify(norm)


def strided(pad, skip):
    """Rows with `pad` elements between them, and dimensions that cannot be merged; data starts `skip` elements in."""

    def make(case, shape):
        z, y, rows, d = shape
        base = encode(case.rng.standard_normal((z, rows, y + 1, d + pad + skip)), case.dtype)
        return base[:, :, :y, skip : skip + d].transpose(0, 2, 1, 3)

    return make


@pytest.mark.parametrize(("d", "pad", "skip"), [(64, 8, 0), (64, 3, 1), (65, 0, 2), (1056, 5, 1)])
def test_strided_rows(norm, d, pad, skip):
    case = Case((2, 3, 2), d, "bfloat16", layer_norm=True)
    case.x, case.residual = (strided(pad, skip)(case, (2, 3, 2, d)) for _ in range(2))
    case.verify(norm)
    assert bool(case.plan["form"]) == (pad == 8)


@pytest.mark.parametrize("strides", [(304, 152, 72), (304, 152, 73), (304, 145, 72), (289, 144, 72)])
def test_alignment_of_every_stride(norm, strides):
    """Of z, y and rows in turn."""
    case = Case((2, 2, 2), 64, "bfloat16")
    case.x = np.lib.stride_tricks.as_strided(case.dense((700,)), (2, 2, 2, 64), (*(2 * s for s in strides), 2))
    case.verify(norm)
    assert bool(case.plan["form"]) == (strides == (304, 152, 72))


@pytest.mark.parametrize("name", ["residual", "weight", "bias", "x_weight", "vectors", "probes"])
@pytest.mark.parametrize(("pad", "skip"), [(8, 0), (3, 0), (8, 1)])
def test_alignment_of_every_operand(norm, name, pad, skip):
    """Rows with `pad` elements between them; data that starts `skip` elements in."""
    kind = {"sandwich": True} if name == "x_weight" else {"layer_norm": True}
    case = Case((1, 1, 3), 64, "bfloat16", **kind, probes=2, steer=([0, 2, 1], [0.5, 0.3, -0.5]))
    dense = getattr(case, name)
    wide = encode(np.full((*dense.shape[:-1], 64 + pad + skip), np.nan), "bfloat16")[..., skip : skip + 64]
    wide[:] = dense
    setattr(case, name, wide)
    case.verify(norm)
    assert bool(case.plan["form"]) == (skip == 0 and (pad == 8 or dense.ndim == 1))


def test_outputs_that_are_not_aligned(norm):
    """They are dense where x and residual have room between their rows."""
    case = Case((1, 1, 3), 65, "bfloat16")
    case.x, case.residual = (strided(7, 0)(case, (1, 1, 3, 65)) for _ in range(2))
    case.verify(norm)
    assert not case.plan["form"]


def test_offsets_beyond_32_bits(norm):
    """Two rows 2³¹ elements apart: the second is found only by 64-bit arithmetic. Most of the memory is untouched."""

    def far_apart(shape):
        storage = np.empty(2**31 + shape[-1], np.float16)
        rows = np.lib.stride_tricks.as_strided(storage, shape, (0, 0, 2**32, 2))
        rows[:] = np.random.default_rng(0).standard_normal(shape)
        return rows

    Case((1, 1, 2), 768, "float16", residual="x", make=far_apart).verify(norm)


def test_several_rows_per_block(norm):
    """More rows than the chip has room for: four warps with a row each, the last block half empty."""
    case = Case((1, 1, 6), 256, "bfloat16", multiprocessors=1, probes=2)
    case.verify(norm)
    assert case.plan["rows_per_block"] == 4


@pytest.mark.parametrize(("d", "dtype", "steer"), [(8200, "bfloat16", None), (16392, "bfloat16", ([1], [0.5]))])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
def test_rows_longer_than_registers(norm, d, dtype, steer, layer_norm):
    case = Case((1, 1, 1), d, dtype, steer=steer, layer_norm=layer_norm, probes=1)
    if d == 8200:
        case.x = encode(case.rng.standard_normal((1, 1, 1, d + 1)), dtype)[..., 1:]  # unaligned
    case.residual = encode(decode(case.residual, dtype) + 1, dtype)  # a mean, of which the norm of h is made, too
    case.verify(norm)
    assert not case.plan["resident"]


def test_plan_covers_every_width_with_few_registers(norm):
    """Every row fits its threads, blocks are legal, and the widest register tile is only for rows of one warp."""
    out = (INT * 5)()
    for d in [*range(1, 300), *range(300, 40000, 487), 4096, 5120, 8192, 16384, 32768]:
        for rows in (1, 64, 264, 265, 8192):
            for element_bytes in (2, 4):
                for asked in FORMS:
                    if asked != FORMS.unaligned and d * element_bytes % 16:
                        continue
                    norm.library.norm_plan(INT(rows), INT(d), INT(element_bytes), INT(asked), INT(132), out)
                    elements, threads, rows_per_block, form, resident = out
                    # Few rows too long for 8 elements a thread leave the plain kernels.
                    assert form == asked or (rows <= 264 and d > 8192 and form == FORMS.aligned)
                    assert threads % 32 == 0
                    assert rows_per_block == 1 or threads == 32
                    assert elements in ((8,), (8, 16), (8, 16, 32))[form if resident else 0]
                    most = {8: 1024, 16: 256, 32: 512}[elements] if form == FORMS.plain else 1024
                    assert 0 < threads * rows_per_block <= most
                    assert rows <= 264 or not resident or form != FORMS.plain or threads <= (256 if d <= 8192 else 512)
                    reach = d + 16 // element_bytes - 1 if form == FORMS.unaligned else d
                    assert (elements * threads >= reach) == bool(resident)
                    assert resident or reach > (16384 if form != FORMS.unaligned else 8192)


@pytest.mark.parametrize(("multiprocessors", "elements"), [(132, 8), (1, 16)])
@pytest.mark.parametrize("settings", [{}, {"probes": 1}, {"weight_dtype": "float32"}], ids=["plain", "probes", "wide weight"])
def test_kernels_of_one_form_write_the_same_bits_as_those_of_another(norm, settings, multiprocessors, elements):
    """Operands of x's type and no probes: the plain kernel. y and h do not depend on who computed them."""
    case = Case((1, 1, 3), 2304, "bfloat16", multiprocessors=multiprocessors, **settings)
    y, h, _ = case.verify(norm)
    assert (case.plan["form"], case.plan["elements"]) == (FORMS.aligned if settings else FORMS.plain, elements)
    plain = Case((1, 1, 3), 2304, "bfloat16", multiprocessors=multiprocessors)
    plain.x, plain.residual = case.x, case.residual
    plain.weight = encode(decode(case.weight, case.weight_dtype), "bfloat16")
    if settings.get("weight_dtype"):
        case.weight = decode(plain.weight, "bfloat16").astype(np.float32)
        y, h, _ = case.run(norm)
    for actual, expected in zip((y, h), plain.run(norm)[:2], strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("steer", [None, ([0, -1, 0], [0.5, 1.0, 1.0])], ids=["plain", "steered"])
def test_widest_slices(norm, dtype, layer_norm, steer):
    case = Case((1, 1, 3), 8200, dtype, multiprocessors=1, layer_norm=layer_norm, steer=steer)
    case.verify(norm)
    assert case.plan["elements"] == 32


def run_all_under_address_sanitizer():
    """What test_address_sanitizer runs in a process of its own: the kernels' main paths."""
    import tempfile

    import emulator

    with tempfile.TemporaryDirectory() as folder:
        norm = emulator.Emulator(emulator.build("norm_simt", Path(folder)))
        for d in SIZES:
            for dtype in DTYPES:
                for layer_norm in (False, True):
                    steer = ([0, 1], [0.5, -0.5]) if d % 2 else None
                    Case((1, 1, 2), d, dtype, seed=d, layer_norm=layer_norm, steer=steer, probes=1).verify(norm)
        Case((1, 1, 1), 16392, "bfloat16", steer=([1], [0.5])).verify(norm)
        Case((1, 1, 6), 256, "float32", multiprocessors=1, lerp=True, steer=([0] * 6, [0.5] * 6)).verify(norm)


@pytest.mark.slow
def test_address_sanitizer(load_emulator):
    """The same kernels built with AddressSanitizer and UBSan, which must be in the process before Python is."""
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "SIMT_SANITIZER": "address",
                   "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}  # fmt: skip
    code = "import test_norm_simt; test_norm_simt.run_all_under_address_sanitizer()"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
