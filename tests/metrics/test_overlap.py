from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medseg3d.metrics import Overlap, dice, iou, overlaps


def maps(shape=(4, 5, 6)):
    return np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)


def test_hand_worked_counts():
    prediction, reference = maps()
    prediction[0, 0, :4] = 3  # 4 voxels
    reference[0, 0, 1:6] = 3  # 5 voxels, 3 in common
    assert overlaps(prediction, reference, [3]) == {3: Overlap(predicted=4, reference=5, common=3)}
    assert dice(prediction, reference, [3])[3] == pytest.approx(6 / 9)
    assert iou(prediction, reference, [3])[3] == pytest.approx(3 / 6)
    overlap = overlaps(prediction, reference, [3])[3]
    assert overlap.precision == pytest.approx(3 / 4)
    assert overlap.recall == pytest.approx(3 / 5)
    assert overlap.volume_error_percent == pytest.approx(-20)


def test_labels_are_measured_apart_and_in_the_order_asked():
    prediction, reference = maps()
    prediction[0], prediction[1] = 1, 2
    reference[0], reference[1] = 2, 1
    reference[3] = prediction[3] = 7
    assert dice(prediction, reference, [7, 2, 1]) == {7: 1.0, 2: 0.0, 1: 0.0}
    assert list(dice(prediction, reference, [7, 2, 1])) == [7, 2, 1]


def test_empty_sides():
    empty, full = maps()
    full[1, 1, 1] = 1
    both = overlaps(empty, empty, [1])[1]
    assert all(math.isnan(value) for value in (both.dice, both.iou, both.precision, both.recall))
    assert math.isnan(both.volume_error_percent)
    missed, invented = overlaps(empty, full, [1])[1], overlaps(full, empty, [1])[1]
    assert (missed.dice, missed.iou, missed.recall) == (0, 0, 0)
    assert math.isnan(missed.precision)
    assert missed.volume_error_percent == -100
    assert (invented.dice, invented.iou, invented.precision) == (0, 0, 0)
    assert math.isnan(invented.recall)
    assert dice(empty, empty, [1], empty=1.0) == {1: 1.0}
    assert dice(empty, full, [1], empty=1.0) == {1: 0.0}, "only both sides empty counts as agreement"


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64, np.uint16])
def test_integer_types_and_masks(dtype):
    prediction, reference = (array.astype(dtype) for array in maps())
    prediction[:2], reference[:1] = 1, 1
    assert dice(prediction, reference, [1])[1] == pytest.approx(2 / 3)


def test_a_label_beyond_the_values_of_the_map_is_absent():
    prediction, reference = maps()
    prediction[0] = reference[0] = 2
    assert overlaps(prediction, reference, [300]) == {300: Overlap(0, 0, 0)}


@pytest.mark.parametrize("order", ["C", "F"])
def test_labels_may_be_large_numbers(order):
    prediction, reference = (np.asarray(array, np.int64, order=order) for array in maps())
    prediction[0, 0, :4], reference[0, 0, 1:6] = 2**40, 2**40
    prediction[1], reference[1, 0] = 3, 3
    prediction[3, 4, 5], reference[3, 4, 5] = 2**40 - 1, 2**40 + 1
    found = dice(prediction, reference, [3, 2**40, 2**41, 7])
    assert found == pytest.approx({3: 12 / 36, 2**40: 6 / 9, 2**41: math.nan, 7: math.nan}, nan_ok=True)


def test_works_in_two_dimensions():
    prediction = np.eye(3, dtype=np.uint8)
    assert dice(prediction, np.ones((3, 3), np.uint8), [1])[1] == pytest.approx(2 * 3 / 12)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, torch.tensor, list])
def test_masks_of_any_kind_are_true_where_they_are_not_zero(kind):
    predicted, reference = np.array([[2, 0, 4], [2, 0, 0]]), np.array([[1, 1, 4], [0, 0, 0]])
    assert Overlap.of(kind(predicted), kind(reference)) == Overlap(predicted=3, reference=3, common=2)


def test_masks_that_cannot_be_compared_are_refused():
    mask = np.ones((1, 4), bool)
    with pytest.raises(ValueError, match=r"the same grid, got the shapes \(1, 4\) and \(3, 4\)"):
        Overlap.of(mask, np.ones((3, 4), bool))
    for probability in (0.4, np.nan):
        with pytest.raises(ValueError, match="fractions such as probabilities: choose a threshold"):
            Overlap.of(mask, mask * probability)


def test_refusals():
    prediction, reference = maps()
    with pytest.raises(ValueError, match="same grid"):
        dice(prediction, reference[1:], [1])
    with pytest.raises(ValueError, match="background"):
        dice(prediction, reference, [0, 1])
    with pytest.raises(ValueError, match="integers, got float32"):
        dice(prediction.astype(np.float32), reference, [1])
