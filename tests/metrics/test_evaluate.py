from __future__ import annotations

import json

import numpy as np
import pytest

from medseg3d.metrics import evaluate_case

LABELS = {0: "background", 1: "brainstem", 2: "larynx", 3: "mandible", 4: "parotid_left"}
SPACING = (2.0, 1.0, 5.0)  # 0.01 ml a voxel


@pytest.fixture
def rows():
    prediction, reference = np.zeros((10, 10, 10), np.uint8), np.zeros((10, 10, 10), np.uint8)
    prediction[0:4, 0:5, 0:5], reference[0:5, 0:5, 0:5] = 1, 1  # 100 of 125 voxels
    reference[8, 8, 8] = 2  # not predicted
    prediction[9, 9, 9] = 3  # not in the reference
    return evaluate_case(prediction, reference, SPACING, LABELS, nsd_tolerance_mm=1.0)


def test_a_row_per_label_without_the_background(rows):
    assert [(row["label"], row["name"]) for row in rows] == [(k, v) for k, v in LABELS.items() if k]
    assert len({tuple(row) for row in rows}) == 1, "every row has the same keys in the same order"
    json.dumps(rows, allow_nan=False)


def test_found_label(rows):
    row = rows[0]
    assert row["dice"] == pytest.approx(200 / 225)
    assert row["iou"] == pytest.approx(100 / 125)
    assert (row["precision"], row["recall"]) == (1, pytest.approx(0.8))
    assert row["volume_ml"] == pytest.approx(1.0)
    assert row["reference_ml"] == pytest.approx(1.25)
    assert row["volume_error_ml"] == pytest.approx(-0.25)
    assert row["volume_error_percent"] == pytest.approx(-20)
    assert row["hd_mm"] == pytest.approx(2.0), "one voxel of 2 mm is missing along the first axis"
    assert row["nsd_tolerance_mm"] == 1.0
    assert 0 < row["nsd"] < 1
    assert row["note"] == ""


def test_missed_label_counts_as_zero(rows):
    row = rows[1]
    assert (row["dice"], row["iou"], row["recall"], row["nsd"]) == (0, 0, 0, 0)
    assert (row["hd95_mm"], row["hd_mm"], row["assd_mm"], row["precision"]) == (None, None, None, None)
    assert (row["volume_ml"], row["volume_error_percent"]) == (0, -100)
    assert row["note"] == "not predicted"


@pytest.mark.parametrize(
    ("index", "volume", "note"),
    [(2, 0.01, "absent from the reference, yet predicted"), (3, 0, "absent from the reference")],
)
def test_label_absent_from_the_reference_is_null_with_a_reason(rows, index, volume, note):
    row = rows[index]
    assert row["volume_ml"] == pytest.approx(volume)
    assert row["note"] == note
    undefined = set(row) - {"label", "name", "nsd_tolerance_mm", "volume_ml", "note"}
    assert all(row[name] is None for name in undefined)


def test_ignored_label_is_not_measured_even_where_both_hold_it():
    label_map = np.ones((3, 3, 3), np.uint8)
    (row,) = evaluate_case(label_map, label_map, SPACING, {1: "larynx"}, ignore=[1])
    assert row["dice"] is None
    assert row["reference_ml"] is None
    assert row["volume_ml"] == pytest.approx(0.27)
    assert row["note"] == "not annotated in the reference"


def test_volume_of_a_sheared_grid():
    steps = np.array([[1.0, 0, 0], [0, 1, 1], [0, 0, 3]])
    label_map = np.ones((10, 10, 10), np.uint8)
    (row,) = evaluate_case(label_map, label_map, steps, {1: "body"})
    assert row["volume_ml"] == pytest.approx(3.0)
