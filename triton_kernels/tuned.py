"""Launch configurations measured by `ras-fast bench --tune`, one file for all kernels and architectures: configs.json.

Each kernel has a rule that gives a configuration for any device and shape. Where the file holds an entry for a kernel,
architecture and shape class, that entry decides instead. It is read once; nothing is measured while a model runs.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import NamedTuple, TypeVar

FILE = Path(__file__).with_name("configs.json")
# What an entry may set, by kernel. The width of a norm's block follows from d.
FIELDS = {
    "prefill": ("block_m", "block_n", "num_warps", "num_stages"),
    "decode": ("block_n", "num_warps", "num_stages"),
    "mass": ("block_n", "num_warps", "num_stages"),
    "keys": ("block_m", "block_n", "num_warps", "num_stages"),
    "norm": ("num_warps", "maxnreg"),
}
# What an entry tells of how it was made.
FACTS = ("us", "default_us", "shape", "device", "torch", "triton")
Config = TypeVar("Config", bound=NamedTuple)


class ShapeClass(NamedTuple):
    """What a configuration depends on.

    kernel: one of `FIELDS`. arch: 90 for sm_90. itemsize: bytes of an element. size: head dimension or width, rounded up to a
    power of two. variant: "plain", or "every" where a call may use options (masks, softcap, bias, sinks; of a norm always), or
    "rows" where each row has bounds of its own.
    """

    kernel: str
    arch: int
    itemsize: int
    size: int
    variant: str


def choose(wanted: ShapeClass, default: Config) -> Config:
    """The configuration of a shape class: its entry's fields over those of `default`, the kernel's rule."""
    return default._replace(**table().get(wanted, {}))


@functools.cache
def table() -> dict[ShapeClass, dict[str, int]]:
    """What configs.json sets, {field of `FIELDS`: value} by shape class; empty where it is broken, as the rules do without it.
    Read once; the tuner writes its trials into it."""
    return {shape_class(entry): entry["config"] for entry in read_usable(FILE)}


def shape_class(entry: dict) -> ShapeClass:
    return ShapeClass(*(entry[field] for field in ShapeClass._fields))


def read(path: Path) -> list[dict]:
    """The entries of a file: the fields of `ShapeClass` and of `FACTS`, and config {field: int}.

    Raises:
        ValueError: the file is missing or broken; says where, and what it needs.
    """
    try:
        entries = json.loads(path.read_text())["entries"]
        seen: set[ShapeClass] = set()
        for number, entry in enumerate(entries, 1):
            _validate(entry, f"entry {number}", seen)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {what}; make it anew with `ras-fast bench --tune`") from error
    return entries


def read_usable(path: Path) -> list[dict]:
    """`read`; of a file that is missing or broken nothing, and a warning that says what `read` would."""
    try:
        return read(path)
    except ValueError as error:
        warnings.warn(f"a file of tuned configurations is left aside: {error}", stacklevel=2)
        return []


def _validate(entry: dict, where: str, seen: set[ShapeClass]) -> None:
    for field in (*ShapeClass._fields, "config", *FACTS):
        if field not in entry:
            raise ValueError(f"{where} lacks {field!r}")
    wanted, config = shape_class(entry), entry["config"]
    if wanted.kernel not in FIELDS:
        raise ValueError(f"{where} is of kernel {wanted.kernel!r}, not of {', '.join(FIELDS)}")
    if set(config) != set(FIELDS[wanted.kernel]):
        raise ValueError(f"{where} sets {sorted(config)}; {wanted.kernel} needs {sorted(FIELDS[wanted.kernel])}")
    if not all(type(value) is int and value > 0 for value in config.values()):
        raise ValueError(f"{where} has {config}; every value needs to be a positive integer")
    if wanted in seen:
        raise ValueError(f"{where} repeats {tuple(wanted)}")
    seen.add(wanted)
