"""Every defence answers every query, with times, into a file that survives Ctrl-C. What comes of it is report.py's to tell."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from ras_fast import parallel
from ras_fast.evaluation.datasets import Dataset, Item
from ras_fast.evaluation.defences import Defence
from ras_fast.evaluation.judges import Judge
from ras_fast.fingerprint import fingerprint
from ras_fast.images import UNREADABLE, load_image
from ras_fast.profile import RasProfile
from ras_fast.refusals import is_refusal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ANSWERS, SETTINGS, LOCK, FORMAT = "answers.jsonl", "settings.json", "answers.lock", 4
LABELS = ("kind", "harmful", "text_harm")  # of an item; they may change without its being asked again
VERDICT = {"judge", "judge_digest", "complied"}


def settings_of(model, processor, dataset: Dataset, seed: int, max_new_tokens: int, profiles: dict[str, RasProfile]) -> dict:
    """What must be the same for two runs to share one file of answers."""
    return {
        "format": FORMAT,
        "model": fingerprint(model, processor),
        "dataset": dataset.name,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "profiles": {name: profile.digest() for name, profile in profiles.items()},
    }


class AnswerFile:
    """answers.jsonl of a folder, which it occupies: one line per (defence, item), on disk before the next query starts.

    Raises:
        ValueError: the folder holds the answers of a run with other settings or unknown ones, or a line that is no answer, or
            is occupied.
    """

    def __init__(self, folder: Path, settings: dict):
        occupy(folder)
        self.path = folder / ANSWERS
        self.records = self._resume(folder / SETTINGS, settings)

    def _resume(self, settings_path: Path, settings: dict) -> dict[tuple[str, str], dict]:
        if self.path.is_file():
            before = _read_settings(settings_path)
            # A profile that one of the runs did without is no difference.
            settings = settings | {"profiles": before.get("profiles", {}) | settings["profiles"]}
            before["profiles"] = settings["profiles"] | before.get("profiles", {})
            differing = [name for name in settings if settings[name] != before.get(name)]
            if differing:
                raise ValueError(
                    f"{self.path.parent} holds a run that differs in {', '.join(differing)}; give another output folder"
                )
        replace_file(settings_path, json.dumps(settings, indent=2).encode() + b"\n")
        if not self.path.is_file():
            return {}
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]  # a crash may have cut the last line
        if len(complete) < len(content):
            replace_file(self.path, complete)
        records = [self._record(number, line) for number, line in enumerate(complete.splitlines(), 1)]
        return {(record["defence"], record["id"]): record for record in records}

    def _record(self, number: int, line: bytes) -> dict:
        needed = {"defence", "id", "question", "images", *LABELS}
        try:
            record = json.loads(line)
            if not needed <= set(record) or not isinstance(record["defence"], str) or not isinstance(record["id"], str):
                raise ValueError(f"it needs {sorted(needed)}, of which defence and id are strings")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}:{number} is not an answer: {error}") from error
        return record

    def append(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.records[record["defence"], record["id"]] = record


def occupy(folder: Path) -> None:
    """Makes a folder and keeps the runs of other processes out of it until this one ends; data-parallel ones are one run.

    Raises ValueError when another run is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is not None and parallel.rank() == 0:
        _lock(folder.resolve() / LOCK)


@cache
def _lock(path: Path) -> IO:
    """An open file with a lock that no other process gets; both are kept as long as this process lives."""
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"another run writes its answers into {path.parent}; give another output folder") from error
    except OSError:
        pass  # a file system without locks
    return file


