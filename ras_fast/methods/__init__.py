"""Inference-time defences, one module each: ``calibrate(...) -> RasProfile``, and the code that applies such a profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ras_fast.model_lock import lock_of

if TYPE_CHECKING:
    from torch import Tensor

    from ras_fast.patching import Patch
    from ras_fast.profile import RasProfile

# Methods that need no pass of their own, by the class that applies them; MoRAS's stages are run by SafeGenerator.
ONE_PASS = {"autosteer": "AutoSteer", "attention": "AttentionRisk", "projection": "Projection"}
_MODULES = ("moras", *ONE_PASS)
_BIASES: WeakKeyDictionary[Patch, list[dict[int, Tensor]]] = WeakKeyDictionary()  # from before all blocks, then theirs
_AT_WORK: WeakKeyDictionary[Patch, list[str]] = WeakKeyDictionary()  # the methods of the blocks that are open

__all__ = ["attach", "region_bias", *_MODULES]


def attach(patch: Patch, profile: RasProfile) -> AbstractContextManager[Any]:
    """Defends a patched model's own `generate` inside a `with` block, without an extra forward pass.

    Args:
        patch: of the model that the profile was calibrated on (`ras_fast.patch`).
        profile: of a one-pass method: "autosteer", "attention" or "projection".

    Returns:
        A context manager whose value is the method at work. After the forward that reads the prompts its `risk` is [B]
        float32 and its `failed` [B] bool, both on the model's device: the risk of each sequence, and which of them failed
        closed.

    The profile's `region_bias`, if it has one, is in force as long as the method. The block waits for a `generate` that another
    thread is in; one that begins later, of a `model.generate` that was taken from the model inside, raises RuntimeError.

    Raises:
        ValueError: the method needs stages of its own, the profile is of another model or no `RasProfile`, or `patch` is not a
            `Patch`.
    """
    if not hasattr(profile, "method"):
        raise ValueError(f"profile is a {type(profile).__name__}; it needs to be a RasProfile (RasProfile.from_pretrained)")
    if profile.method not in ONE_PASS:
        raise ValueError(
            f"profile method is {profile.method!r}, which asks the model more than once; use ras_fast.SafeGenerator. "
            f"attach takes {', '.join(ONE_PASS)}"
        )
    if not hasattr(patch, "applied"):
        raise ValueError(f"patch is a {type(patch).__name__}; it needs to be what ras_fast.patch(model) returns")
    return attached(patch, method_of(profile))


def method_of(profile: RasProfile) -> Any:
    """The method of a one-pass profile, which may be `attached` many times. Raises ValueError when the profile is unsound."""
    module = import_module(f"ras_fast.methods.{profile.method}")
    return getattr(module, ONE_PASS[profile.method])(profile)


@contextmanager
def attached(patch: Patch, method: Any, **options: Any) -> Iterator[Any]:
    """`attach` with a method that is there already."""
    bias = method.profile.tensors.get("region_bias")
    at_work, name = _AT_WORK.setdefault(patch, []), method.profile.method
    with ExitStack() as ending, ExitStack() as block:
        with lock_of(patch.model):  # not in the middle of another thread's answer
            block.enter_context(region_bias(patch, bias))
            block.enter_context(method.hooked(patch, **options))
            at_work.append(name)
        try:
            yield method
        finally:
            try:
                ending.enter_context(lock_of(patch.model))  # a `generate` that another thread is in is to end first
            finally:
                ending.callback(at_work.remove, name)  # after the method's end: who gets the lock before is still inside


def refuse_attached(model: Any) -> None:
    """Raises ValueError for a model inside an `attach` block, whose method would judge and steer every forward."""
    from ras_fast.patching import Patch

    patch = Patch.of(model)
    if at_work := patch is not None and _AT_WORK.get(patch):
        raise ValueError(
            f"model is inside a block of ras_fast.methods.attach with a {at_work[-1]!r} profile, which judges and steers every "
            "forward; leave that block first"
        )


@contextmanager
def region_bias(patch: Patch, bias: Tensor | None) -> Iterator[None]:
    """Raises or lowers the attention of a patched model's heads to the images in every forward inside the block. A bias that
    was in force before is replaced there, and comes back afterwards. Blocks may end in any order.

    bias: [layers, Hq] or [layers, Hq, R], as `Patch.set_region_bias` takes it for each layer; any profile may have one as its
        tensor `region_bias`. None: nothing happens.

    Raises ValueError when its sizes are not the model's.
    """
    if bias is None:
        yield
        return
    if bias.dim() not in (2, 3) or len(bias) != len(patch.layers):
        raise ValueError(f"region_bias has shape {tuple(bias.shape)}; it needs to be [{len(patch.layers)}, Hq] or […, R]")
    own = {layer: row for layer, row in enumerate(bias) if bool(row.any())}
    stack = _BIASES.setdefault(patch, [patch.region_bias])
    stack.append(own)
    try:
        patch.set_region_bias(own)
        yield
    finally:
        stack[:] = [other for other in stack if other is not own]
        if patch.applied:
            patch.set_region_bias(stack[-1])
        if len(stack) == 1:
            del _BIASES[patch]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ras_fast.methods.{name}")
    raise AttributeError(f"module 'ras_fast.methods' has no attribute {name!r}")
