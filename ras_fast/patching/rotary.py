"""Attention modules whose rotary embedding is one kernel instead of the ten of eager code.

Modelling files of transformers rotate queries and keys by a function of their own, `apply_rotary_pos_emb(q, k, cos, sin)`. A
module whose forward calls it gets a copy of that forward in which the name stands for `ops.rotary_embedding`, which gives the
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


class FusedRotation:
    """Stands in for the `forward` of one attention module: the same, but for how it rotates.

    Raises ValueError for a module that does not call such a function.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        found = _with_global(type(attention).forward, ROTATION, self._rotate)
        if found is None:
            raise ValueError(f"{type(attention).__name__} does not call {ROTATION}")
        self._forward, self._original = found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # torch.compile fuses the original by itself, and looks names up in the modelling file whatever a copy says.
        forward = type(self.attention).forward if torch.compiler.is_compiling() else self._forward
        return forward(self.attention, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # a copied function has no name that it could be found by again
        return {"attention": self.attention}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _rotate(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The original where it is called in another way, or with other tensors, than those that the op takes."""
        if kwargs or len(args) != 3 or not _op_takes(query, *args):
            return self._original(query, *args, **kwargs)
        return ops.rotary_embedding(query, *args)


def proved_rotation(attention: nn.Module, call: Call) -> FusedRotation | str | None:
    """The form of an attention module, called like this in the trace, that rotates by the op; why there is none; or None for a
    module that does not call a function of that name."""
    try:
        fused = FusedRotation(attention)
    except ValueError:
        return None
    original, fused._original = fused._original, _refuse
    _, why = reproduce(fused, call.args, call.kwargs, call.output)
    fused._original = original
    return fused if why is None else f"with its rotary embedding in one kernel it {why}"


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise TypeError(f"calls {ROTATION} in another way than (q, k, cos, sin) with q, k [B, H, L, D]")


def _op_takes(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `ops.rotary_embedding` takes these, apart from what the original would refuse as well."""
    if query.dim() != 4 or key.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    rows = cos.shape[0] in (1, query.shape[0])
    tables = rows and cos.shape[1] == query.shape[2] and cos.shape[2] <= query.shape[3]
    dtypes = query.dtype == key.dtype == cos.dtype == sin.dtype
    return tables and dtypes and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))


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
