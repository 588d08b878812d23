from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg3d.metrics import (
    SurfaceDistances,
    average_surface_distance,
    hausdorff,
    surface_dice,
    surface_distances,
)
from medseg3d.metrics.surface import surface

SPACING = (2.0, 1.0, 0.5)


def two_points(offset, shape=(9, 9, 9)):
    """Two maps with one voxel of label 1 each, `offset` voxels apart."""
    prediction, reference = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    prediction[4, 4, 4] = 1
    reference[tuple(4 + np.array(offset))] = 1
    return prediction, reference


@pytest.mark.parametrize(
    ("offset", "mm"),
    [
        ((1, 0, 0), 2.0),
        ((0, 1, 0), 1.0),
        ((0, 0, 1), 0.5),
        ((1, 2, 0), math.hypot(2, 2)),
        ((2, 3, -4), math.hypot(4, 3, 2)),
    ],
)
def test_single_voxels_are_their_distance_apart_in_mm(offset, mm):
    prediction, reference = two_points(offset)
    assert hausdorff(prediction, reference, SPACING, [1])[1] == pytest.approx(mm)
    assert hausdorff(prediction, reference, SPACING, [1], percentile=95)[1] == pytest.approx(mm)
    assert average_surface_distance(prediction, reference, SPACING, [1])[1] == pytest.approx(mm)
    assert surface_dice(prediction, reference, SPACING, [1], tolerance_mm=mm)[1] == 1
    assert surface_dice(prediction, reference, SPACING, [1], tolerance_mm=mm * 0.99)[1] == 0


