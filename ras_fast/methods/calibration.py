"""What the methods' calibrations share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import Query
from ras_fast.methods import refuse_attached
from ras_fast.model_checks import check_model


def check_arguments(model, processor, **pairs: Sequence) -> None:
    """Raises ValueError for what cannot be a model in eval mode, its processor, or pairs by the names of their arguments, and
    for a model that another method is judging and steering, or whose weights cannot be read: no profile could name it."""
    check_model(model, processor)
    refuse_attached(model)
    fingerprint(model)
    for name, given in pairs.items():
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{name} is a {type(given).__name__}; it needs to be a list of pairs")


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Inside, tensors for which no device is named lie on the CPU, whatever torch.set_default_device says."""
    with torch.device("cpu"):
        yield


def digest(queries: Sequence[Query]) -> str:
    """16 hex digits of the queries' messages and images."""
    found = hashlib.sha256()
    for query in queries:
        found.update(json.dumps(query.messages).encode())
        for image in query.images:
            found.update(f"{image.size}".encode() + image.tobytes())
    return found.hexdigest()[:16]


def groups_of_equal(unsafe: Sequence[Query], safe: Sequence[Query]) -> Tensor:
    """A number for each pair of questions, [n] int64, the same for equal ones, which must not be held out and trained on both.
    Counted from 0 as they first appear."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(digest(pair), len(numbers)) for pair in zip(unsafe, safe, strict=True)]
    return torch.tensor(found, dtype=torch.int64)
