"""Pictures: sizes, modes, values; charts hold the numbers that they were given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ras_fast import viz
from ras_fast.evaluation import charts
from ras_fast.evaluation.metrics import Estimate


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_overlay_is_rgb_and_as_large_as_the_picture(picture, mode):
    out = viz.heat_map(picture.convert(mode), torch.rand(4, 6))
    assert (out.mode, out.size) == ("RGB", picture.size)


def test_zero_scores_leave_the_picture_alone(picture):
    assert np.array_equal(viz.heat_map(picture, torch.zeros(4, 6)), picture)


def test_pixels_outside_the_box_stay(picture):
    out = np.array(viz.heat_map(picture, torch.ones(2, 2), box=(10, 0, 50, 40)))
    assert np.array_equal(out[:, :10], np.array(picture)[:, :10])
    assert np.array_equal(out[:, 50:], np.array(picture)[:, 50:])
    assert (out[:, 10:50] != np.array(picture)[:, 10:50]).any()


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        (torch.rand(5), {}, "scores is of shape"),
        (torch.rand(0, 3), {}, "scores is of shape"),
        (torch.tensor([[0.1, float("nan")]]), {}, "finite"),
        (torch.tensor([[0.1, -0.1]]), {}, "at least 0"),
        (torch.rand(2, 2), {"box": (0, 0, 61, 40)}, "box"),
    ],
)
def test_heat_map_says_what_is_wrong(picture, scores, options, words):
    with pytest.raises(ValueError, match=words):
        viz.heat_map(picture, scores, **options)


def test_saved_heat_map_is_a_readable_png(picture, tmp_path):
    viz.save_heat_map(tmp_path / "heat.png", picture, torch.rand(4, 6), title="where it looks")
    with Image.open(tmp_path / "heat.png") as saved:
        saved.load()
        assert saved.format == "PNG"
        assert min(saved.size) > 300
        assert len(np.unique(np.asarray(saved.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_risk_histogram_counts_every_finite_risk_and_names_the_rest():
    one = {"good": ([0.0, 0.1, 0.1], [False, False, True]), "bad": ([1.0, float("nan")], [True, False])}
    other = {"good": ([0.5], [False]), "bad": ([0.5] * 4, [True] * 4)}
    figure = charts.risk_histogram({"one": one, "other": other})
    heights = [[sum(bar.get_height() for bar in part) for part in axes.containers] for axes in figure.axes]
    assert heights == [[2, 1], [1, 0], [0, 1], [0, 4]]  # harmless and harmful
    assert [axes.get_title() for axes in figure.axes] == ["one", "other", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["good", "", "bad", ""]
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["1 NaN"]


@pytest.mark.parametrize("names", [("all", "some"), ("some", "all")])
def test_risk_histogram_has_a_row_for_a_kind_that_one_defence_lacks(names):
    groups = {"all": {"good": ([0.0], [False]), "bad": ([1.0], [True])}, "some": {"bad": ([0.9], [True])}}
    figure = charts.risk_histogram({name: groups[name] for name in names})
    heights = {
        (kind.get_ylabel(), name): sum(bar.get_height() for part in axes.containers for bar in part)
        for kind, row in zip(figure.axes[::2], (figure.axes[:2], figure.axes[2:]), strict=True)
        for name, axes in zip(names, row, strict=True)
    }
    assert heights == {("good", "all"): 1, ("good", "some"): 0, ("bad", "all"): 1, ("bad", "some"): 1}


def test_a_kind_is_plain_text(tmp_path):
    charts.risk_histogram({"one": {r"$\bad$": ([0.5], [True])}}).savefig(tmp_path / "risk.png")
    assert (tmp_path / "risk.png").stat().st_size > 0


def test_roc_chart_names_the_area():
    (legend,) = charts.roc_chart({"S": ([0.1, 0.2, 0.8, 0.9], [False, False, True, True])}).legends
    assert legend.get_texts()[0].get_text() == "S: 1.000"


def test_trade_off_puts_each_defence_at_its_rates():
    here = (Estimate(0.1, 0.05, 0.2, 50), Estimate(0.9, 0.8, 1.0, 50))
    beside, elsewhere = (replace(here[0], value=0.12), here[1]), (replace(here[0], value=0.5, high=0.6), here[1])
    axes = charts.trade_off_chart({"a": here, "b": beside, "c": elsewhere}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a, b", "c"]
    point, _, (across, up) = axes.containers[0]
    assert point.get_xydata().tolist() == [[0.1, 0.9]]
    assert across.get_segments()[0].tolist() == [pytest.approx([0.05, 0.9]), pytest.approx([0.2, 0.9])]
    assert up.get_segments()[0].tolist() == [pytest.approx([0.1, 0.8]), pytest.approx([0.1, 1.0])]


def test_a_histogram_needs_risks():
    with pytest.raises(ValueError, match="risks is empty"):
        charts.risk_histogram({})


def test_safety_awareness_chart_marks_the_chosen_layer():
    figure = viz.safety_awareness_chart({8: 0.4, 0: 0.0, 4: -0.1}, chosen=4)
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.0, -0.1, 0.4]
    assert [bar.get_facecolor() == bars[1].get_facecolor() for bar in bars] == [False, True, False]
    with pytest.raises(ValueError, match="chosen = 3"):
        viz.safety_awareness_chart({0: 0.1}, chosen=3)
    with pytest.raises(ValueError, match="at least one"):
        viz.safety_awareness_chart({})


def test_a_title_is_plain_text(tmp_path):
    viz.save_heat_map(tmp_path / "heat.png", Image.new("RGB", (8, 8)), torch.rand(2, 2), title="costs $a_$ or $5? \\frac")
    assert (tmp_path / "heat.png").stat().st_size > 0
