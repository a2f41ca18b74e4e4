"""Rates with bootstrap intervals, AUROC, ROC curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic of n values and its 95 % interval [low, high]; NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict:
        """JSON-ready: None in place of NaN."""
        return {name: None if v != v else v for name, v in asdict(self).items()}


def rate(outcomes: Sequence[bool], seed: int = 0) -> Estimate:
    """The share of true outcomes, with a percentile-bootstrap interval over the items.

    Outcomes that are all equal leave a bootstrap without width, which would overstate what n items can show: there the open
    side is 3/n away (the rule of three).
    """
    values = np.asarray(outcomes, dtype=bool)
    n, share = values.size, values.mean() if values.size else np.nan
    if n and share in (0, 1):
        width = min(3 / n, 1.0)
        return Estimate(float(share), max(share - width, 0.0), min(share + width, 1.0), n)
    return _bootstrap(values.astype(float), np.mean, seed)


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with a percentile-bootstrap interval."""
    return _bootstrap(np.asarray(values, dtype=float), np.mean)


def median(values: Sequence[float]) -> Estimate:
    """The median, with a percentile-bootstrap interval."""
    return _bootstrap(np.asarray(values, dtype=float), np.median)


def _bootstrap(values: np.ndarray, statistic, seed: int = 0) -> Estimate:
    if not values.size:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    draws = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.quantile(statistic(values[draws], axis=1), (0.025, 0.975))
    return Estimate(float(statistic(values)), float(low), float(high), values.size)


def roc_curve(scores: Sequence[float], positive: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(false-positive rates, true-positive rates) from (0, 0) to (1, 1), one point for each distinct score.

    Raises:
        ValueError: lengths differ, a score is NaN, or only one class is there.
    """
    alarms, hits = _counts(scores, positive)
    return alarms / alarms[-1], hits / hits[-1]


def _counts(scores: Sequence[float], positive: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """`roc_curve` in items: how many negatives and how many positives score at least as high, integers from 0 on."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(f"scores is of shape {scores.shape}, positive of {positive.shape}; both must be [n]")
    if np.isnan(scores).any():
        raise ValueError(f"scores holds {int(np.isnan(scores).sum())} NaN; every score must be a number")
    if positive.all() or not positive.any():
        raise ValueError(f"positive holds one class only ({positive.size} items); a ROC curve needs both")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_ties = np.append(ordered[1:] != ordered[:-1], True)  # no difference, which is NaN between infinite scores
    alarms, hits = (np.append(0, np.cumsum(of_class[order])[last_of_ties]) for of_class in (~positive, positive))
    return alarms, hits


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Area under the ROC curve: the chance that a positive item scores above a negative one, ties counting half.

    Raises ValueError as `roc_curve`.
    """
    alarms, hits = _counts(scores, positive)  # in integers, so that classes that do not overlap give 0 or 1 and nothing near it
    return float(np.sum(np.diff(alarms) * (hits[1:] + hits[:-1])) / (2 * alarms[-1] * hits[-1]))


def auroc_estimate(scores: Sequence[float], positive: Sequence[bool], seed: int = 0) -> Estimate:
    """`auroc` with a percentile-bootstrap interval over the items, drawn within each class, so that both are always there.

    Classes that do not overlap leave a bootstrap without width. There the open side is 3/m away, m the size of the smaller
    class, as in `rate`: were 3/m of that class on the wrong side, m of its items would show none in 1 of 20 cases.

    Raises ValueError as `roc_curve`.
    """
    area, positive = auroc(scores, positive), np.asarray(positive, dtype=bool)
    if area in (0, 1):
        width = min(3 / min(positive.sum(), (~positive).sum()), 1.0)
        return Estimate(area, max(area - width, 0.0), min(area + width, 1.0), positive.size)
    level = np.unique(np.asarray(scores, dtype=float), return_inverse=True)[1]
    rng = np.random.default_rng(seed)

    def resampled(of_class: np.ndarray) -> np.ndarray:
        """How many items of each level [RESAMPLES, levels] a resample holds: their order is nothing to the area."""
        counts = np.bincount(of_class, minlength=level.max() + 1)
        return rng.multinomial(of_class.size, counts / of_class.size, size=RESAMPLES)

    hits, alarms = resampled(level[positive]), resampled(level[~positive])
    # The negatives below each level, and half of those at it.
    areas = np.sum(hits * (np.cumsum(alarms, axis=1) - alarms / 2), axis=1)
    low, high = np.quantile(areas, (0.025, 0.975)) / (positive.sum() * (~positive).sum())
    return Estimate(area, float(low), float(high), positive.size)
