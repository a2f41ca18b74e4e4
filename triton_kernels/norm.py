"""Residual add, steering and RMS or layer norm of a row in one pass over memory, in Triton.

One kernel serves both norms and both steering modes; what a call does not use is not in its code (constexpr). A program owns
one row. Rows of up to MAX_BLOCK elements stay in registers between the statistics and the output; longer ones are walked
in tiles, and their sum is computed again from the inputs, by then in L2, in each pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ras_fast.triton_kernels import tuned
from ras_fast.triton_kernels.device import device_facts, on_its_device

MAX_BLOCK = 16384  # elements that one program keeps in registers
TILE = 4096  # of longer rows


@triton.jit
def _steering(slot_ptr, alpha_ptr, token, num_slots):
    """(slot to load from, alpha, whether the row is steered, whether its slot names no vector)."""
    slot = tl.load(slot_ptr + token)
    alpha = tl.load(alpha_ptr + token)
    invalid = (slot < -1) | (slot >= num_slots)
    # NaN is "not equal to 0": it steers, and so poisons its row.
    active = (slot >= 0) & (slot < num_slots) & (alpha != 0.0)
    return tl.where(active, slot, 0).to(tl.int64), alpha, active, invalid


@triton.jit
def _weighted(normalised, weight_ptr, cols, mask, weight_offset, dtype: tl.constexpr, ROUND_NORMALISED: tl.constexpr):
    """RMSNorm's last step, for the elements `cols` in fp32."""
    if ROUND_NORMALISED:
        normalised = normalised.to(dtype).to(tl.float32)
    return normalised * (tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset)


@triton.jit
def _inverse_rms(x_row, d, eps, offsets, BLOCK: tl.constexpr):
    """1 / the root of the mean square of a row of x."""
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, d, BLOCK, num_stages=1):
        x = tl.load(x_row + start + offsets, mask=start + offsets < d, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares) / d + eps)


@triton.jit
def _load_h(x_row, residual_row, vector_row, x_weight_ptr, cols, mask, x_inv_rms, x_scale, scale, weight_offset, alpha, active,
            invalid, HAS_RESIDUAL: tl.constexpr, HAS_X_WEIGHT: tl.constexpr, HAS_X_SCALE: tl.constexpr, STEER: tl.constexpr,
            HF: tl.constexpr, ROUND_NORMALISED: tl.constexpr):  # fmt: skip
    """h of the elements `cols` in fp32, zero outside the mask; rounded to x's type where "hf" rounds."""
    x = tl.load(x_row + cols, mask=mask, other=0.0)
    h = x.to(tl.float32)
    if HAS_X_WEIGHT:
        h = _weighted(h * x_inv_rms, x_weight_ptr, cols, mask, weight_offset, x.dtype, ROUND_NORMALISED)
        if HF:
            h = h.to(x.dtype).to(tl.float32)
    if HAS_X_SCALE:
        h *= x_scale
        if HF:
            h = h.to(x.dtype).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_row + cols, mask=mask, other=0.0).to(tl.float32)
        if HF:
            h = h.to(x.dtype).to(tl.float32)
    if HAS_X_WEIGHT:
        h *= scale
        if HF:
            h = h.to(x.dtype).to(tl.float32)
    if STEER == "add":  # noqa: SIM102  (a constant decides whether there is a branch)
        if active:
            h += alpha * tl.load(vector_row + cols, mask=mask, other=0.0).to(tl.float32)
            if HF:
                h = h.to(x.dtype).to(tl.float32)
    if STEER != "none":  # noqa: SIM102
        if invalid:
            h = tl.where(mask, float("nan"), 0.0)
    return h


@triton.jit
def _store_row(y_row, h_row, weight_ptr, bias_ptr, vector_row, h, cols, mask, mean, inv_std, weight_offset, alpha, active,
               LAYER_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, STEER: tl.constexpr, HF: tl.constexpr,
               ROUND_NORMALISED: tl.constexpr, STORE_H: tl.constexpr):  # fmt: skip
    dtype = y_row.dtype.element_ty
    if STORE_H:
        tl.store(h_row + cols, h.to(dtype), mask=mask)
    if LAYER_NORM:
        y = (h - mean) * inv_std * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        y = _weighted(h * inv_std, weight_ptr, cols, mask, weight_offset, dtype, ROUND_NORMALISED)
    if STEER == "lerp":  # noqa: SIM102
        if active:
            v = tl.load(vector_row + cols, mask=mask, other=0.0).to(tl.float32)
            if HF:
                y = y.to(dtype).to(tl.float32)
            y = (1.0 - alpha) * y + alpha * v
    tl.store(y_row + cols, y.to(dtype), mask=mask)


