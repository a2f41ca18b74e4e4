"""One answer at a time on a model: the lock of all who patch it, hang hooks on it or count its steps, and what may not run it
meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ras_fast.patching.structure import transformers_model


class ModelLock(type(threading.RLock())):
    """A re-entrant lock, held by one thread at a time. Of the class that is written in C, whose `__exit__` Ctrl-C cannot strike
    before it has let go: other threads would wait for ever.

    busy_for: whom the thread that holds it has called in the middle of an answer (`at_rest`): until that returns, entering the
        lock raises RuntimeError.

    In a process that was forked while another thread held it, entering it raises RuntimeError: nobody would release it there,
    and the model still carries that thread's hooks.
    """

    def __init__(self):
        super().__init__()
        self._left_behind = False
        self.busy_for: object | None = None

    def __enter__(self) -> None:
        if self._left_behind:
            raise RuntimeError("this process was forked while another thread was answering with the model; load it anew here")
        if self.busy_for is not None and self._is_owned():
            raise in_mid_answer(self.busy_for)
        self.acquire()

    def after_fork(self) -> None:
        """In the child."""
        self._left_behind = not self.acquire(blocking=False)
        if not self._left_behind:
            self.release()


_LOCKS: WeakKeyDictionary[torch.nn.Module, ModelLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _after_fork() -> None:
    global _LOCKS_LOCK
    _LOCKS_LOCK = threading.Lock()
    for lock in _LOCKS.values():
        lock.after_fork()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)


def lock_of(model) -> ModelLock:
    """One for all who patch a model, hang hooks on it or count its steps while it answers: the engine and the reference."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(transformers_model(model), ModelLock())


@contextmanager
def at_rest(model, caller) -> Iterator[None]:
    """Inside the block a forward of the model by this thread, which holds its lock, raises RuntimeError, which names the type
    of ``caller``, and so does whatever takes the lock: another answer, or `SafeGenerator.close`."""
    lock = lock_of(model)

    def refuse(module, args):
        raise in_mid_answer(caller)

    with transformers_model(model).base_model.register_forward_pre_hook(in_this_thread(refuse)):
        lock.busy_for = caller
        try:
            yield
        finally:
            lock.busy_for = None


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook that does nothing in forwards of other threads than the one that makes it."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def in_mid_answer(caller) -> RuntimeError:
    """What is to be raised where ``caller``, a streamer or a logits processor, runs the model that it works for."""
    return RuntimeError(
        f"{type(caller).__name__} runs the model in the middle of an answer, whose steering would reach what it asks; it needs "
        "a model of its own"
    )
