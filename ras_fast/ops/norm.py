"""Residual add, risk-scaled steering and norm in one pass over memory (docs/kernels.md, "Steered residual + norm").

Shapes: T tokens (the product of x's leading dimensions), d hidden size, S steering vectors, P probes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ras_fast.ops import _check
from ras_fast.ops._registry import call, define, name_of, triton_kernel

MODES = ("add", "lerp")
ROUNDINGS = ("hf", "fp32")


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    steer_vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    steer_alpha: Tensor | None = None,
    steer_mode: str = "add",
    weight_offset: float = 0.0,
    rounding: str = "hf",
    probes: Tensor | None = None,
    x_weight: Tensor | None = None,
    x_scale: float = 1.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467) of `x + residual`, optionally steered.

    With `h = x + residual` and `w = weight + weight_offset`, mode "add" does `h += α_t · v[slot_t]`, then `y = norm(h) · w`
    (contrastive activation addition, arXiv 2312.06681); mode "lerp" does `y = (1−α_t) · norm(h) · w + α_t · v[slot_t]`
    (MoRAS, arXiv 2510.13698). Rows whose slot is −1 or whose α is 0 are bit-identical to the
    unsteered call. A slot outside −1..S−1 cannot raise without a host sync: it makes its row NaN, never silently unsteered.
    float64 is taken as well, by the reference alone.

    Args:
        x: [..., d], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        residual: like `x`, or None. May alias `x`.
        weight: [d], any floating dtype.
        eps: added to the mean square.
        steer_vectors: [S, d] with S > 0, any floating dtype. Given together with the next two, or not at all.
        steer_slot: [T] int32, row of `steer_vectors` for each token; −1 leaves the token alone.
        steer_alpha: [T] float32, the strength α for each token; NaN makes a steered row NaN.
        steer_mode: "add" or "lerp".
        weight_offset: 1.0 for Gemma's 1 + w.
        rounding: "hf" rounds where Hugging Face's eager code rounds (the sum, the steered sum, and, when weight_offset is 0,
            the normalised value before the weight); "fp32" rounds once, at the stores.
        probes: [P, d], any floating dtype: directions whose dot product with each row is read in the same pass.
        x_weight: [d], any floating dtype: before all else x becomes `norm(x) · (x_weight + weight_offset)`, with the same eps:
            the norm behind attention and MLP of sandwich layers (Gemma 2, arXiv 2408.00118). "hf" rounds it to x's dtype.
        x_scale: then x is multiplied by it, as what Granite's layers add (its `residual_multiplier`). "hf" rounds the product.
        scale: [1], any floating dtype, only beside `x_weight`: h is `(x + residual) · scale`, as behind the layers of Gemma 4;
            steering comes after it. "hf" rounds the sum and the product.

    Returns:
        y: [..., d], dtype of `x`, contiguous.
        h: [..., d], dtype of `x`: the residual stream after steering (`x` itself when nothing was added to it).
        probe_dots: [T, P+1] float32, h·probe_p and, last, ‖h‖²; None without probes.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("add_rms_norm", x, residual, weight, steer_vectors, steer_alpha, probes, x_weight, scale)
    lerp, hf = _choices(steer_mode, rounding)
    y, h, dots = call(
        "add_rms_norm", _rms_validate, x, residual, weight, eps, steer_vectors, steer_slot, steer_alpha, lerp, weight_offset,
        hf, probes, x_weight, x_scale, scale,
    )  # fmt: skip
    stores_h = _stores_h(residual, steer_vectors, lerp, x_weight, x_scale)
    return y, (h if stores_h else x), (dots if probes is not None else None)


def add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    steer_vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    steer_alpha: Tensor | None = None,
    steer_mode: str = "add",
    weight_offset: float = 0.0,
    rounding: str = "hf",
    probes: Tensor | None = None,
    x_weight: Tensor | None = None,
    x_scale: float = 1.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`add_rms_norm` in place: y is written over `x` and h over `residual`, bit for bit what the functional op returns.

    For callers that own both buffers, as those of vLLM's and FlashInfer's in-place norms: no output is allocated, and half as
    much memory is touched (docs/kernels.md). `x` and `residual` must be contiguous and must not overlap. The other arguments
    are those of :func:`add_rms_norm`.

    Returns:
        x, residual, and probe_dots as :func:`add_rms_norm` has them.

    Raises:
        ValueError: as :func:`add_rms_norm`, or `x` or `residual` is not contiguous, or they overlap.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("add_rms_norm_", x, residual, weight, steer_vectors, steer_alpha, probes, x_weight, scale)
    lerp, hf = _choices(steer_mode, rounding)
    dots = call(
        "add_rms_norm_", _rms_in_place_validate, x, residual, weight, eps, steer_vectors, steer_slot, steer_alpha, lerp,
        weight_offset, hf, probes, x_weight, x_scale, scale,
    )  # fmt: skip
    return *_written(x, residual), (dots if probes is not None else None)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    steer_vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    steer_alpha: Tensor | None = None,
    steer_mode: str = "add",
    rounding: str = "hf",
    probes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """LayerNorm (Ba et al., arXiv 1607.06450) of `x + residual`, optionally steered.

    `bias` is [d] or None; everything else, and what is returned and raised, as in :func:`add_rms_norm`. "hf" rounds the sum
    and the steered sum; the norm itself rounds once, as torch's own does.
    """
    _check.no_grad("add_layer_norm", x, residual, weight, bias, steer_vectors, steer_alpha, probes)
    lerp, hf = _choices(steer_mode, rounding)
    y, h, dots = call(
        "add_layer_norm", _layer_validate, x, residual, weight, bias, eps, steer_vectors, steer_slot, steer_alpha, lerp, hf,
        probes,
    )  # fmt: skip
    return y, (h if _stores_h(residual, steer_vectors, lerp) else x), (dots if probes is not None else None)


def add_layer_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    steer_vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    steer_alpha: Tensor | None = None,
    steer_mode: str = "add",
    rounding: str = "hf",
    probes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`add_layer_norm` in place: y is written over `x` and h over `residual`, everything else as in
    :func:`add_rms_norm_`."""
    _check.no_grad("add_layer_norm_", x, residual, weight, bias, steer_vectors, steer_alpha, probes)
    lerp, hf = _choices(steer_mode, rounding)
    dots = call(
        "add_layer_norm_", _layer_in_place_validate, x, residual, weight, bias, eps, steer_vectors, steer_slot, steer_alpha,
        lerp, hf, probes,
    )  # fmt: skip
    return *_written(x, residual), (dots if probes is not None else None)


