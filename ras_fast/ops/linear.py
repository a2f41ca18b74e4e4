"""Linear maps of few rows: a projection of a decode step, the first half of a gated MLP, and a matrix applied to the rows
that a gate lets through (docs/kernels.md, "Linear").

Shapes: T rows (the product of x's leading dimensions), K and N inputs and outputs; of the gated one d hidden size, r rank.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ras_fast.backend import device_type, forced_backend
from ras_fast.ops import _check
from ras_fast.ops._registry import call, define, triton_kernel

# (elements of a weight from which on, rows up to which): with more rows torch's products are faster (docs/kernels.md). A CPU's
# caches hold a small weight, and reading it then is not what takes the time.
FEW_ROWS = {"cpu": ((1 << 21, 32), (1 << 20, 16), (1 << 18, 8), (0, 2)), "cuda": ((0, 16),)}
HALVES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (torch.float32, *HALVES)
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def _slow_dtypes() -> frozenset[torch.dtype]:
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return frozenset()
    known = torch.ops.mkldnn
    able = (known._is_mkldnn_fp16_supported(), known._is_mkldnn_bf16_supported())
    return frozenset(dtype for dtype, is_able in zip(HALVES, able, strict=True) if not is_able)


# What oneDNN does not multiply on this processor: torch's own loops are many times slower, however many the rows.
SLOW_DTYPES = _slow_dtypes()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, at the speed at which W can be read while rows are few, as in a decode step.

    Sums are float32, rounded once. Up to `few_rows` rows a row's result is the same bits whatever rows are computed with it;
    more rows, and float32 on a GPU, are `torch.nn.functional.linear`'s, but for half precision on processors that have no
    instructions for it.

    Args:
        x: [..., K], float32, float16 or bfloat16 (float64: torch's); any strides with a contiguous last dimension.
        weight: [N, K], dtype of `x`, contiguous last dimension.
        bias: [N], dtype of `x`, contiguous.

    Returns:
        [..., N], dtype of `x`, contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or stride; the message names it.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("linear", x, weight, bias)
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and beats_torch(x, weight):
        return call("linear", _validate_linear, x, weight, bias)
    _validate_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """x Wᵢᵀ + bᵢ for several weights in one launch, as of an attention's queries, keys and values.

    Each is, bit for bit, what :func:`linear` gives where it is this package's kernel's. Where it is not so for one of them, all
    are torch's.

    Args:
        x: [..., K], as for :func:`linear`.
        weights: Wᵢ, each [Nᵢ, K], as for :func:`linear`; at least one.
        biases: as many, each [Nᵢ] or None; None: none has any.

    Returns:
        As many tensors [..., Nᵢ], dtype of `x`, contiguous.

    Raises:
        ValueError: an argument has the wrong length, or one of its tensors the wrong shape, dtype, device or stride.
        RuntimeError: an input requires grad and grad mode is on.
    """
    if not isinstance(weights, Sequence) or not weights:
        _check.fail("weights", repr(weights), "a list of at least one tensor")
    biases = [None] * len(weights) if biases is None else biases
    if not isinstance(biases, Sequence) or len(biases) != len(weights):
        _check.fail("biases", repr(biases), f"a list of {len(weights)} tensors or None")
    _check.no_grad("linears", x, *weights, *biases)
    if isinstance(x, Tensor) and all(isinstance(weight, Tensor) and beats_torch(x, weight) for weight in weights):
        return call("linears", _validate_linears, x, list(weights), list(biases))
    _validate_linears(x, weights, biases)
    return [F.linear(x, *parameters) for parameters in zip(weights, biases, strict=True)]


def linear_glu(x: Tensor, gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(x Gᵀ) · (x Uᵀ), the first half of a gated MLP (SwiGLU and GEGLU, arXiv 2002.05202), in one pass over both.

    Products, activation and their product are rounded to the dtype of `x` one by one, where Hugging Face's eager code rounds.
    As :func:`linear`: more rows than `few_rows`, and float32 on a GPU, are torch's.

    Args:
        x: [..., K], as for :func:`linear`.
        gate, up: G and U, [N, K], dtype of `x`, contiguous last dimension.
        activation: "silu" or "gelu_tanh".

    Returns:
        [..., N], dtype of `x`, contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or stride, or `activation` is unknown.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("linear_glu", x, gate, up)
    if isinstance(x, Tensor) and isinstance(gate, Tensor) and beats_torch(x, gate):
        return call("linear_glu", _validate_glu, x, gate, up, activation)
    _validate_glu(x, gate, up, activation)
    return _reference_glu(x, gate, up, activation)


@cache
def few_rows(device: str, dtype: torch.dtype, elements: int) -> int:
    """Up to how many rows this package's kernel is faster than torch's product, on a type of device, with a weight of so many
    elements; 0 where there is no kernel."""
    if is_slow(device, dtype):
        return sys.maxsize
    if dtype not in (KERNEL_DTYPES if device == "cpu" else HALVES):
        return 0
    return next((rows for least, rows in FEW_ROWS.get(device, ()) if elements >= least), 0)


def is_slow(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's products are slow on a type of device however many the rows."""
    return device == "cpu" and dtype in SLOW_DTYPES


def beats_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of x [..., K] is this package's kernel's, and not torch's."""
    device = device_type(x)
    few = few_rows(device, x.dtype, weight.numel())
    if not few or (x.dim() and x.numel() > few * x.shape[-1]):
        return False
    return forced_backend() in ("auto", "torch", device)  # Triton has no kernel for it


