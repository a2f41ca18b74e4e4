"""Region maps: construction, validation, boxes and heat maps."""

import re

import pytest
import torch
from families import COUSINS

import ras_fast
from ras_fast.regions import RegionMap, _overlaps, boxes_to_patches, image_regions, join_regions, square_grid


def bits(text):
    return torch.tensor([[c == "I" for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("visual", "lengths", "expected"),
    [
        ("..II.I ......", None, [[-1, -1, 0, 0, -1, 1], [-1] * 6]),
        ("IIII IIII", [2, 2, 2, 2], [[0, 0, 1, 1], [0, 0, 1, 1]]),
        ("IIII IIII", [4, 4], [[0] * 4, [0] * 4]),
        ("IIII ..II", [1, 3, 2], [[0, 1, 1, 1], [-1, -1, 0, 0]]),
        ("II.I IIII", [3, 4], [[0, 0, -1, 0], [0, 0, 0, 0]]),  # one image in two pieces
        ("IIII ..II", [2, 2], [[0] * 4, [-1, -1, 0, 0]]),  # lengths that do not add up: runs
        ("IIII", [], [[0, 0, 0, 0]]),
        ("....", [], [[-1] * 4]),
    ],
)
def test_image_regions(visual, lengths, expected):
    got = image_regions(bits(visual), lengths)
    assert got.dtype == torch.int32
    assert got.tolist() == expected


def test_join_regions():
    """An image, a video in two pieces, an image."""
    images = torch.tensor([[0, 0, -1, -1, -1, 1], [-1] * 6], dtype=torch.int32)
    videos = torch.tensor([[-1, -1, 0, -1, 0, -1], [-1, 0, 0, -1, -1, -1]], dtype=torch.int32)
    joined = join_regions([images, videos])
    assert joined.dtype == torch.int32
    assert joined.tolist() == [[0, 0, 1, -1, 1, 2], [-1, 0, 0, -1, -1, -1]]
    assert join_regions([images]) is images
    assert join_regions([images[:, :0]] * 2).shape == (2, 0)


def test_image_regions_of_nothing():
    assert image_regions(torch.zeros(0, 5, dtype=torch.bool)).shape == (0, 5)
    assert image_regions(torch.zeros(2, 0, dtype=torch.bool), [0]).shape == (2, 0)
    with pytest.raises(ValueError, match="visual"):
        image_regions(torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("ids", "regions", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), 1, r"\[B, L\]"),
        (torch.zeros(1, 3), 1, "int32"),
        (torch.zeros(1, 3, dtype=torch.int64), 1, "int32"),
        (torch.full((1, 3), 2, dtype=torch.int32), 2, r"-1\.\.1"),
        (torch.full((1, 3), -2, dtype=torch.int32), 2, r"-1\.\.1"),
        (torch.zeros(1, 3, dtype=torch.int32), 0, r"-1\.\.-1"),
        (torch.zeros(1, 3, dtype=torch.int32), -1, "num_regions is -1"),
        (torch.zeros(1, 3, dtype=torch.int32), 1.5, "num_regions is 1.5"),
        ([[0]], 1, "tensor"),
    ],
)
def test_validation(ids, regions, message):
    with pytest.raises(ValueError, match=message):
        RegionMap(ids, regions)


def test_grids_must_fit():
    with pytest.raises(ValueError, match="grids"):
        RegionMap(torch.zeros(2, 3, dtype=torch.int32), 1, [[(1, 3)]])
    with pytest.raises(ValueError, match=r"grids\[1\] is of 1 images; it must be of the row's 2"):
        RegionMap(torch.tensor([[0, -1, 1], [0, -1, 1]], dtype=torch.int32), 2, [[(1, 1), None], [(1, 1)]])
    for grid in ("ab", (1,), (0, 3), (1.0, 3.0)):
        with pytest.raises(ValueError, match=rf"grids\[0\]\[1\] is {re.escape(repr(grid))}; it must be \(h, w\)"):
            RegionMap(torch.tensor([[0, -1, 1]], dtype=torch.int32), 2, [[None, grid]])


def test_the_last_positions():
    regions = RegionMap(torch.tensor([[0, -1, 1]], dtype=torch.int32), 2)
    assert [regions.last(length).ids.tolist() for length in (0, 2, 5)] == [[[]], [[-1, 1]], [[0, -1, 1]]]


def test_keys_past_the_map_are_in_no_region():
    regions = RegionMap(torch.tensor([[0, 0, -1, 1]], dtype=torch.int32), 2)
    assert regions.keys(6).tolist() == [[0, 0, -1, 1, -1, -1]]
    assert regions.keys(7).data_ptr() == regions.keys(6).data_ptr()
    assert regions.keys(3, total=5).tolist() == [[-1, 1, -1]]
    assert regions.keys(1000).shape == (1, 1000)
    assert regions.keys(2).tolist() == [[0, 0]]


