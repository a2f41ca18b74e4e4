"""Registers an op once for every backend and picks the implementation of a call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ras_fast import backend

LIBRARY = torch.library.Library("ras_fast", "FRAGMENT")
_references: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Defines `ras_fast::<name>` from its schema, with its fake kernel and its reference; with `triton` also
    `ras_fast::<name>_triton`, its twin of the same schema. `flops` counts the operations of its matrix products for
    `torch.utils.flop_counter`: of the op's arguments, with shapes for tensors.

    The reference also serves devices for which no native kernel is built. The launchers in csrc/ add the native
    ones to the same op. The schema lives here, not in C++, because a pure-Python install has the ops, too.
    """
    name, reference = name_of(schema), outside_autocast(reference)
    _define(schema, fake)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _references[name] = reference
    if triton is not None:
        _define(renamed(schema, f"{name}_triton"), fake)
        for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
            LIBRARY.impl(f"{name}_triton", triton, key)
    if flops is not None:
        names = (name,) if triton is None else (name, f"{name}_triton")
        register_flop_formula([getattr(torch.ops.ras_fast, each) for each in names])(flops)


def _define(schema: str, fake: Callable[..., Any]) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ras_fast::{name_of(schema)}", fake, lib=LIBRARY)


def name_of(schema: str) -> str:
    """ "region_mass" of "region_mass(Tensor query, …) -> Tensor"."""
    return schema[: schema.index("(")]


def renamed(schema: str, name: str) -> str:
    """The schema of an op `name` of the same arguments and results."""
    return name + schema[schema.index("(") :]


def guards_nothing(name: str, device: str) -> None:
    """Says that an op is put together in Python on this type of device, of parts that take what they are given."""
    _unguarded.add((name, device))


def triton_kernel(module: str, name: str) -> Callable[..., Any]:
    """Function `name` of ras_fast.triton_kernels.<module>, which is imported with its first call: Triton may be missing, and is
    slow to import."""

    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(f"ras_fast.triton_kernels.{module}"), name)(*args)

    return kernel


def outside_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with autocast off: autocast would run its matrix products in half precision, and statistics are float32."""

    @functools.wraps(kernel)
    def run(first: torch.Tensor, *args: Any) -> Any:
        device = backend.device_type(first)
        if device == "meta" or not torch.is_autocast_enabled(device):  # asking is an error on meta
            return kernel(first, *args)
        with torch.autocast(device, enabled=False):
            return kernel(first, *args)

    return run


def call(name: str, validate: Callable[..., None] | None, *args: Any) -> Any:
    """Runs op `name` on `args`, whose first tensor decides device and dtype, under the chosen backend.

    `validate` takes the op's arguments and raises a ValueError that names the wrong one; None: they are validated already.
    Native kernels refuse by themselves whatever would be unsafe. For them `validate` runs only after a failure, to name the
    argument, so that a decode step does not pay for it.
    """
    try:
        kernel, guarded = _select(name, args[0])
    except AttributeError:  # of what is no tensor
        if validate is not None:
            validate(*args)
        raise
    if validate is None:
        return kernel(*args)
    if not guarded:
        validate(*args)
        return kernel(*args)
    try:
        return kernel(*args)
    except RuntimeError:
        validate(*args)
        raise


def _select(name: str, like: torch.Tensor) -> tuple[Callable[..., Any], bool]:
    """(implementation, whether it guards itself)."""
    if torch.compiler.is_compiling():  # validation is traced away, and the fake kernels guard nothing
        return _implementation(name, like), False
    device = backend.device_type(like)
    key = (name, backend.forced_backend(), type(like), device, like.dtype)
    found = _selected.get(key)
    if found is None:
        kernel = _implementation(name, like)
        guarded = backend.has_kernel(name, device) and (name, device) not in _unguarded
        native = guarded and not issubclass(type(like), FakeTensor)
        found = _selected[key] = kernel, native and kernel is getattr(torch.ops.ras_fast, name).default
    return found


_selected: dict[tuple[Any, ...], tuple[Callable[..., Any], bool]] = {}
_unguarded: set[tuple[str, str]] = set()


def _implementation(name: str, like: torch.Tensor) -> Callable[..., Any]:
    """The callable that runs `name` on tensors such as `like` under the chosen backend; float64 has only the reference."""
    chosen = backend.resolve(name, like.device)
    if chosen == "torch" or like.dtype == torch.float64:
        return _references[name]
    if chosen == "triton":
        if not hasattr(torch.ops.ras_fast, f"{name}_triton"):
            raise ValueError(f"backend 'triton' is forced, but {name} has no Triton kernel")
        return getattr(torch.ops.ras_fast, f"{name}_triton").default
    return getattr(torch.ops.ras_fast, name).default