def _read_settings(path: Path) -> dict:
    """Of the run whose answers lie beside them."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} does not say which run the answers beside it are of: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in ("profiles", "model")):
        raise ValueError(f"{path} does not say which run the answers beside it are of: it holds {settings!r}")
    return settings


def replace_file(path: Path, content: bytes) -> None:
    """The first process writes; others that read meanwhile find the old content or the new one."""
    if parallel.rank() == 0:
        Path(f"{path}.new").write_bytes(content)
        os.replace(f"{path}.new", path)


def run(
    dataset: Dataset,
    defences: dict[str, Defence],
    answers: AnswerFile,
    judge: Judge | None = None,
    progress: bool = True,
    borrowed: dict[str, RasProfile] | None = None,
) -> list[dict]:
    """Has every defence answer every item, except where `answers` holds a valid answer from an earlier run.

    Each item is asked of all defences in turn, so that a machine that slows down slows all of them. An answer that is kept is
    judged again, without being asked again, where the judge, the labels or the right answer have changed. Data-parallel
    processes share the items.

    judge: of answers to harmful queries; None: the data set's.
    borrowed: the profiles of defences whose names do not say which it is. These are asked again when it is another one.

    Returns the records of these defences and items. A query that cannot be asked becomes a record with "error", an answer
    that cannot be judged one with "judge_error"; the next run tries again. Only Ctrl-C and a process that is out of memory
    end the run; a device that is out of memory has no room for this query, and may have it for the next.
    """
    judge = judge or dataset.judge
    parallel.wait()  # until every process has read the file
    known = dict(answers.records)
    query = cache(lambda number: _query(dataset.items[number]))
    behind = {name: {"profile": profile.digest()} for name, profile in (borrowed or {}).items()}

    def asks(name: str, number: int) -> dict:
        return query(number) | behind.get(name, {})

    def is_answered(name: str, number: int) -> bool:
        record = known.get((name, dataset.items[number].id))
        return record is not None and "error" not in record and record.items() >= asks(name, number).items()

    for name in defences:
        if not all(is_answered(name, number) for number in range(len(dataset.items))):
            _ask(name, defences[name], dataset.items[0], {})  # warm-up, so that allocations stay out of the times

    def ask_all(number: int) -> list[dict]:
        records, item = [], dataset.items[number]
        for name in defences:
            before = known.get((name, item.id))
            record = before if is_answered(name, number) else _ask(name, defences[name], item, asks(name, number))
            record = _labelled(record, item)
            try:
                record = _judged(record, judge)
            finally:  # an answer is kept whatever becomes of its verdict
                if record != before:
                    answers.append(record)
            records.append(record)
        return records

    numbers = range(len(dataset.items))
    return [record for records in parallel.each(ask_all, numbers, "items", progress) for record in records]


def _query(item: Item) -> dict:
    """What is asked, as a record holds it: a file of questions, or its images, may have been edited since."""
    digest = hashlib.sha256()
    for image in item.images:
        size, content = _seen(image)
        digest.update(f"{len(content)} {size} ".encode() + content)
    return {"question": item.question, "images": digest.hexdigest()[:16]}


def _seen(image) -> tuple[tuple[int, int] | None, bytes]:
    """(size, bytes) that tell an image from others: of a file what it holds, else the pixels that the model is shown."""
    try:
        if isinstance(image, (str, Path)):
            return None, Path(image).read_bytes()
        shown = load_image(image)
    except UNREADABLE:
        return None, b"unreadable"  # the defence will say so
    return (None, b"not finite") if shown is None else (shown.size, shown.tobytes())


def _labelled(record: dict, item: Item) -> dict:
    """The record with the item's labels, and whether its answer is a refusal, and right."""
    verdict = {"correct", "judge_error"} | (set() if item.harmful else VERDICT)
    record = {key: value for key, value in record.items() if key not in verdict}
    record |= {key: getattr(item, key) for key in LABELS}
    if "answer" not in record:
        return record
    record["refused"] = is_refusal(record["answer"])
    if not item.harmful and item.judge is not None:
        record["correct"] = item.judge(record["answer"])
    return record


def _ask(name: str, defence: Defence, item: Item, query: dict) -> dict:
    record = {"defence": name, "id": item.id} | {key: getattr(item, key) for key in LABELS} | query
    start = time.perf_counter()
    try:
        answer = defence(item.question, item.images)
    except MemoryError:
        raise
    except Exception as error:
        return record | {"error": _reason(error)}
    record |= {"ms": 1000 * (time.perf_counter() - start), "answer": answer.text}
    numbers = {"risk": answer.risk, "score": answer.score}
    record |= {key: value if value is not None and math.isfinite(value) else None for key, value in numbers.items()}
    return record | {"passes": answer.passes, "tokens": answer.tokens}


def _judged(record: dict, judge: Judge) -> dict:
    """The record with the judge's verdict; unchanged where there is nothing to judge or this judge has judged it already."""
    signature = {"judge": judge.name, "judge_digest": judge.digest}
    if "error" in record or not record["harmful"] or record.items() >= signature.items():
        return record
    record = {key: value for key, value in record.items() if key not in VERDICT}
    try:
        complied = judge.does_harm(record["question"], record["answer"])
        if not isinstance(complied, (bool, np.bool_)):
            raise TypeError(f"it says {complied!r}; a judge says True or False")
    except MemoryError:
        raise
    except Exception as error:
        return record | {"judge_error": _reason(error)}
    return record | signature | {"complied": bool(complied)}


def _reason(error: Exception) -> str:
    """The package's own errors are ValueErrors, whose message is enough."""
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