def test_extend_counts_on():
    first = RegionMap(torch.tensor([[0, 1], [-1, -1]], dtype=torch.int32), 2, [[(1, 1), None], []])
    joined = first.extend(torch.tensor([[0], [0]], dtype=torch.int32), [[(1, 1)], [None]], 3)
    assert joined.ids.tolist() == [[0, 1, -1, 2], [-1, -1, -1, 0]]
    assert joined.num_regions == 3
    assert joined.grids == [[(1, 1), None, (1, 1)], [None]]


def test_an_image_that_comes_in_pieces_is_one_region():
    first = RegionMap(torch.tensor([[-1, 0, 0], [0, 0, 0], [0, -1, -1]], dtype=torch.int32), 1, [[None]] * 3)
    second = torch.tensor([[0, 0, -1, 1], [-1, 0, 0, 0], [0, -1, -1, -1]], dtype=torch.int32)
    joined = first.extend(second, [[None, (1, 1)], [None], [(1, 1)]], 3, pieces=True)
    assert joined.ids.tolist() == [[-1, 0, 0, 0, 0, -1, 1], [0, 0, 0, -1, 1, 1, 1], [0, -1, -1, 1, -1, -1, -1]]
    assert joined.grids == [[(2, 2), (1, 1)], [None, None], [None, (1, 1)]]
    assert joined.num_regions == 2


def test_rows():
    regions = RegionMap(torch.tensor([[0], [-1]], dtype=torch.int32), 1, [[(1, 1)], []])
    assert regions.select(torch.tensor([1, 0, 0])).ids.flatten().tolist() == [-1, 0, 0]
    assert regions.select(torch.tensor([1, 0])).grids == [[], [(1, 1)]]
    assert regions.repeat_interleave(2).ids.flatten().tolist() == [0, 0, -1, -1]


def test_heat_maps():
    ids = torch.tensor([[-1, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    regions = RegionMap(ids, 2, [[(2, 2), None]])
    scores = torch.arange(8.0).expand(1, 3, 8)
    first, second = regions.heat_maps(scores)[0]
    assert first[0].tolist() == [[1, 2], [3, 4]]  # the fifth token lies outside the grid
    assert second[2].tolist() == [[6, 7]]
    with pytest.raises(ValueError, match="scores"):
        regions.heat_maps(scores.expand(2, 3, 8))


def test_boxes_to_patches():
    got = boxes_to_patches([[0, 0, 10, 10], [9.5, 0, 10.5, 20], [19, 19, 20, 20]], (20, 20), (2, 2))
    assert got.tolist() == [[[True, False], [False, False]], [[True, True], [True, True]], [[False, False], [False, True]]]
    assert boxes_to_patches([[0, 0, 30, 7]], (21, 30), (3, 5)).sum() == 5
    assert boxes_to_patches([], (20, 20), (2, 3)).shape == (0, 2, 3)
    low, high = torch.zeros(2, 3, device="meta")  # as boxes on a GPU
    assert _overlaps(low, high, 20, 2).device == low.device


BAD_BOXES = [
    [0, 0, 0, 5], [0, 3, 5, 3], [-1, 0, 5, 5], [0, -1, 5, 5], [0, 0, 21, 5], [0, 0, 5, 21], [0, float("nan"), 5, 5],
]  # fmt: skip


@pytest.mark.parametrize("box", BAD_BOXES)
def test_bad_boxes(box):
    with pytest.raises(ValueError, match="boxes"):
        boxes_to_patches([box], (20, 20), (2, 2))


@pytest.mark.parametrize("boxes", [[0, 0, 5, 5], [[0, 0, 5]], [[[0, 0, 5, 5]]]], ids=str)
def test_boxes_of_another_shape(boxes):
    with pytest.raises(ValueError, match=r"it must be \[N, 4\]"):
        boxes_to_patches(boxes, (20, 20), (2, 2))


@pytest.mark.parametrize(("size", "grid"), [((0, 20), (2, 2)), ((20, 0), (2, 2)), ((20, 20), (0, 2)), ((20, 20), (2, -1))])
def test_sizes_that_are_not_positive(size, grid):
    with pytest.raises(ValueError, match="both must be positive"):
        boxes_to_patches([[0, 0, 5, 5]], size, grid)
    assert boxes_to_patches([[0, 0, 1, 1]], (1, 1), (1, 1)).tolist() == [[[True]]]


def test_square_grid():
    assert [square_grid(n) for n in (0, 1, 16, 17, 576)] == [None, (1, 1), (4, 4), None, (24, 24)]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("qianfan_ocr", ["ttIttItt", "tItt"]),
        ("got_ocr2", ["ttIttItt", "tItt"]),
        ("granite4_vision", ["tIIt", "ttIt"]),
        ("phi4_multimodal", ["ttIttItt", "tItt"]),
    ],
)
def test_images_of_a_model(name, rows):
    """Whatever they are cut into, and wherever the model keeps their features and their token's id."""
    model = COUSINS[name].model(name)
    batch = COUSINS[name].inputs(model, rows)
    regions = batch.pop("regions")
    with torch.no_grad(), ras_fast.patch(model) as patched, patched.collect() as statistics:
        model(**batch)
        assert torch.equal(patched.region_map.ids, regions)
    assert {mass.shape[-1] for mass in statistics.mass.values()} == {2}
