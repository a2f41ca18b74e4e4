"""Data-parallel work: every process computes its share of a list of items, and all of them get all results, in order.

A process that `accelerate launch` or `torchrun` has started takes part once it has an `accelerate.PartialState` (on CPUs made
with `cpu=True`); `join` makes one. A process without it does all the work itself: a single process, or ranks that share one
model by tensor parallelism.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from tqdm.auto import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def join() -> None:
    """Makes this process take part if a launcher has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def rank() -> int:
    """This process's number among those that take part."""
    state = _state()
    return 0 if state is None else state.process_index


def world_size() -> int:
    """How many processes take part."""
    state = _state()
    return 1 if state is None else state.num_processes


def _state():
    accelerate = sys.modules.get("accelerate")
    made = accelerate is not None and accelerate.PartialState._shared_state
    return accelerate.PartialState() if made else None


def wait() -> None:
    """Waits until all processes have come here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def each(function: Callable[[Item], Result], items: Iterable[Item], description: str, progress: bool = True) -> list[Result]:
    """[function(item) for item in items], the items shared among the processes.

    Results travel between processes by pickling: tensors should be on the CPU. An exception in one process is raised in all of
    them, as the others would wait for its results for ever.
    """
    items, first, processes = list(items), rank(), world_size()
    bar = tqdm(items[first::processes], desc=description, disable=not progress or first > 0)
    if processes == 1:
        return [function(item) for item in bar]
    from accelerate.utils import gather_object

    try:
        part: list[Result] | Exception = [function(item) for item in bar]
    except Exception as error:
        part = error
    results: list[Result] = [None] * len(items)
    for index, theirs in enumerate(gather_object([part])):
        if isinstance(theirs, Exception):
            raise theirs
        results[index::processes] = theirs
    return results
