from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg3d.report.statistics import statistics, write_statistics_csv, write_statistics_json
from medseg3d.volume import Volume

AFFINE = np.array([[-2.0, 0, 0, 100], [0, -1, 0, 50], [0, 0, 5, -20], [0, 0, 0, 1]])  # LPS, 0.01 ml a voxel
LABELS = {0: "background", 1: "brainstem", 2: "larynx", 5: "thyroid"}


@pytest.fixture
def result():
    organs = np.zeros((10, 12, 8), np.uint8)
    image = np.full(organs.shape, -1000, np.int16)
    organs[2:4, 3:5, 1:2] = 1
    image[2:4, 3:5, 1] = [[10, 20], [30, 60]]
    organs[0, 0, 7] = organs[9, 11, 3] = 2
    return statistics(Volume(organs, AFFINE), Volume(image, AFFINE), LABELS)


def test_hand_worked_figures(result):
    figures = result["labels"]["brainstem"]
    assert (figures["label"], figures["voxels"], figures["volume_ml"]) == (1, 4, pytest.approx(0.04))
    hu = figures["hu"]
    assert (hu["mean"], hu["median"]) == (30, 25)
    assert hu["std"] == pytest.approx(np.sqrt((400 + 100 + 0 + 900) / 4), abs=0.01)
    assert (hu["p5"], hu["p25"], hu["p75"], hu["p95"]) == (11.5, 17.5, 37.5, 55.5)
    assert figures["centroid_ras_mm"] == [100 - 2 * 2.5, 50 - 3.5, -20 + 5 * 1]
    assert figures["bounding_box"] == {"start": [2, 3, 1], "stop": [4, 5, 2], "size_mm": [4, 2, 5]}
    assert figures["touches_border"] == []
    assert (figures["components"], figures["reason"]) == (1, None)


def test_small_structures_and_small_values_are_not_rounded_away():
    """A voxel of 10 micrometres, in an image such as a map of diffusion."""
    organs = np.zeros((3, 3, 3), np.uint8)
    organs[0, 1, 2] = 1
    affine = np.diag([0.01, 0.01, 0.01, 1])
    image = np.full(organs.shape, 0.00123, np.float64)
    found = statistics(Volume(organs, affine), Volume(image, affine), {1: "organ"})
    figures = found["labels"]["organ"]
    assert found["voxel_volume_mm3"] == pytest.approx(1e-6) and figures["volume_ml"] == pytest.approx(1e-9)
    assert figures["hu"]["mean"] == 0.00123 and figures["centroid_ras_mm"] == [0, 0.01, 0.02]
    assert figures["bounding_box"]["size_mm"] == [0.01] * 3


def test_border_faces_have_anatomical_names_and_pieces_are_counted(result):
    """Voxel (0, 0, 7) of an LPS grid is its rightmost, most anterior and most superior one; (9, 11, 3) the opposite."""
    figures = result["labels"]["larynx"]
    assert sorted(figures["touches_border"]) == ["anterior", "left", "posterior", "right", "superior"]
    assert figures["components"] == 2


