"""Changes to a model that can be undone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn


class StandIn:
    """What a patch puts into a module, such as in place of its forward.

    A copy of the module without the model around it, as PEFT makes one for an adapter, is nobody's to steer, read or undo: it
    gets what `alone` makes instead.
    """

    owner: nn.Module  # this and `whole` are set by Undo.set
    whole: tuple[nn.Module, ...] = ()  # with one of which the patch is copied as well

    def alone(self, memo: dict[int, Any]) -> Any:
        owner = copy.deepcopy(self.owner, memo)
        return MethodType(type(owner).forward, owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not any(id(model) in memo for model in self.whole):
            return self.alone(memo)
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.whole = copy.deepcopy(self.whole, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which would be in the pickle of a part; that of the whole has an `Undo`, which gives it back."""
        return {name: value for name, value in vars(self).items() if name != "whole"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Undo:
    """All changes made to the model, so that they can be undone in reverse order.

    Holds owners, not their dicts, so that the deepcopy of a patched model undoes itself.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Any, Any, bool, Any]] = []
        self._stand_ins: list[StandIn] = []
        self.whole: tuple[nn.Module, ...] = ()  # the model and its text model

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for stand_in in self._stand_ins:
            if isinstance(stand_in, StandIn):  # not what `alone` made of it
                stand_in.whole = self.whole

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute in the owner's own dict, past nn.Module's bookkeeping."""
        self._changes.append((owner, name, name in owner.__dict__, owner.__dict__.get(name)))
        if isinstance(value, StandIn):
            value.owner, value.whole = owner, self.whole
            self._stand_ins.append(value)
        owner.__dict__[name] = value

    def hook_before(self, module: nn.Module, function: Any) -> None:
        """Calls `function(module, args, kwargs)` before each forward of the module."""
        self._hooking(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, function)
        module.register_forward_pre_hook(function, with_kwargs=True)

    def hook_after(self, module: nn.Module, function: Any, always_call: bool = False) -> None:
        """Calls `function(module, args, output)` after each forward of the module, or even after one that raises."""
        self._hooking(module._forward_hooks, module._forward_hooks_always_called, function)
        module.register_forward_hook(function, always_call=always_call)

    def _hooking(self, hooks: dict, flags: dict, function: Any) -> None:
        """A hook is about to be registered in these dicts of a module. By its function, as it has no number yet: were it noted
        afterwards, an interrupt in between would leave it there."""
        self._changes.append(((hooks, flags), function, False, None))

    def mark(self) -> int:
        """A point that `restore` can go back to."""
        return len(self._changes)

    def restore(self, mark: int = 0) -> None:
        while len(self._changes) > mark:
            owner, name, existed, value = self._changes[-1]
            if isinstance(owner, tuple):
                _remove_hook(*owner, name)
            else:
                if name in ("forward", "_old_forward"):
                    name, existed, value = _forward_before(owner, value)
                if existed:
                    owner.__dict__[name] = value
                else:
                    owner.__dict__.pop(name, None)
            self._changes.pop()  # last: an interrupt in between does the same once more, and loses nothing
        if not self._changes:
            self._stand_ins.clear()


@contextmanager
def undone() -> Iterator[Undo]:
    """What is changed by this `Undo` is as before after the block, also where the block is in a generator that nobody ends:
    before the garbage collector does, it clears the weak reference by which the handle of a hook finds it."""
    undo = Undo()
    try:
        yield undo
    finally:
        undo.restore()


def _remove_hook(hooks: dict, flags: dict, function: Any) -> None:
    """By equality: the deepcopy of a model may have made two of one bound method."""
    for number in [number for number, hook in hooks.items() if function == hook]:
        flags.pop(number, None)
        del hooks[number]


def _forward_before(module: nn.Module, before: Any) -> tuple[str, bool, Any]:
    """Where `restore` puts a module's forward, whether anything goes there, and what: accelerate's hooks, which call
    `_old_forward` in between, may have come or gone since `patch`."""
    if "_hf_hook" in module.__dict__:
        return "_old_forward", True, before or MethodType(type(module).forward, module)
    return "forward", before is not None, before


def forward_slot(module: nn.Module) -> str | None:
    """The attribute that holds what `module(...)` runs; None where someone else has replaced it."""
    own = module.__dict__.get("forward")
    if own is None or getattr(own, "__func__", None) is type(module).forward:  # accelerate's hooks leave it when they go
        return "forward"
    return "_old_forward" if "_hf_hook" in module.__dict__ else None  # accelerate's hooks call that in between


def runs(module: nn.Module, stand_in: StandIn) -> bool:
    """Whether the module runs it, maybe below accelerate's hooks: since it was put there, somebody may have put another forward
    in its place, as kernels of the hub are, or around it, which may not call it."""
    return module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward") is stand_in