@triton.jit
def add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_weight_ptr, scale_ptr, vectors_ptr, slot_ptr, alpha_ptr, probes_ptr,
    y_ptr, h_ptr, dots_ptr,
    x_stride_z, x_stride_y, x_stride, residual_stride_z, residual_stride_y, residual_stride, vectors_stride, probes_stride,
    rows_y, rows, d, num_slots, num_probes, eps, weight_offset, x_scale,
    LAYER_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_X_WEIGHT: tl.constexpr,
    HAS_X_SCALE: tl.constexpr, HAS_SCALE: tl.constexpr, STEER: tl.constexpr, PROBES: tl.constexpr, HF: tl.constexpr,
    ROUND_NORMALISED: tl.constexpr, STORE_H: tl.constexpr, BLOCK: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Grid (rows, y, z): row [z, y, row] of x and residual, row `token` of every output."""
    row, y, z = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = (z * rows_y + y) * rows + row
    x_row = x_ptr + z * x_stride_z + y * x_stride_y + row * x_stride
    residual_row = residual_ptr
    if HAS_RESIDUAL:
        residual_row += z * residual_stride_z + y * residual_stride_y + row * residual_stride
    y_row = y_ptr + token * d
    h_row = h_ptr
    if STORE_H:
        h_row += token * d

    vector_row = vectors_ptr
    alpha, active, invalid = 0.0, False, False
    if STEER != "none":
        slot, alpha, active, invalid = _steering(slot_ptr, alpha_ptr, token, num_slots)
        vector_row += slot * vectors_stride

    offsets = tl.arange(0, BLOCK)
    x_inv_rms = 0.0
    if HAS_X_WEIGHT:
        x_inv_rms = _inverse_rms(x_row, d, eps, offsets, BLOCK)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    mean = 0.0
    if TILED:
        if LAYER_NORM:
            total = tl.zeros([BLOCK], tl.float32)
            for start in tl.range(0, d, BLOCK, num_stages=1):
                cols = start + offsets
                total += _load_h(x_row, residual_row, vector_row, x_weight_ptr, cols, cols < d, x_inv_rms, x_scale, scale,
                                 weight_offset, alpha, active, invalid, HAS_RESIDUAL, HAS_X_WEIGHT, HAS_X_SCALE, STEER, HF,
                                 ROUND_NORMALISED)  # fmt: skip
            mean = tl.sum(total) / d
        squares = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, d, BLOCK, num_stages=1):
            cols = start + offsets
            h = _load_h(x_row, residual_row, vector_row, x_weight_ptr, cols, cols < d, x_inv_rms, x_scale, scale,
                        weight_offset, alpha, active, invalid, HAS_RESIDUAL, HAS_X_WEIGHT, HAS_X_SCALE, STEER, HF,
                        ROUND_NORMALISED)  # fmt: skip
            centred = tl.where(cols < d, h - mean, 0.0)
            squares += centred * centred
        square_sum = tl.sum(squares)
    else:
        mask = offsets < d
        h = _load_h(x_row, residual_row, vector_row, x_weight_ptr, offsets, mask, x_inv_rms, x_scale, scale, weight_offset,
                    alpha, active, invalid, HAS_RESIDUAL, HAS_X_WEIGHT, HAS_X_SCALE, STEER, HF, ROUND_NORMALISED)  # fmt: skip
        if LAYER_NORM:
            mean = tl.sum(h) / d
        centred = tl.where(mask, h - mean, 0.0)
        square_sum = tl.sum(centred * centred)
    inv_std = tl.rsqrt(square_sum / d + eps)

    # Before anything is stored: in place, y lies over x and h over residual.
    if PROBES:
        dots_row = dots_ptr + token * (num_probes + 1)
        probe_row = probes_ptr
        for probe in tl.range(0, num_probes, num_stages=1):
            if TILED:
                products = tl.zeros([BLOCK], tl.float32)
                for start in tl.range(0, d, BLOCK, num_stages=1):
                    cols = start + offsets
                    tile = _load_h(x_row, residual_row, vector_row, x_weight_ptr, cols, cols < d, x_inv_rms, x_scale, scale,
                                   weight_offset, alpha, active, invalid, HAS_RESIDUAL, HAS_X_WEIGHT, HAS_X_SCALE, STEER, HF,
                                   ROUND_NORMALISED)  # fmt: skip
                    products += tile * tl.load(probe_row + cols, mask=cols < d, other=0.0).to(tl.float32)
            else:
                products = h * tl.load(probe_row + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(dots_row + probe, tl.sum(products))
            probe_row += probes_stride
        tl.store(dots_row + num_probes, square_sum + d * mean * mean)  # ||h||^2

    if TILED:
        for start in tl.range(0, d, BLOCK, num_stages=1):
            cols = start + offsets
            h = _load_h(x_row, residual_row, vector_row, x_weight_ptr, cols, cols < d, x_inv_rms, x_scale, scale,
                        weight_offset, alpha, active, invalid, HAS_RESIDUAL, HAS_X_WEIGHT, HAS_X_SCALE, STEER, HF,
                        ROUND_NORMALISED)  # fmt: skip
            _store_row(y_row, h_row, weight_ptr, bias_ptr, vector_row, h, cols, cols < d, mean, inv_std, weight_offset,
                       alpha, active, LAYER_NORM, HAS_BIAS, STEER, HF, ROUND_NORMALISED, STORE_H)  # fmt: skip
    else:
        _store_row(y_row, h_row, weight_ptr, bias_ptr, vector_row, h, offsets, mask, mean, inv_std, weight_offset,
                   alpha, active, LAYER_NORM, HAS_BIAS, STEER, HF, ROUND_NORMALISED, STORE_H)  # fmt: skip


class Config(NamedTuple):
    """Launch of a norm over rows [T, d]: `block` elements at a time, all d of them unless `tiled`."""

    block: int
    tiled: bool
    num_warps: int
    maxnreg: int  # set explicitly, because otherwise ptxas spills a value or two to reach a rounder register count


def config(wanted: tuned.ShapeClass) -> Config:
    """Block size, warps and registers for a width: what was measured, else the rule."""
    return tuned.choose(wanted, rule(wanted))


def rule(wanted: tuned.ShapeClass) -> Config:
    """8 elements a thread up to a width of 1024, 16 up to 8192, 32 beyond."""
    if wanted.size > MAX_BLOCK:
        return Config(TILE, True, 8, 128)
    warps = min(max(wanted.size // 512, min(wanted.size // 256, 4), 1), 16)
    return Config(wanted.size, False, warps, 64 if wanted.size // warps <= 512 else 128)


def shape_class(arch: int, itemsize: int, d: int) -> tuned.ShapeClass:
    """One for plain and steered calls: with other warps the sums of an unsteered row would be added in another order."""
    return tuned.ShapeClass("norm", arch, itemsize, max(triton.next_power_of_2(d), 16), "every")


def _leading(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[list[int], list[int], list[int]]:
    """Sizes and strides of the leading dimensions, neighbours merged where both tensors allow it; three, outermost first."""
    dims: list[list[int]] = []
    for i in reversed(range(x.dim() - 1)):
        size, stride, other = x.shape[i], x.stride(i), residual.stride(i) if residual is not None else 0
        if size == 1:
            continue
        if dims and [stride, other] == [dims[0][0] * dims[0][1], dims[0][0] * dims[0][2]]:
            dims[0][0] *= size
        else:
            dims.insert(0, [size, stride, other])
    if len(dims) > 3:
        raise ValueError(f"x has {len(dims)} unmergeable leading dimensions; it must have at most 3: use .contiguous()")
    padded = [[1, 0, 0]] * (3 - len(dims)) + dims
    return tuple(list(column) for column in zip(*padded, strict=True))


def _add_norm(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight=None, x_scale=1.0,
              scale=None, *, layer_norm):  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stores_h = residual is not None or (vectors is not None and not lerp) or x_weight is not None or x_scale != 1
    h = torch.empty(x.shape if stores_h else (0,), dtype=x.dtype, device=x.device)
    dots = _launch(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight, x_scale,
                   scale, y=y, h=h if stores_h else None, layer_norm=layer_norm)  # fmt: skip
    return y, h, dots


@on_its_device
def _launch(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight=None, x_scale=1.0,
            scale=None, *, y, h, layer_norm):  # fmt: skip
    """Writes y and, if given, h; returns probe_dots."""
    d = x.shape[-1]
    tokens = x.numel() // d
    dots = torch.empty((tokens, len(probes) + 1) if probes is not None else (0,), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return dots
    (size_z, size_y, rows), x_strides, residual_strides = _leading(x, residual)
    arch, _ = device_facts(x.device)
    chosen = config(shape_class(arch, x.element_size(), d))
    pointers = (x, residual, weight, bias, x_weight, scale, vectors, slot, alpha, probes, y, h, dots)
    add_norm_kernel[(rows, size_y, size_z)](
        *(x if tensor is None else tensor for tensor in pointers),  # the kernel does not touch what is not there
        *x_strides, *residual_strides,
        vectors.stride(0) if vectors is not None else 0, probes.stride(0) if probes is not None else 0,
        size_y, rows, d, len(vectors) if vectors is not None else 0, len(probes) if probes is not None else 0,
        eps, weight_offset, x_scale,
        LAYER_NORM=layer_norm, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
        HAS_X_WEIGHT=x_weight is not None, HAS_X_SCALE=x_scale != 1, HAS_SCALE=scale is not None,
        STEER="none" if vectors is None else "lerp" if lerp else "add",
        PROBES=probes is not None, HF=hf, ROUND_NORMALISED=hf and weight_offset == 0, STORE_H=h is not None,
        BLOCK=chosen.block, TILED=chosen.tiled, num_warps=chosen.num_warps, maxnreg=chosen.maxnreg,
        enable_fp_fusion=x_scale == 1,  # a product that is rounded before it is added
    )  # fmt: skip
    return dots


def add_rms_norm(x, residual, weight, eps, *others):
    """ras_fast::add_rms_norm (ras_fast/ops/norm.py) in Triton: the op's arguments, (y, h, probe_dots)."""
    return _add_norm(x, residual, weight, None, eps, *others, layer_norm=False)


