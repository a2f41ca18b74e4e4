"""Numbers as settings hold them: in arguments, configs of profiles and requests."""

from __future__ import annotations

import sys

import torch


def number(config: dict, name: str) -> float:
    """The finite number that a profile's config holds under `name`. Raises ValueError where it does not."""
    value = config.get(name)
    if not is_number(value) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"profile config {name!r} is {value!r}; it needs to be a finite number")
    return value


def as_float32(value: float) -> float:
    """The number that it becomes on the device: a small one may be 0 there, one next to 1 may be 1, a large one infinite."""
    return torch.tensor(float(value), dtype=torch.float32).item()


def is_integer(value: object) -> bool:
    """Whether it is one, and not a truth value, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_counts(**given: object) -> None:
    """Raises ValueError where one of these, by its name, is no integer of at least 1."""
    for name, value in given.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; it needs to be an integer of at least 1")


def check_flags(**given: object) -> None:
    """Raises ValueError where one of these, by its name, is neither True nor False: "no" would count as yes."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it needs to be True or False")


def is_number(value: object) -> bool:
    """Whether it is an integer or a float, finite or not, and not a truth value."""
    return is_integer(value) or isinstance(value, float)