def test_a_row_longer_on_one_side():
    """Reference: 2 voxels; prediction: the same 2 and 8 more to one side, 1 mm apart: distances 0, 0, 1, ..., 8."""
    prediction, reference = np.zeros((1, 12, 1), np.uint8), np.zeros((1, 12, 1), np.uint8)
    reference[0, :2], prediction[0, :10] = 1, 1
    distances = surface_distances(prediction, reference, (3, 1, 3), [1])[1]
    np.testing.assert_allclose(distances.to_reference, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_allclose(distances.to_prediction, [0, 0])
    assert distances.hausdorff() == 8
    assert distances.hausdorff(50) == pytest.approx(3.5), "the larger of the directed medians 3.5 and 0"
    assert distances.hausdorff(95) == pytest.approx(7.55)
    assert distances.average(symmetric=False) == pytest.approx(36 / 10)
    assert distances.average() == pytest.approx(36 / 12)
    assert distances.dice(2) == pytest.approx((4 + 2) / 12)
    backwards = surface_distances(reference, prediction, (3, 1, 3), [1])[1]
    assert backwards.hausdorff(directed=True) == 0
    assert backwards.hausdorff() == 8


def test_the_tolerance_includes_its_own_value_in_spite_of_rounding():
    prediction, reference = two_points((3, 0, 0))
    assert 7 * 0.1 - 4 * 0.1 > 0.3
    assert surface_dice(prediction, reference, (0.1, 1, 1), [1], tolerance_mm=0.3)[1] == 1


def test_surface_of_a_block_is_hollow_and_closed_at_the_border():
    mask = np.zeros((7, 7, 7), bool)
    mask[1:6, 1:6, 1:6] = True
    assert surface(mask).sum() == 5**3 - 3**3
    assert not surface(mask)[3, 3, 3]
    filling = np.ones((4, 4, 4), bool)
    assert surface(filling).sum() == 4**3 - 2**3, "an organ cut by the scan's edge has a surface there"
    assert surface(np.ones((1, 5, 5), bool)).all()


def test_empty_sides():
    empty, full = np.zeros((5, 5, 5), np.uint8), np.zeros((5, 5, 5), np.uint8)
    full[2, 2, 2] = 1
    both = surface_distances(empty, empty, SPACING, [1])[1]
    assert all(math.isnan(value) for value in (both.hausdorff(), both.hausdorff(95), both.average(), both.dice(1)))
    for sides in ((empty, full), (full, empty)):
        one = surface_distances(*sides, SPACING, [1])[1]
        assert one.hausdorff() == one.hausdorff(95) == one.hausdorff(directed=True) == math.inf
        assert one.average() == one.average(symmetric=False) == math.inf
        assert one.dice(1000) == 0


def test_labels_far_apart_do_not_disturb_each_other():
    prediction, reference = np.zeros((30, 30, 30), np.uint8), np.zeros((30, 30, 30), np.uint8)
    prediction[1:4, 1:4, 1:4] = reference[1:4, 1:4, 1:4] = 1
    prediction[20:25, 20:25, 20:25] = 2
    reference[20:25, 20:25, 22:27] = 2
    assert hausdorff(prediction, reference, SPACING, [1, 2]) == {1: 0, 2: pytest.approx(1.0)}


def test_sheared_steps_give_the_true_distance():
    """A gantry tilt: one step along the last axis moves 3 mm up and 1 mm back."""
    steps = np.array([[1.0, 0, 0], [0, 1, 1], [0, 0, 3]])
    prediction, reference = two_points((0, -1, 1))
    assert hausdorff(prediction, reference, steps, [1])[1] == pytest.approx(3.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spacing=st.tuples(*[st.floats(0.3, 4.0)] * 3))
def test_distances_equal_a_distance_transform(seed, spacing):
    rng = np.random.default_rng(seed)
    prediction, reference = (ndimage.binary_dilation(rng.random((9, 8, 7)) > 0.98) for _ in range(2))
    if not prediction.any() or not reference.any():
        return
    distances = SurfaceDistances.of(prediction, reference, spacing)
    transform = ndimage.distance_transform_edt(~surface(reference), sampling=spacing)
    np.testing.assert_allclose(distances.to_reference, transform[surface(prediction)], atol=1e-9)


def test_refusals():
    prediction, reference = two_points((1, 0, 0))
    for spacing in ((1, 1), (1, 0, 1), (1, math.nan, 1), np.eye(4)):
        with pytest.raises(ValueError, match="spacing"):
            hausdorff(prediction, reference, spacing, [1])
    with pytest.raises(ValueError, match="percentile"):
        hausdorff(prediction, reference, SPACING, [1], percentile=0)
    with pytest.raises(ValueError, match="tolerance"):
        surface_dice(prediction, reference, SPACING, [1], tolerance_mm=-1)


def test_images_of_two_axes():
    prediction, reference = np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8)
    prediction[4, 4] = reference[7, 8] = 1
    assert hausdorff(prediction, reference, (2.0, 0.5), [1])[1] == pytest.approx(math.hypot(6, 2))
    assert surface(np.ones((4, 5), bool)).sum() == 4 * 5 - 2 * 3
    sheared = np.array([[1.0, 1], [0, 3]])
    assert hausdorff(prediction, reference, sheared, [1])[1] == pytest.approx(math.hypot(3 + 4, 12))


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, torch.tensor])
def test_masks_of_any_kind_are_true_where_they_are_not_zero(kind):
    predicted, reference = two_points((1, 2, 0))
    distances = SurfaceDistances.of(kind(predicted * 2), kind(reference), SPACING)
    assert distances.hausdorff() == pytest.approx(math.hypot(2, 2))
    nothing = SurfaceDistances.of(kind(predicted * 2), kind(reference * 0), SPACING)
    assert (nothing.hausdorff(), nothing.dice(1.0)) == (math.inf, 0)


def test_masks_of_different_shapes_are_refused():
    mask = np.ones((3, 4, 5), bool)
    with pytest.raises(ValueError, match="same grid"):
        SurfaceDistances.of(mask, mask[:2], SPACING)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_a_tolerance_is_a_distance(tolerance):
    with pytest.raises(ValueError, match=f"0 mm or more, got {tolerance}"):
        surface_dice(*two_points((1, 0, 0)), SPACING, [1], tolerance_mm=tolerance)