def add_rms_norm_(x, residual, weight, eps, *others):
    """ras_fast::add_rms_norm_ in Triton: y over x, h over residual, both contiguous; returns probe_dots."""
    return _launch(x, residual, weight, None, eps, *others, y=x, h=residual, layer_norm=False)


def add_layer_norm(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, hf, probes):
    """ras_fast::add_layer_norm in Triton, as above."""
    return _add_norm(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, 0.0, hf, probes, layer_norm=True)


def add_layer_norm_(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, hf, probes):
    """ras_fast::add_layer_norm_ in Triton, as above."""
    return _launch(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, 0.0, hf, probes, y=x, h=residual,
                   layer_norm=True)  # fmt: skip


def aot_cases(arch: int) -> list[dict]:
    """Default configurations for the static inspector (ras_fast/inspect.py): each width class, plain and with all features."""
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "x_weight_ptr", "scale_ptr", "probes_ptr", "y_ptr", "h_ptr")
    types = dict.fromkeys(pointers, "*bf16")
    types |= dict.fromkeys(("vectors_ptr", "alpha_ptr", "dots_ptr"), "*fp32") | {"slot_ptr": "*i32"}
    types |= dict.fromkeys(("eps", "weight_offset", "x_scale"), "fp32")
    cases = []
    for d in (768, 4096, 8192, 16384, 32768):
        for norm, steer in (("rms", "none"), ("rms", "add"), ("sandwich", "add"), ("layer", "lerp")):
            wanted = shape_class(arch, 2, d)
            chosen = config(wanted)
            constexprs = {
                "LAYER_NORM": norm == "layer", "HAS_RESIDUAL": True, "HAS_BIAS": norm == "layer",
                "HAS_X_WEIGHT": norm == "sandwich", "HAS_X_SCALE": norm == "sandwich",
                "HAS_SCALE": norm == "sandwich", "STEER": steer,
                "PROBES": steer != "none", "HF": True, "ROUND_NORMALISED": norm != "layer", "STORE_H": True,
                "BLOCK": chosen.block, "TILED": chosen.tiled,
            }  # fmt: skip
            signature = {name: types.get(name, "i32") for name in add_norm_kernel.arg_names if name not in constexprs}
            name = f"add_{norm}_norm[d={d}, steer={steer}]"
            divisible = [n for n, kind in signature.items() if kind[0] == "*" or n == "d" or "stride" in n]
            cases.append({"name": name, "shape_class": wanted, "kernel": add_norm_kernel, "signature": signature,
                          "constexprs": constexprs, "divisible_by_16": divisible, "num_warps": chosen.num_warps,
                          "num_stages": 3, "maxnreg": chosen.maxnreg})  # fmt: skip
    return cases
