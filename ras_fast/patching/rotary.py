"""Attention modules whose rotary embedding is one kernel instead of the ten of eager code.

Modelling files of transformers rotate queries and keys by a function of their own, `apply_rotary_pos_emb`, or in vision towers
`apply_rotary_pos_emb_vision`. A module whose forward calls one gets a copy of that forward in which the name stands for
`ops.rotary_embedding`, in the form that gives the same bits; other modules, and other models of the same file, keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ras_fast import ops
from ras_fast.memory import reraise_out_of_memory
from ras_fast.patching.trace import Call, reproduce
from ras_fast.patching.undo import StandIn

ROTATION, VISION_ROTATION = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"


class Form(NamedTuple):
    """How such a function pairs dimensions, lays out the tables, and rounds.

    interleaved: neighbours are a pair, as in GLM-4V, and not half a head apart, as in Llama.
    half_tables: they give the cosine of a pair once, as in gpt-oss.
    in_float32: it computes in float32 and rounds at the end, as in Cohere and in vision towers.
    """

    interleaved: bool = False
    half_tables: bool = False
    in_float32: bool = False


FORMS = (Form(), Form(interleaved=True), Form(half_tables=True), Form(in_float32=True), Form(True, in_float32=True))


class FusedRotation(StandIn):
    """Stands in for the `forward` of one attention module: the same, but for how it rotates.

    form: that of the function which the module calls.

    Raises ValueError for a module that does not call such a function.
    """

    def __init__(self, attention: nn.Module, form: Form) -> None:
        self.attention, self.form = attention, form
        found = _with_rotation(attention, self._rotate)
        if found is None:
            raise ValueError(f"{type(attention).__name__} does not call {ROTATION} or {VISION_ROTATION}")
        self._forward, self._original, self._by_op = found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # torch.compile fuses the original by itself, and looks names up in the modelling file whatever a copy says.
        forward = type(self.attention).forward if torch.compiler.is_compiling() else self._forward
        return forward(self.attention, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # a copied function has no name that it could be found by again
        state = super().__getstate__()
        return {name: value for name, value in state.items() if not callable(value) or isinstance(value, nn.Module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__init__(self.attention, self.form)

    def _rotate(self, *args: Any, **kwargs: Any) -> Any:
        """The original where it is called in another way, or with other tensors, than those that the op takes."""
        rotated = self._by_op(self.form, args, kwargs)
        return self._original(*args, **kwargs) if rotated is None else rotated


def proved_rotation(attention: nn.Module, call: Call) -> FusedRotation | str | None:
    """Stands in for the forward of an attention module that was called like this in the trace; why nothing does; or None for a
    module that does not call a function of that name."""
    forms, called = FORMS, False

    def compare(*args: Any, **kwargs: Any) -> Any:
        nonlocal forms, called
        called, forms = True, _forms_of(original, by_op, args, kwargs, forms)
        return original(*args, **kwargs)

    found = _with_rotation(attention, compare)
    if found is None:
        return None
    forward, original, by_op = found
    _, why = reproduce(forward, (attention, *call.args), call.kwargs, call.output)
    if why is None and not called:  # as DeepSeek-V3, whose config has it call another one
        return None
    if why is None and forms:
        fused = FusedRotation(attention, forms[0])
        _, why = reproduce(fused, call.args, call.kwargs, call.output)
        if why is None:
            return fused
    return f"with its rotary embedding in one kernel it {why}" if forms else "rotates in a way of its own"


def proved_tower_rotation(attention: nn.Module) -> FusedRotation | None:
    """Stands in for the forward of a vision tower's attention module, of which there is no trace: the function that it calls is
    tried on random heads, [1, H, L, D] or [L, H, D]. None where nothing does."""
    found = _with_rotation(attention, None)
    device = next((parameter.device for parameter in attention.parameters()), None)
    if found is None or device is None or device.type == "meta":
        return None
    _, original, by_op = found
    generator = torch.Generator().manual_seed(0)
    for heads, table in (((1, 3, 5, 8), (1, 5, 8)), ((5, 3, 8), (5, 8))):
        shapes = heads, heads, table, table
        args = tuple(torch.randn(*shape, generator=generator, device="cpu").to(device) for shape in shapes)
        forms = _forms_of(original, by_op, args, {}, FORMS)
        if forms:
            return FusedRotation(attention, forms[0])
    return None


def _forms_of(original: Callable, by_op: Callable, args: tuple, kwargs: dict, forms: tuple[Form, ...]) -> tuple[Form, ...]:
    """Those that give the bits of the original for these arguments, and for the same in bfloat16, where roundings show."""
    for dtype in (None, torch.bfloat16):
        cast = tuple(x.to(dtype) if dtype is not None and isinstance(x, Tensor) else x for x in args)
        try:
            expected = original(*cast, **kwargs)
        except Exception as error:  # of whatever kind, from a function that takes other tensors
            reraise_out_of_memory(error)
            return ()
        forms = tuple(form for form in forms if _same_bits(by_op(form, cast, kwargs), expected))
    return forms


def _with_rotation(attention: nn.Module, value: Any) -> tuple[Callable, Callable, Callable] | None:
    """(the module's forward with `value` for the function that rotates, that function, what does the same by the op); None for
    a module that calls none."""
    for name, by_op in ((ROTATION, _by_op), (VISION_ROTATION, _by_op_in_tower)):
        found = _with_global(type(attention).forward, name, value)
        if found is not None:
            return *found, by_op
    return None


def _by_op(form: Form, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the function gives, by the op; None for arguments that the op does not take."""
    if not all(isinstance(argument, Tensor) for argument in args):
        return None
    if len(args) == 4 and not kwargs:
        return _rotated(form, *args)
    if len(args) == 4 and kwargs == {"unsqueeze_dim": 0}:  # as in Pixtral: tables [L, D]
        return _rotated(form, *args[:2], *(table[None] for table in args[2:]))
    if len(args) != 3 or kwargs != {"unsqueeze_dim": 2} or args[0].dim() != 4:
        return None
    x, cos, sin = args  # as in Gemma 4: queries and keys one after the other, [B, L, H, D]
    heads = x.transpose(1, 2)
    rotated = _rotated(form, heads, heads[:, :0], cos, sin)
    return None if rotated is None else rotated[0].transpose(1, 2)


def _by_op_in_tower(form: Form, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The same for heads [L, H, D], or [B, L, H, D] as in Kimi K2.5, and tables [L, D] of patches."""
    dims = [isinstance(argument, Tensor) and argument.dim() for argument in args]
    if kwargs or dims not in ([3, 3, 2, 2], [4, 4, 2, 2]):
        return None
    heads, tables = args[:2], [table[None] for table in args[2:]]
    rotated = _rotated(form, *((x if x.dim() == 4 else x[None]).transpose(1, 2) for x in heads), *tables)
    return None if rotated is None else tuple(y.transpose(1, 2).view(x.shape) for x, y in zip(heads, rotated, strict=True))


def _same_bits(got: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return isinstance(got, tuple) and len(got) == len(expected) and all(map(_same_bits, got, expected))
    return isinstance(got, Tensor) and got.dtype == expected.dtype and torch.equal(got, expected)


def _rotated(form: Form, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """The op; None where it does not take these, apart from what the original would refuse as well."""
    if form.half_tables:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    if form.in_float32:
        cos, sin = cos.float(), sin.float()
    if query.dim() != 4 or key.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return None
    rows = cos.shape[0] in (1, query.shape[0])
    tables = rows and cos.shape[1] == query.shape[2] and cos.shape[2] <= query.shape[3] and cos.shape[2] % 2 == 0
    tables_dtype = torch.float32 if form.in_float32 and query.dtype != torch.float64 else query.dtype
    dtypes = query.dtype == key.dtype and cos.dtype == sin.dtype == tables_dtype
    strides = query.stride(3) == key.stride(3) == 1
    if not (tables and dtypes and strides) or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return None
    return ops.rotary_embedding(query, key, cos.contiguous(), sin.contiguous(), interleaved=form.interleaved)


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
