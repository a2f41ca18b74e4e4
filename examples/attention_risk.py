"""How well attention to the images tells harmful from harmless queries: alone, beside MoRAS's S, and together with it.

Read from the answers that an evaluation has left, with an interval for what attention adds to S:

    ras-fast eval --model tiny --n 250 --seed 1 --out results
    python examples/attention_risk.py results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ras_fast.evaluation.metrics import auroc

DEFENCES = {"S": "moras", "attention": "attention", "S and attention": "moras+attention"}


def read(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(scores by name [n], whether harmful [n], kind [n]) of the queries that all three defences were asked."""
    answers = folder / "answers.jsonl"
    if not answers.is_file():
        raise SystemExit(f"there is no {answers}; results needs to be the folder of an evaluation")
    records = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    answered = {name: {r["id"]: r for r in records if r["defence"] == name and "error" not in r} for name in DEFENCES.values()}
    ids = sorted(set.intersection(*map(set, answered.values())))
    if not ids:
        raise SystemExit(f"{folder} has no query that {', '.join(DEFENCES.values())} were all asked")
    scores = {
        title: np.array([1.0 if answered[name][i]["score"] is None else answered[name][i]["score"] for i in ids])
        for title, name in DEFENCES.items()
    }
    queries = [answered["moras"][i] for i in ids]
    return scores, np.array([r["harmful"] for r in queries]), np.array([r["kind"] for r in queries])


def gain(scores: dict[str, np.ndarray], harmful: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """(low, high): 95 % interval of AUROC(S and attention) − AUROC(S), by resampling the queries."""
    draws = np.random.default_rng(0).integers(0, len(harmful), (resamples, len(harmful)))
    gains = [
        auroc(scores["S and attention"][d], harmful[d]) - auroc(scores["S"][d], harmful[d])
        for d in draws
        if 0 < harmful[d].sum() < len(d)
    ]
    return np.quantile(gains, (0.025, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the folder of an evaluation")
    scores, harmful, kind = read(parser.parse_args().results)
    groups = {"all": np.ones_like(harmful)}
    groups |= {f"{name} against harmless": (kind == name) | ~harmful for name in dict.fromkeys(kind[harmful])}
    print("| AUROC |" + "".join(f" {title} |" for title in scores) + "\n|---|" + "--:|" * len(scores))
    for name, group in groups.items():
        cells = [auroc(values[group], harmful[group]) for values in scores.values()]
        print(f"| {name} (n = {group.sum()}) |" + "".join(f" {value:.4f} |" for value in cells))
    low, high = gain(scores, harmful)
    print(f"\nAUROC of S and attention less that of S: 95 % bootstrap interval {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    main()
