"""Hausdorff distances in mm for MONAI's engines, against hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor

from medseg3d.training import HausdorffInMm

SPACING = (3.0, 2.0, 5.0)
AFFINE = torch.diag(torch.tensor([-3.0, 2.0, 5.0, 1.0], dtype=torch.float64))


def one_hot(*voxels, shape=(6, 6, 6)):
    """(1 + len(voxels), *shape): a background of nothing, then one class with one voxel each; None is an empty one."""
    mask = torch.zeros(1 + len(voxels), *shape)
    for channel, voxel in enumerate(voxels, start=1):
        if voxel is not None:
            mask[(channel, *voxel)] = 1
    return mask


def distances(predicted, reference, **options):
    metric = HausdorffInMm(**options)
    metric([predicted], [MetaTensor(reference, affine=AFFINE)])
    return metric, metric.get_buffer()


@pytest.mark.parametrize("axis", range(3))
def test_distance_is_in_mm(axis):
    moved = [1, 1, 1]
    moved[axis] += 2
    _, buffer = distances(one_hot((1, 1, 1)), one_hot(tuple(moved)))
    assert buffer.tolist() == [[pytest.approx(2 * SPACING[axis])]]


def test_an_absent_organ_does_not_count():
    predicted = one_hot((1, 1, 1), (2, 2, 2), None, None)
    reference = one_hot((1, 1, 3), None, (3, 3, 3), None)
    metric, buffer = distances(predicted, reference)
    assert buffer.shape == (1, 4)
    assert buffer[0, 0] == 10 and all(math.isnan(value) for value in buffer[0, 1:])
    assert metric.aggregate() == 10


def test_mean_over_cases():
    metric = HausdorffInMm(percentile=100)
    for step in (0, 1):
        metric([one_hot((1, 1, 1))], [MetaTensor(one_hot((1 + step, 1, 1)), affine=AFFINE)])
    assert metric.get_buffer().tolist() == [[0.0], [3.0]]
    assert metric.aggregate() == 1.5


def test_percentile():
    predicted, reference = torch.zeros(2, 2, 40, 1, 1)
    predicted[1, :20] = 1
    reference[1, :21] = 1
    affine = torch.eye(4)
    values = []
    for percentile in (95, 100):
        metric = HausdorffInMm(percentile=percentile)
        metric([predicted], [MetaTensor(reference, affine=affine)])
        values.append(metric.aggregate().item())
    assert values == [0.0, 1.0]


def test_a_reference_without_a_grid_is_refused():
    with pytest.raises(ValueError, match="need the affine"):
        HausdorffInMm()([one_hot((1, 1, 1))], [one_hot((1, 1, 1))])
