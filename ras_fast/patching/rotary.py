"""Attention modules whose rotary embedding is one kernel instead of the ten of eager code.

Modelling files of transformers rotate queries and keys by a function of their own, `apply_rotary_pos_emb`. A module whose
forward calls it gets a copy of that forward in which the name stands for `ops.rotary_embedding`, in the form that gives the
same bits; other modules, and other models of the same file, keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast import ops
from ras_fast.patching.trace import Call, reproduce

ROTATION = "apply_rotary_pos_emb"


# How that function pairs dimensions and lays out the tables: as in Llama; as in GLM-4V; as in gpt-oss, whose pairs are Llama's,
# and whose tables give the cosine of a pair once.
FORMS = ("halves", "neighbours", "half tables")


class FusedRotation:
    """Stands in for the `forward` of one attention module: the same, but for how it rotates.

    form: of FORMS, that of the function which the module calls.

    Raises ValueError for a module that does not call such a function.
    """

    def __init__(self, attention: nn.Module, form: str) -> None:
        self.attention, self.form = attention, form
        found = _with_global(type(attention).forward, ROTATION, self._rotate)
        if found is None:
            raise ValueError(f"{type(attention).__name__} does not call {ROTATION}")
        self._forward, self._original = found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # torch.compile fuses the original by itself, and looks names up in the modelling file whatever a copy says.
        forward = type(self.attention).forward if torch.compiler.is_compiling() else self._forward
        return forward(self.attention, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # a copied function has no name that it could be found by again
        return {"attention": self.attention, "form": self.form}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _rotate(self, *args: Any, **kwargs: Any) -> Any:
        """The original where it is called in another way, or with other tensors, than those that the op takes."""
        rotated = _by_op(self.form, args, kwargs)
        return self._original(*args, **kwargs) if rotated is None else rotated


def proved_rotation(attention: nn.Module, call: Call) -> FusedRotation | str | None:
    """Stands in for the forward of an attention module that was called like this in the trace; why nothing does; or None for a
    module that does not call a function of that name."""
    forms, original, called = list(FORMS), None, False

    def compare(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called, expected = True, original(*args, **kwargs)
        forms[:] = [form for form in forms if _same_bits(_by_op(form, args, kwargs), expected)]
        return expected

    found = _with_global(type(attention).forward, ROTATION, compare)
    if found is None:
        return None
    forward, original = found
    _, why = reproduce(forward, (attention, *call.args), call.kwargs, call.output)
    if why is None and not called:  # as DeepSeek-V3, whose config has it call another one
        return None
    if why is None and forms:
        fused = FusedRotation(attention, forms[0])
        _, why = reproduce(fused, call.args, call.kwargs, call.output)
        if why is None:
            return fused
    return f"with its rotary embedding in one kernel it {why}" if forms else "rotates in a way of its own"


def _by_op(form: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the function gives, by the op; None for arguments that the op does not take."""
    if not all(isinstance(argument, Tensor) and argument.dim() in (3, 4) for argument in args):
        return None
    if len(args) == 4 and not kwargs:
        return _rotated(form, *args)
    if len(args) != 3 or kwargs != {"unsqueeze_dim": 2}:
        return None
    x, cos, sin = args  # as in Gemma 4: queries and keys one after the other, [B, L, H, D]
    heads = x.transpose(1, 2)
    rotated = _rotated(form, heads, heads[:, :0], cos, sin)
    return None if rotated is None else rotated[0].transpose(1, 2)


def _same_bits(got: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return isinstance(got, tuple) and len(got) == len(expected) and all(map(_same_bits, got, expected))
    return isinstance(got, Tensor) and got.dtype == expected.dtype and torch.equal(got, expected)


def _rotated(form: str, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """The op; None where it does not take these, apart from what the original would refuse as well."""
    if form == "half tables":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    if query.dim() != 4 or key.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return None
    rows = cos.shape[0] in (1, query.shape[0])
    tables = rows and cos.shape[1] == query.shape[2] and cos.shape[2] <= query.shape[3] and cos.shape[2] % 2 == 0
    dtypes = query.dtype == key.dtype == cos.dtype == sin.dtype
    strides = query.stride(3) == key.stride(3) == 1
    if not (tables and dtypes and strides) or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return None
    return ops.rotary_embedding(query, key, cos.contiguous(), sin.contiguous(), interleaved=form == "neighbours")


def _with_global(function: Callable, name: str, value: Any) -> tuple[Callable, Any] | None:
    """(a copy of a function in which a global name stands for `value`, what it stood for): where the function itself uses that
    name, or else what its decorators wrap. None where nothing does."""
    if not isinstance(function, FunctionType):
        return None
    if name in function.__code__.co_names and name in function.__globals__:
        return _copy(function, function.__globals__ | {name: value}, function.__closure__), function.__globals__[name]
    wrapped = getattr(function, "__wrapped__", None)
    found = _with_global(wrapped, name, value)
    if found is None:
        return None
    cells = [CellType(found[0]) if cell.cell_contents is wrapped else cell for cell in function.__closure__ or ()]
    return _copy(function, function.__globals__, tuple(cells)), found[1]


def _copy(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
