"""Registers an op once for every backend and picks the implementation of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ras_fast import backend

LIBRARY = torch.library.Library("ras_fast", "FRAGMENT")
_references: dict[str, Callable[..., Any]] = {}


def define(schema: str, *, fake: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Defines `ras_fast::<name>` from its schema, with its fake kernel and its reference.

    The reference also serves devices for which no native kernel is built. csrc/ops.cpp and csrc/cuda/ops.cu add the native
    ones to the same op. The schema lives here, not in C++, because a pure-Python install has the ops, too.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ras_fast::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _references[name] = reference


def define_triton(schema: str, *, fake: Callable[..., Any], kernel: Callable[..., Any]) -> None:
    """Defines `ras_fast::<name>_triton`, the Triton twin of an op, with the same schema."""
    name, arguments = schema.split("(", 1)
    LIBRARY.define(f"{name}_triton({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ras_fast::{name}_triton", fake, lib=LIBRARY)
    for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        LIBRARY.impl(f"{name}_triton", kernel, key)


def implementation(name: str, like: torch.Tensor) -> Callable[..., Any]:
    """The callable that runs `name` on tensors such as `like` under the chosen backend; float64 has only the reference."""
    chosen = backend.resolve(name, like.device)
    if chosen == "torch" or like.dtype == torch.float64:
        return _references[name]
    if chosen == "triton":
        if not hasattr(torch.ops.ras_fast, f"{name}_triton"):
            raise ValueError(f"backend 'triton' is forced, but {name} has no Triton kernel")
        return getattr(torch.ops.ras_fast, f"{name}_triton").default
    return getattr(torch.ops.ras_fast, name).default