def _written(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Marks both as written, which native kernels do not do: a backward that has saved one of them then fails instead of
    computing from the new values."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((x, residual))
    return x, residual


def _choices(steer_mode: str, rounding: str) -> tuple[bool, bool]:
    """(lerp, hf) of the two string options."""
    if steer_mode not in MODES:
        _check.fail("steer_mode", repr(steer_mode), f"one of {MODES}")
    if rounding not in ROUNDINGS:
        _check.fail("rounding", repr(rounding), f"one of {ROUNDINGS}")
    return steer_mode == "lerp", rounding == "hf"


def _stores_h(
    residual: Tensor | None, steer_vectors: Tensor | None, lerp: bool, x_weight: Tensor | None = None, x_scale: float = 1.0
) -> bool:
    """Whether h differs from x, so that the op has to write it."""
    return residual is not None or (steer_vectors is not None and not lerp) or x_weight is not None or x_scale != 1


def _rms_validate(
    x, residual, weight, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight, x_scale, scale
) -> None:
    _check.numbers(eps=eps, weight_offset=weight_offset, x_scale=x_scale)
    _validate(x, residual, weight, vectors, slot, alpha, probes, x_weight=x_weight)
    _check.tensors_or_none(scale=scale)
    if scale is not None:
        if x_weight is None:
            _check.fail("scale", "a tensor", "None where x_weight is None")
        _check.shape("scale", scale, (1,), "[1]")
        _check_table_dtype("scale", scale, x)
        _check.device("scale", scale, x.device)


def _layer_validate(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, hf, probes) -> None:
    _check.numbers(eps=eps)
    _validate(x, residual, weight, vectors, slot, alpha, probes, bias=bias)


def _rms_in_place_validate(x, residual, *others) -> None:
    _rms_validate(x, residual, *others)
    _validate_in_place(x, residual)


def _layer_in_place_validate(x, residual, *others) -> None:
    _layer_validate(x, residual, *others)
    _validate_in_place(x, residual)


def _validate_in_place(x: Tensor, residual: Tensor) -> None:
    if residual is None:
        _check.fail("residual", "None", "a tensor, which takes h")
    for name, tensor in (("x", x), ("residual", residual)):
        if not tensor.is_contiguous():
            _check.fail(name, f"with strides {tensor.stride()}", "contiguous, because it is written in place")
    if x.is_meta or not _check.may_read(x):  # no addresses yet
        return
    if abs(x.data_ptr() - residual.data_ptr()) < x.numel() * x.element_size():
        _check.fail("residual", "overlapping x", "memory of its own, because both are written in place")


def _validate(x, residual, weight, vectors, slot, alpha, probes, **other_rows) -> None:
    _check.tensors(x=x)
    _check.tensors_or_none(
        residual=residual, steer_vectors=vectors, steer_slot=slot, steer_alpha=alpha, probes=probes, **other_rows
    )
    if x.dim() == 0 or x.shape[-1] == 0:
        _check.fail("x", f"of shape {tuple(x.shape)}", "[..., d] with d > 0")
    d = x.shape[-1]
    _check.floating("x", x)
    _check.last_dim_contiguous("x", x)
    if residual is not None:
        _check.shape("residual", residual, x.shape, "the shape of x")
        _check.stored("residual", residual, x.dtype, x.device)
    _check.is_tensor("weight", weight, "a tensor [d]")
    for name, tensor in {"weight": weight, **other_rows}.items():
        if tensor is not None:
            _check.shape(name, tensor, (d,), "[d]")
            _check_table_dtype(name, tensor, x)
            _check.last_dim_contiguous(name, tensor)
            _check.device(name, tensor, x.device)
    if vectors is not None or slot is not None or alpha is not None:
        _validate_steering(x, vectors, slot, alpha)
    if probes is not None:
        _validate_table("probes", probes, x)


def _validate_steering(x: Tensor, vectors: Tensor | None, slot: Tensor | None, alpha: Tensor | None) -> None:
    for name, tensor in (("steer_vectors", vectors), ("steer_slot", slot), ("steer_alpha", alpha)):
        if tensor is None:
            _check.fail(name, "None", "given together with the other two of steer_vectors, steer_slot, steer_alpha")
    _validate_table("steer_vectors", vectors, x)
    if vectors.shape[0] == 0:
        _check.fail("steer_vectors", "of shape [0, d]", "[S, d] with S > 0")
    tokens = x.numel() // x.shape[-1]
    for name, tensor, dtype in (("steer_slot", slot, torch.int32), ("steer_alpha", alpha, torch.float32)):
        _check.shape(name, tensor, (tokens,), "[T]")
        _check.stored(name, tensor, dtype, x.device)


def _validate_table(name: str, table: Tensor, x: Tensor) -> None:
    if table.dim() != 2 or table.shape[1] != x.shape[-1]:
        _check.fail(name, f"of shape {tuple(table.shape)}", f"[rows, d] with d = {x.shape[-1]}")
    _check_table_dtype(name, table, x)
    _check.last_dim_contiguous(name, table)
    _check.device(name, table, x.device)


def _check_table_dtype(name: str, table: Tensor, x: Tensor) -> None:
    """A table may have any of the kernels' three dtypes, whatever that of x; float64 only beside an x of float64, which is
    computed by the reference alone."""
    _check.floating(name, table)
    if table.dtype == torch.float64 != x.dtype:
        _check.fail(name, f"of dtype {table.dtype}", "float32, float16 or bfloat16")


# The reference ("torch" backend): the definition that every kernel is tested against.


def _reference(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight=None,
               x_scale=1.0, scale=None, *, rms: bool):  # fmt: skip
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = x.shape[-1]

    def rounded(value: Tensor) -> Tensor:
        return value.to(x.dtype).to(acc) if hf else value

    h = x.reshape(-1, d).to(acc)
    if x_weight is not None:
        h = rounded(_rms(h, x_weight, eps, weight_offset, rounded))
    if x_scale != 1:
        h = rounded(h * x_scale)
    if residual is not None:
        h = rounded(h + residual.reshape(-1, d).to(acc))
    if scale is not None:
        h = rounded(h * scale.to(acc))
    if vectors is not None:
        steered = ((slot != -1) & (alpha != 0))[:, None]
        invalid = ((slot < -1) | (slot >= vectors.shape[0]))[:, None]
        direction = vectors[slot.clamp(0, vectors.shape[0] - 1).long()].to(acc)
        strength = alpha.to(acc)[:, None]
        if not lerp:
            h = torch.where(steered, rounded(h + strength * direction), h)
        h = h.masked_fill(invalid, torch.nan)
    y = _rms(h, weight, eps, weight_offset, rounded) if rms else _layer(h, weight, bias, eps)
    if vectors is not None and lerp:
        y = torch.where(steered, (1 - strength) * rounded(y) + strength * direction, y)
    dots = x.new_empty(0, dtype=torch.float32)
    if probes is not None:
        dots = torch.cat([h @ probes.to(acc).T, h.square().sum(-1, keepdim=True)], -1).float()
    stored = h.to(x.dtype).view(x.shape) if _stores_h(residual, vectors, lerp, x_weight, x_scale) else x.new_empty(0)
    return y.to(x.dtype).view(x.shape), stored, dots


def _rms(h: Tensor, weight: Tensor, eps: float, weight_offset: float, rounded) -> Tensor:
    normalised = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight_offset == 0:
        return rounded(normalised) * weight.to(h.dtype)
    return normalised * (weight.to(h.dtype) + weight_offset)


def _layer(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)
    return y if bias is None else y + bias.to(h.dtype)


def _rms_reference(x, residual, weight, eps, *others):
    return _reference(x, residual, weight, None, eps, *others, rms=True)


def _layer_reference(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, hf, probes):
    return _reference(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, 0.0, hf, probes, rms=False)


def _rms_in_place_reference(x, residual, *others):
    return _write(x, residual, *_rms_reference(x, residual, *others))


def _layer_in_place_reference(x, residual, *others):
    return _write(x, residual, *_layer_reference(x, residual, *others))


def _write(x: Tensor, residual: Tensor, y: Tensor, h: Tensor, dots: Tensor) -> Tensor:
    x.copy_(y)
    residual.copy_(h)
    return dots


def _fake(x, probes, stores_h, *others):
    h = x.new_empty(x.shape) if stores_h else x.new_empty(0)
    return x.new_empty(x.shape), h, _fake_dots(x, probes, *others)


def _fake_dots(x, probes, *others):
    _check.one_device("add_rms_norm or add_layer_norm", x, probes, *others)
    shape = (x.numel() // x.shape[-1], probes.shape[0] + 1) if probes is not None else (0,)
    return x.new_empty(shape, dtype=torch.float32)


def _rms_fake(x, residual, weight, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight, x_scale, scale):
    stores_h = _stores_h(residual, vectors, lerp, x_weight, x_scale)
    return _fake(x, probes, stores_h, residual, weight, vectors, slot, alpha, x_weight, scale)


def _layer_fake(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, hf, probes):
    return _fake(x, probes, _stores_h(residual, vectors, lerp), residual, weight, bias, vectors, slot, alpha)


def _rms_in_place_fake(
    x, residual, weight, eps, vectors, slot, alpha, lerp, weight_offset, hf, probes, x_weight, x_scale, scale
):
    return _fake_dots(x, probes, residual, weight, vectors, slot, alpha, x_weight, scale)


def _layer_in_place_fake(x, residual, weight, bias, eps, vectors, slot, alpha, lerp, hf, probes):
    return _fake_dots(x, probes, residual, weight, bias, vectors, slot, alpha)


_STEERING = "Tensor? steer_vectors, Tensor? steer_slot, Tensor? steer_alpha, bool lerp"
_RETURNS = "-> (Tensor y, Tensor h, Tensor probe_dots)"
_IN_PLACE = "Tensor(a!) x, Tensor(b!) residual"
_RMS = (
    f"Tensor weight, float eps, {_STEERING}, float weight_offset, bool hf_rounding, Tensor? probes, Tensor? x_weight, "
    "float x_scale, Tensor? scale"
)
_LAYER = f"Tensor weight, Tensor? bias, float eps, {_STEERING}, bool hf_rounding, Tensor? probes"


def _define(schema: str, fake, reference) -> None:
    define(schema, fake=fake, reference=reference, triton=triton_kernel("norm", name_of(schema)))


_define(f"add_rms_norm(Tensor x, Tensor? residual, {_RMS}) {_RETURNS}", _rms_fake, _rms_reference)
_define(f"add_layer_norm(Tensor x, Tensor? residual, {_LAYER}) {_RETURNS}", _layer_fake, _layer_reference)
_define(f"add_rms_norm_({_IN_PLACE}, {_RMS}) -> Tensor probe_dots", _rms_in_place_fake, _rms_in_place_reference)
_define(f"add_layer_norm_({_IN_PLACE}, {_LAYER}) -> Tensor probe_dots", _layer_in_place_fake, _layer_in_place_reference)