def linear_by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`, where `beats_torch` and no gradient is asked for. Raises RuntimeError for what the kernel does not take."""
    return call("linear", None, x, weight, bias)


def linears_by_kernel(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """`linears`, likewise."""
    return call("linears", None, x, weights, biases)


def glu_by_kernel(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`linear_glu`, likewise."""
    return call("linear_glu", None, x, gate, up, activation)


def _validate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")) -> None:
    _validate_product(x, names[0], weight)
    _check.tensors_or_none(**{names[1]: bias})
    if bias is not None:
        _check.shape(names[1], bias, (weight.shape[0],), "[N]")
        _check.stored(names[1], bias, x.dtype, x.device)


def _validate_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    for index, parameters in enumerate(zip(weights, biases, strict=True)):
        _validate_linear(x, *parameters, (f"weights[{index}]", f"biases[{index}]"))


def _validate_glu(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    _validate_product(x, "gate", gate)
    _check.tensors(up=up)
    _check.shape("up", up, tuple(gate.shape), "[N, K]")
    _check.stored("up", up, x.dtype, x.device)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        _check.fail("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")


def _validate_product(x: Tensor, name: str, weight: Tensor) -> None:
    _check.tensors(x=x, **{name: weight})
    _check.floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        _check.fail("x", f"of shape {tuple(x.shape)}", "[..., K] with K > 0")
    _check.last_dim_contiguous("x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        _check.fail(name, f"of shape {tuple(weight.shape)}", f"[N, K] with K = {x.shape[-1]}")
    _check.stored(name, weight, x.dtype, x.device)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check.one_device("linear", x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_fake_linear(x, *parameters) for parameters in zip(weights, biases, strict=True)]


def _fake_glu(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check.one_device("linear_glu", x, gate, up)
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


def _reference_glu(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, gate)) * F.linear(x, up)


def _reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).contiguous()


def _reference_linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_reference_linear(x, *parameters) for parameters in zip(weights, biases, strict=True)]


def _flops(x: torch.Size, *matrices: object, **kwargs: object) -> int:
    """Of x times each matrix, whatever else the op takes."""
    shapes = (matrix for matrix in matrices if isinstance(matrix, torch.Size) and len(matrix) == 2)
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, shapes))


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake_linear,
    reference=_reference_linear,
    flops=_flops,
)
define(
    "linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    fake=_fake_linears,
    reference=_reference_linears,
    flops=lambda x, weights, biases, **kwargs: _flops(x, *weights),
)
define(
    "linear_glu(Tensor x, Tensor gate, Tensor up, str activation) -> Tensor",
    fake=_fake_glu,
    reference=_reference_glu,
    flops=_flops,
)


def gated_linear(x: Tensor, weight: Tensor, gate: Tensor, *, right: Tensor | None = None) -> Tensor:
    """x + gate · (M x) for each row: AutoSteer's refusal head (arXiv 2507.13255). M is `weight`, or `weight` @ `right`.

    The gates are read on the device. A row whose gate is 0 is returned bit for bit, whatever M holds, and costs no work; where
    every gate is 0, M is not read. The sum is rounded once. A gate that is NaN or infinite makes its own row not finite, so
    that it is not silently unsteered, and changes no other row. float64 is taken as well, by the reference alone.

    Args:
        x: [..., d], float32, float16 or bfloat16; any strides with a contiguous last dimension.
        weight: M [d, d], or [d, r] with `right`; dtype of `x`, contiguous last dimension. Row i gives output element i, as
            in `torch.nn.Linear`.
        gate: [T] float32.
        right: [r, d] with r > 0, dtype of `x`, contiguous last dimension.

    Returns:
        [..., d], dtype of `x`, contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("gated_linear", x, weight, gate, right)
    return call("gated_linear", _validate_gated, x, weight, right, gate)


def _validate_gated(x: Tensor, weight: Tensor, right: Tensor | None, gate: Tensor) -> None:
    _check.tensors(x=x, weight=weight, gate=gate)
    _check.tensors_or_none(right=right)
    if x.dim() == 0 or x.shape[-1] == 0:
        _check.fail("x", f"of shape {tuple(x.shape)}", "[..., d] with d > 0")
    d = x.shape[-1]
    _check.floating("x", x)
    _check.last_dim_contiguous("x", x)
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] == 0:
        _check.fail("weight", f"of shape {tuple(weight.shape)}", f"[d, d], or [d, r] with r > 0 beside right, with d = {d}")
    if right is None:
        _check.shape("weight", weight, (d, d), "[d, d]")
    else:
        _check.shape("right", right, (weight.shape[1], d), "[r, d] with weight [d, r]")
    _check.stored("weight", weight, x.dtype, x.device)
    if right is not None:
        _check.stored("right", right, x.dtype, x.device)
    _check.shape("gate", gate, (x.numel() // d,), "[T]")
    _check.stored("gate", gate, torch.float32, x.device)


def _reference_gated(x: Tensor, weight: Tensor, right: Tensor | None, gate: Tensor) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1])
    moved = rows.to(acc) if right is None else F.linear(rows.to(acc), right.to(acc))
    moved = rows.to(acc) + gate.to(acc)[:, None] * F.linear(moved, weight.to(acc))
    # Left out, not multiplied by zero: M x may overflow in a row that is off.
    return torch.where((gate == 0)[:, None], rows, moved.to(x.dtype)).view(x.shape)


def _fake_gated(x: Tensor, weight: Tensor, right: Tensor | None, gate: Tensor) -> Tensor:
    _check.one_device("gated_linear", x, weight, right, gate)
    return x.new_empty(x.shape)


define(
    "gated_linear(Tensor x, Tensor weight, Tensor? right, Tensor gate) -> Tensor",
    fake=_fake_gated,
    reference=_reference_gated,
    triton=triton_kernel("gated_linear", "gated_linear"),
    flops=_flops,
)
