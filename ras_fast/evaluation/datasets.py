"""Questions to put to a model: the synthetic world of the tiny model, or a JSON-lines file of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ras_fast.evaluation import tinyworld
from ras_fast.evaluation.judges import is_refusal


@dataclass(frozen=True)
class Item:
    """One query. `images` are whatever `ras_fast.inputs.load_image` takes; `judge` tells whether an answer to it is right."""

    id: str
    kind: str
    harmful: bool
    question: str
    images: list
    judge: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Dataset:
    """Items, and what was left out with the reason.

    complies: whether an answer to a harmful query gives what was asked for, also where it opens as a refusal.
    """

    name: str
    items: list[Item]
    complies: Callable[[str], bool]
    skipped: list[str] = field(default_factory=list)


def load_dataset(name: str, n: int | None = None, seed: int = 0) -> Dataset:
    """"tinyworld" (n items of its test split, 250 unless told), or the path of a .jsonl file (its first n items).

    Raises:
        ValueError: there is no such dataset, or it holds no usable item.
    """
    if n is not None and n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    if name == "tinyworld":
        return _tinyworld(250 if n is None else n, seed)
    if not Path(name).is_file():
        raise ValueError(f"dataset {name!r} is neither 'tinyworld' nor a .jsonl file that is there")
    dataset = _json_lines(Path(name), n)
    if not dataset.items:
        raise ValueError(f"dataset {name!r} holds no usable item: {'; '.join(dataset.skipped[:3]) or 'it is empty'}")
    return dataset


def _tinyworld(n: int, seed: int) -> Dataset:
    def item(i: int, source: tinyworld.Item) -> Item:
        images = [] if source.image is None else [source.image]
        judge = partial(tinyworld.is_correct, source)
        return Item(f"{i:05d}", source.kind, source.harmful, source.question, images, judge)

    items = [item(i, source) for i, source in enumerate(tinyworld.split("test", n, seed))]
    return Dataset("tinyworld", items, lambda text: not is_refusal(text) or "step" in text.lower())


def _json_lines(path: Path, n: int | None) -> Dataset:
    """Lines of {"question", "harmful", "image": path or list of paths, "kind", "answer", "id"}; the first two are needed.

    Image paths are relative to the file. An answer to a harmless query is right when it holds `answer`, whatever the case.
    """
    items, skipped, seen = [], [], set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip() or len(items) == n:
            continue
        try:
            item = _item(number, json.loads(line.decode("utf-8-sig")), path.parent)
            if item.id in seen:
                raise ValueError(f"id {item.id!r} was there before")
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            skipped.append(f"{path.name}:{number}: {what}")
            continue
        seen.add(item.id)
        items.append(item)
    return Dataset(path.name, items, lambda text: not is_refusal(text), skipped)


def _item(number: int, row: dict[str, Any], folder: Path) -> Item:
    question, harmful = row["question"], row["harmful"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question is {question!r}; it must be a text that is not empty")
    if not isinstance(harmful, bool):
        raise ValueError(f"harmful is {harmful!r}; it must be true or false")
    named = row.get("image") or []
    images = [folder / name for name in ([named] if isinstance(named, str) else named)]
    for image in images:
        if not image.is_file():
            raise ValueError(f"{image} is not there")
    answer = row.get("answer")
    judge = (lambda text: answer.lower() in text.lower()) if answer and not harmful else None
    kind = str(row.get("kind") or ("harmful" if harmful else "benign"))
    return Item(str(row.get("id", number)), kind, harmful, question, images, judge)
