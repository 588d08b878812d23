"""Resampling against SciPy and against weights worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg3d.interpolation import axis_weights, interpolate, nearest

SIZES = [(1, 3), (2, 5), (5, 13), (20, 31), (64, 64), (31, 20), (33, 7), (5, 1), (1, 1)]


def centres(n_in: int, n_out: int) -> np.ndarray:
    return (np.arange(n_out) + 0.5) * n_in / n_out - 0.5


def scipy_resample(array: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    at = np.meshgrid(*(centres(n, m) for n, m in zip(array.shape, shape, strict=True)), indexing="ij")
    return ndimage.map_coordinates(array.astype(float), at, order=order, mode="nearest")


def test_weights_by_hand():
    np.testing.assert_allclose(axis_weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(axis_weights(4, 2), [[0.5, 0.375, 0.125, 0], [0, 0.125, 0.375, 0.5]])
    np.testing.assert_allclose(axis_weights(3, 1), [[1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
def test_weights_are_those_of_a_mean(n_in, n_out, order):
    weights = axis_weights(n_in, n_out, order)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)  # left and right are treated alike
    assert not ((weights != 0) & (np.abs(weights) < 1e-12)).any()
    if n_in == n_out:
        np.testing.assert_array_equal(weights, np.eye(n_in))


@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
def test_weights_are_scipys(n_in, n_out):
    signal = np.random.default_rng(0).normal(size=n_in)
    for order in (1, 3) if n_out >= n_in else (3,):
        expected = ndimage.map_coordinates(signal, [centres(n_in, n_out)], order=order, mode="nearest")
        np.testing.assert_allclose(axis_weights(n_in, n_out, order) @ signal, expected, atol=1e-8)


def test_making_voxels_larger_does_not_alias():
    stripes = np.tile([0.0, 100.0], 60)
    assert np.abs(axis_weights(120, 33, 1) @ stripes - 50)[1:-1].max() < 2
    assert np.abs(axis_weights(120, 33, 3) @ stripes - 50)[1:-1].max() > 40


@pytest.mark.parametrize("layout", ["C", "F", "flipped", "rotated"])
@pytest.mark.parametrize(("shape", "order"), [((40, 50, 60), 1), ((17, 23, 60), 3), ((40, 9, 5), 3), ((19, 21, 80), 3)])
def test_ct_volumes_agree_with_scipy_in_any_memory_layout(layout, shape, order):
    ct = np.random.default_rng(1).integers(-1024, 3000, (19, 23, 37)).astype(np.int16)
    laid = {
        "C": ct,
        "F": np.asfortranarray(ct),
        "flipped": ct[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
        "rotated": np.moveaxis(np.moveaxis(ct, 0, 2).copy(), 2, 0),
    }[layout]
    result = interpolate(laid, shape, order)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, scipy_resample(ct, shape, order), atol=2e-3)


@pytest.mark.parametrize("shape", [(7, 6, 5), (3, 2, 1), (14, 13, 11), (3, 12, 5), (20, 2, 9)])
def test_nearest_takes_the_voxel_that_holds_the_centre(shape):
    labels = np.arange(7 * 6 * 5, dtype=np.int32).reshape(7, 6, 5)
    expected = [[int((index + 0.5) * n / m) for index in range(m)] for n, m in zip(labels.shape, shape, strict=True)]
    np.testing.assert_array_equal(nearest(labels, shape), labels[np.ix_(*expected)])
    np.testing.assert_array_equal(nearest(np.asfortranarray(labels), shape), labels[np.ix_(*expected)])
