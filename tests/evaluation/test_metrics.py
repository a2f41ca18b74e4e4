"""Metrics against their definitions."""

import numpy as np
import pytest

from ras_fast.evaluation import metrics


def test_rate_interval_covers_the_true_rate_about_95_times_in_100():
    rng = np.random.default_rng(3)
    estimates = [metrics.rate(rng.random(80) < 0.3, seed=i) for i in range(200)]
    covered = np.mean([e.low <= 0.3 <= e.high for e in estimates])
    assert 0.89 <= covered <= 0.99


@pytest.mark.parametrize("outcome", [False, True])
def test_equal_outcomes_still_have_a_width(outcome):
    estimate = metrics.rate([outcome] * 60)
    assert (estimate.value, estimate.n) == (outcome, 60)
    assert estimate.high - estimate.low == pytest.approx(3 / 60)


def test_nothing_measured_is_nan_and_none_in_json():
    assert metrics.rate([]).as_dict() == {"value": None, "low": None, "high": None, "n": 0}


def test_median_of_known_values():
    estimate = metrics.median([5.0, 1.0, 3.0])
    assert estimate.value == 3
    assert 1 <= estimate.low <= 3 <= estimate.high <= 5


def test_auroc_is_the_chance_that_a_positive_scores_higher():
    rng = np.random.default_rng(0)
    positive = rng.random(150) < 0.4
    scores = rng.integers(0, 12, 150) + 3 * positive  # integers: many ties
    above, below = scores[positive][:, None], scores[~positive][None]
    assert metrics.auroc(scores, positive) == pytest.approx(np.mean((above > below) + 0.5 * (above == below)))


def test_roc_of_a_perfect_and_of_a_constant_score():
    assert metrics.auroc([0.1, 0.2, 0.8, 0.9], [False, False, True, True]) == 1
    x, y = metrics.roc_curve([0.5] * 4, [False, True, False, True])
    assert (x.tolist(), y.tolist()) == ([0, 1], [0, 1])


@pytest.mark.parametrize("score", [np.inf, -np.inf])
def test_infinite_scores_tie_as_others_do(score):
    assert metrics.auroc([score, score], [True, False]) == metrics.auroc([score, score], [False, True]) == 0.5
    assert metrics.auroc([np.inf, -np.inf], [True, False]) == 1


def test_auroc_interval_covers_the_true_area_about_95_times_in_100():
    rng = np.random.default_rng(1)
    positive = np.arange(90) < 40
    true = 0.7602  # the chance that a normal variable exceeds another one by whose mean it is 1 above, Phi(1 / sqrt 2)
    estimates = [metrics.auroc_estimate(rng.normal(size=90) + positive, positive, seed=i) for i in range(200)]
    assert 0.89 <= np.mean([e.low <= true <= e.high for e in estimates]) <= 0.99
    assert all(e.low < e.value < e.high and e.n == 90 for e in estimates)


def test_auroc_interval_of_ties_is_that_of_resampled_classes():
    rng = np.random.default_rng(2)
    positive = np.arange(60) < 25
    scores = rng.integers(0, 5, 60) + positive
    areas = []
    for _ in range(3000):
        draws = np.concatenate([rng.choice(np.flatnonzero(which), which.sum()) for which in (positive, ~positive)])
        areas.append(metrics.auroc(scores[draws], positive[draws]))
    estimate = metrics.auroc_estimate(scores, positive)
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(areas, (0.025, 0.975)), abs=0.015)


def test_auroc_of_classes_apart_still_has_a_width():
    positive = np.arange(100) < 30
    for sign, expected in ((1, (1, 0.9, 1)), (-1, (0, 0, 0.1))):
        estimate = metrics.auroc_estimate(sign * (positive + np.linspace(0, 0.5, 100)), positive)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected)
    assert metrics.auroc_estimate([0.0, 1.0], [False, True]) == metrics.Estimate(1.0, 0.0, 1.0, 2)


def test_auroc_of_classes_apart_is_exact_whatever_their_sizes():
    for positives in range(1, 60):
        for negatives in range(1, 60):
            positive = np.arange(positives + negatives) < positives
            scores = positive + np.linspace(0, 0.5, positive.size)
            assert metrics.auroc(scores, positive) == 1
            assert metrics.auroc(-scores, positive) == 0


@pytest.mark.parametrize(
    ("scores", "positive", "words"),
    [([0.1, np.nan], [True, False], "NaN"), ([0.1, 0.2], [True, True], "one class"), ([0.1], [True, False], "shape")],
)
def test_roc_says_what_is_wrong(scores, positive, words):
    with pytest.raises(ValueError, match=words):
        metrics.roc_curve(scores, positive)