def test_figures_in_space_do_not_depend_on_the_storage():
    organs = np.zeros((10, 12, 8), np.uint8)
    organs[0:3, 4:6, 2:5] = 1
    image = np.random.default_rng(0).normal(size=organs.shape).astype(np.float32)
    segmentation, image = Volume(organs, AFFINE), Volume(image, AFFINE)
    expected = statistics(segmentation, image, {1: "organ"})["labels"]["organ"]
    for codes in ("RAS", "SPL", "AIR"):
        figures = statistics(segmentation.reoriented(codes), image.reoriented(codes), {1: "organ"})["labels"]["organ"]
        for key in ("voxels", "volume_ml", "hu", "centroid_ras_mm", "components"):
            assert figures[key] == expected[key]
        assert figures["touches_border"] == expected["touches_border"] == ["right"]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([np.int16, np.float32, np.float64, ">i2", np.uint16]),
    orders=st.tuples(st.sampled_from("CF"), st.sampled_from("CF")),
)
def test_every_figure_is_what_numpy_and_scipy_say_of_the_whole_scan(shape, seed, dtype, orders):
    """Of labels of many pieces, whatever the type and the order of memory."""
    rng = np.random.default_rng(seed)
    organs = rng.choice([0, 0, 1, 2, 7], shape).astype(np.uint8, order=orders[0])
    image = (rng.normal(0, 900, shape) + 4000 * rng.integers(0, 7, shape)).clip(0).astype(dtype, order=orders[1])
    found = statistics(Volume(organs, AFFINE), Volume(image, AFFINE), {1: "a", 2: "b", 7: "c"})["labels"]
    for label, name in ((1, "a"), (2, "b"), (7, "c")):
        mask = organs == label
        figures = found[name]
        if not mask.any():
            assert figures["reason"] and figures["voxels"] is None
            continue
        values = image[mask].astype(np.float64)
        expected = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
        expected |= {f"p{p}": np.percentile(values, p) for p in (5, 25, 75, 95)}
        assert figures["hu"] == pytest.approx(expected, rel=5.1e-6)  # six digits
        assert figures["voxels"] == mask.sum()
        assert figures["components"] == ndimage.label(mask, np.ones((3, 3, 3)))[1]
        indices = np.argwhere(mask)
        box = figures["bounding_box"]
        assert (box["start"], box["stop"]) == (indices.min(0).tolist(), (indices.max(0) + 1).tolist())
        centre = AFFINE[:3, :3] @ indices.mean(0) + AFFINE[:3, 3]
        assert figures["centroid_ras_mm"] == pytest.approx(centre.tolist(), abs=0.005001)


def test_absent_label_is_null_with_a_reason(result, tmp_path):
    figures = result["labels"]["thyroid"]
    assert "no voxel" in figures["reason"]
    assert all(figures[key] is None for key in figures if key not in ("label", "reason"))
    path = write_statistics_json(tmp_path / "s.json", result)
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text) == result


def test_background_is_left_out(result):
    assert list(result["labels"]) == ["brainstem", "larynx", "thyroid"]
    assert result["voxel_volume_mm3"] == 10
    assert result["grid"]["orientation"] == "LPS"


def test_voxels_that_are_no_numbers_are_left_out():
    image = np.array([1.0, np.nan, 3.0, np.inf], np.float32).reshape(4, 1, 1)
    organs = np.array([1, 1, 1, 1], np.uint8).reshape(4, 1, 1)
    hu = statistics(Volume(organs, np.eye(4)), Volume(image, np.eye(4)), {1: "organ"})["labels"]["organ"]["hu"]
    assert (hu["mean"], hu["median"]) == (2, 2)
    only = np.array([0, 1, 0, 0], np.uint8).reshape(4, 1, 1)
    hu = statistics(Volume(only, np.eye(4)), Volume(image, np.eye(4)), {1: "organ"})["labels"]["organ"]["hu"]
    assert set(hu.values()) == {None}


def test_two_labels_of_one_name_are_both_there():
    volume = Volume(np.array([1, 2], np.uint8).reshape(2, 1, 1), np.eye(4))
    assert list(statistics(volume, volume, {1: "rib", 2: "rib"})["labels"]) == ["rib", "rib (2)"]


def test_csv_has_a_line_per_case_and_label(result, tmp_path):
    path = write_statistics_csv(tmp_path / "s.csv", {"a": result, "b": result})
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["name"]) for line in lines] == [(c, n) for c in "ab" for n in result["labels"]]
    first, second, absent = lines[:3]
    assert (first["voxels"], first["hu_mean"], first["centroid_r_mm"], first["box_stop_j"]) == ("4", "30", "95", "5")
    assert second["touches_border"] == "right left anterior posterior superior"
    assert absent["volume_ml"] == absent["hu_mean"] == absent["components"] == ""
    assert "no voxel" in absent["reason"]


def test_another_grid_is_refused():
    segmentation, image = Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4)), Volume(np.zeros((2, 2, 3)), np.eye(4))
    with pytest.raises(ValueError, match=r"the segmentation on .*\(2, 2, 2\).* the image on .*\(2, 2, 3\)"):
        statistics(segmentation, image, {1: "organ"})
