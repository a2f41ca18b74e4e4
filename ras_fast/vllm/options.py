"""What a user hands to vLLM: the engine's arguments, and what one request carries in `SamplingParams.extra_args`."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from pathlib import Path

from ras_fast.checks import check_counts, is_integer, is_number

PROCESSOR = "ras_fast.vllm.processor:RasLogitsProcessor"
RISK = "ras_risk"
RECORD = "ras_record"
NOISE = "ras_noise"
QUERIES = 32  # in flight at a time


def engine_args(profile, *, queries: int = QUERIES) -> dict:
    """Keyword arguments for ``vllm.LLM`` (or ``EngineArgs``) that put a MoRAS or AutoSteer profile into the engine.

    profile: folder or hub id of a `ras_fast.RasProfile` calibrated on the model that the engine loads.
    queries: how many queries `SafeLLM` keeps in flight. Each holds 2 N V fp32 logits on the device (LLaVA: 0.8 MB).

    Raises ValueError when ``queries`` is not an integer of at least 1.
    """
    settings = {"profile": str(Path(profile).resolve()) if Path(profile).is_dir() else str(profile), "queries": queries}
    read_settings({"ras_fast": settings})
    return {
        "logits_processors": [PROCESSOR],
        "worker_cls": "ras_fast.vllm.worker.RasWorker",
        "additional_config": {"ras_fast": settings},
    }


def read_settings(additional_config) -> tuple[str, int]:
    """(profile, queries) of an engine's ``additional_config``. Raises ValueError when they are not there or not usable."""
    settings = additional_config.get("ras_fast") if isinstance(additional_config, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("profile"), str):
        raise ValueError(
            f"additional_config is {additional_config!r}; it needs {{'ras_fast': {{'profile': FOLDER}}}}: "
            "make the engine with LLM(model, **ras_fast.vllm.engine_args(FOLDER))"
        )
    queries = settings.get("queries", QUERIES)
    check_counts(queries=queries)
    return settings["profile"], queries


@dataclass(frozen=True)
class Draw:
    """How a sampled answer's first N tokens are drawn: as vLLM would, but by noise that two requests can share.

    noise: the number that the noise is made of.
    temperature, top_k, top_p, min_p: those of vLLM's SamplingParams.
    """

    noise: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class Marks:
    """What a request asks for in its first N steps.

    risk: the risk in [0, 1] that they are steered by; None: they are not steered.
    record: the number that their raw logits are kept under; None: they are not kept.
    draw: how their tokens are drawn; None: vLLM's to choose.
    """

    risk: float | None = None
    record: int | None = None
    draw: Draw | None = None


def new_number() -> int:
    """One that no other request has, of any client: what was kept for one is never read for another."""
    return secrets.randbits(53)  # exact in JSON


def check_marks(extra_args: dict | None, n: int) -> None:
    """Raises ValueError for invalid marks of a request with ``n`` answers. A risk that is not finite is valid: it means 1."""
    marks = {name: value for name, value in (extra_args or {}).items() if name.startswith("ras_")}
    unknown = set(marks) - {RISK, RECORD, NOISE}
    if unknown:
        raise ValueError(f"extra_args has {sorted(unknown)}; this engine knows {RISK!r}, {RECORD!r} and {NOISE!r}")
    risk = marks.get(RISK, 0.0)
    if not is_number(risk) or (math.isfinite(risk) and not 0 <= risk <= 1):
        raise ValueError(f"extra_args[{RISK!r}] is {risk!r}; it needs to be a number in [0, 1]")
    for name in (RECORD, NOISE):
        if not is_integer(marks.get(name, 0)) or marks.get(name, 0) < 0:
            raise ValueError(f"extra_args[{name!r}] is {marks[name]!r}; it needs to be a non-negative integer")
        if name in marks and n != 1:
            raise ValueError(f"n is {n}; a request with {name!r} needs n = 1: its answers would share it")


def read_marks(params) -> Marks | None:
    """A request's marks, by its vLLM SamplingParams; None for one without any. What `check_marks` would refuse has risk 1."""
    extra = params.extra_args or {}
    if not {RISK, RECORD, NOISE} & set(extra):
        return None
    draw = None
    if NOISE in extra and params.temperature > 0:
        draw = Draw(extra[NOISE], params.temperature, params.top_k, params.top_p, params.min_p)
    return Marks(risk_of(extra[RISK]) if RISK in extra else None, extra.get(RECORD), draw)


def risk_of(value) -> float:
    """The risk that a request carries; 1 for anything but a number in [0, 1]."""
    return float(value) if is_number(value) and 0 <= value <= 1 else 1.0
