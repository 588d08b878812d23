"""Pieces and holes of a label map, against SciPy label by label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medseg3d.inference.postprocessing import (
    DropSmallComponentsd,
    DropSmallVolumesd,
    FillHolesOfLabelsd,
    clean,
    drop_small_components,
    fill_holes_of_labels,
)

AFFINE = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
SHAPES = [(24, 20, 18), (40, 33)]


@pytest.fixture
def labels() -> np.ndarray:
    array = np.zeros((20, 12, 12), np.uint8)
    array[1:5, 1:5, 1:5] = 1  # 64 voxels
    array[8:10, 1:5, 1:5] = 1  # 32 voxels
    array[12, 1, 1] = 1  # a speck
    array[15:18, 8:11, 8:11] = 2
    return array


def specked(shape: tuple[int, ...], numbers: int, seed: int) -> np.ndarray:
    """Regions of several pieces each, with specks of any label in them."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((numbers + 1, *shape)), (0, *[2] * len(shape)))
    noise[0] *= 2.5
    array = noise.argmax(axis=0).astype(np.uint8)
    specks = rng.random(shape) < 0.02
    array[specks] = rng.integers(0, numbers + 1, specks.sum())
    return array


def by_scipy(labels: np.ndarray, min_share: float, min_voxels: float) -> np.ndarray:
    result = np.zeros_like(labels)
    for number in np.unique(labels[labels > 0]):
        pieces, _ = ndimage.label(labels == number, structure=np.ones([3] * labels.ndim))
        sizes = np.bincount(pieces.ravel())[1:]
        stays = (sizes >= min_share * sizes.max()) & (sizes >= min_voxels)
        result[np.isin(pieces, 1 + np.flatnonzero(stays))] = number
    return result


def holes_by_scipy(labels: np.ndarray) -> np.ndarray:
    """Each label alone fills the pieces of background that it alone encloses."""
    result = labels.copy()
    for number in np.unique(labels[labels > 0]):
        filled = ndimage.binary_fill_holes(labels == number)
        holes, count = ndimage.label(labels == 0)
        for hole in range(1, count + 1):
            around = ndimage.binary_dilation(holes == hole) & (holes != hole)
            if filled[holes == hole].all() and (labels[around] == number).all():
                result[holes == hole] = number
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("share", "volume"), [(1.0, 0.0), (0.3, 0.0), (0.0, 30.0), (0.2, 12.0), (0.0, 1e9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_scipy_label_by_label(shape: tuple[int, ...], share: float, volume: float, seed: int) -> None:
    array = specked(shape, 5, seed)
    spacing = (1.5, 0.8, 2.0)[: len(shape)]
    expected = by_scipy(array, share, volume / np.prod(spacing))
    assert (expected != array).any()
    result = clean(array, spacing, min_share=share, min_volume_mm3=volume)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_holes_are_scipys(shape: tuple[int, ...], seed: int) -> None:
    array = specked(shape, 3, seed)
    expected = holes_by_scipy(array)
    assert (expected != array).any()
    np.testing.assert_array_equal(fill_holes_of_labels(array), expected)


def test_holes_by_hand() -> None:
    array = np.zeros((3, 9, 17), np.uint8)
    array[:, 1:8, 1:8] = 3
    array[1, 3, 3] = 0  # a hole
    array[1, 5:7, 5] = (0, 2)  # one with another label at its side
    array[0, 2, 6] = 0  # open at the array's edge
    array[:, 1:8, 9:16] = 4
    array[1, 4, 11:14] = (0, 1, 0)
    expected = array.copy()
    expected[1, 3, 3] = 3
    np.testing.assert_array_equal(fill_holes_of_labels(array), expected)
    np.testing.assert_array_equal(fill_holes_of_labels(array[1])[3, 3], 3)


def test_specks_in_holes_go_first() -> None:
    array = np.zeros((9, 9, 9), np.uint8)
    array[0, 0, :5] = 2
    array[1:8, 1:8, 1:8] = 1
    array[3:6, 3:6, 3:6] = 0
    array[4, 4, 4] = 2
    cleaned = clean(array, (1, 1, 1), min_share=0.5, fill_holes=True)
    assert (cleaned == 1).sum() == 7**3 and (cleaned == 2).sum() == 5
    np.testing.assert_array_equal(fill_holes_of_labels(array), array)


@pytest.mark.parametrize("order", ["C", "F", "turned"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32])
def test_any_type_and_layout(order: str, dtype: type) -> None:
    array = specked((16, 14, 12), 4, 3).astype(dtype)
    laid = {"C": array, "F": np.asfortranarray(array), "turned": np.ascontiguousarray(array.T[::-1])[::-1].T}[order]
    before = laid.copy()
    result = clean(laid, (1, 1, 1), min_share=0.5, fill_holes=True)
    assert result.dtype == dtype
    np.testing.assert_array_equal(laid, before)
    expected = clean(array.astype(np.uint8), (1, 1, 1), min_share=0.5, fill_holes=True)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("number", [0, 7])
def test_one_label_alone(number: int) -> None:
    array = np.full((4, 5, 6), number, np.uint8)
    np.testing.assert_array_equal(clean(array, (1, 1, 1), min_share=1, min_volume_mm3=1, fill_holes=True), array)


@pytest.mark.parametrize(("share", "left"), [(0.0, 97), (0.4, 96), (0.5, 96), (0.51, 64), (1.0, 64)])
def test_pieces_below_the_share_are_dropped(labels: np.ndarray, share: float, left: int) -> None:
    before = labels.copy()
    result = drop_small_components(labels, share)
    assert (result == 1).sum() == left
    assert (result == 2).sum() == 27
    assert np.array_equal(labels, before)
    assert not np.shares_memory(result, labels)


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0:2, 0:2, 0:2] = 3
    labels[2, 2, 2] = 3
    assert np.array_equal(drop_small_components(labels, 1.0), labels)


def test_another_label_inside_the_box_is_left_alone(labels: np.ndarray) -> None:
    labels[6, 2, 2] = 2  # lies in the box of label 1; a speck of label 2
    result = drop_small_components(labels, 1.0)
    assert result[6, 2, 2] == 0
    assert (result == 1).sum() == 64


def test_transform_keeps_the_grid(labels: np.ndarray) -> None:
    data = {"pred": MetaTensor(torch.from_numpy(labels[None]), affine=AFFINE)}
    result = DropSmallComponentsd("pred", 1.0)(data)["pred"]
    assert torch.equal(result.affine, AFFINE)
    assert result.dtype == torch.uint8
    assert int((result == 1).sum()) == 64


@pytest.mark.parametrize(("volume", "left"), [(12, 97), (12.1, 96), (384, 96), (385, 64), (769, 0)])
def test_volumes_are_those_of_the_affine(labels: np.ndarray, volume: float, left: int) -> None:
    turned = AFFINE.clone()
    turned[:3, :3] = turned[:3, :3][[1, 2, 0]] * torch.tensor([1, -1, 1])
    for affine in (AFFINE, turned):
        data = {"pred": MetaTensor(torch.from_numpy(labels[None]), affine=affine)}
        assert int((DropSmallVolumesd("pred", volume)(data)["pred"] == 1).sum()) == left


def test_transform_fills_holes(labels: np.ndarray) -> None:
    labels[2:4, 2:4, 2:4] = 0
    result = FillHolesOfLabelsd("pred")({"pred": torch.from_numpy(labels[None])})["pred"]
    assert int((result == 1).sum()) == 97 and not isinstance(result, MetaTensor)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="min_share must lie in"):
        DropSmallComponentsd("pred", share)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda array: DropSmallVolumesd("pred", -1), "min_volume_mm3 must be 0 or more"),
        (lambda array: DropSmallVolumesd("pred", 1)({"pred": torch.from_numpy(array[None])}), "pass a MetaTensor"),
        (lambda array: FillHolesOfLabelsd("pred")({"pred": torch.zeros(2, 4, 4, 4)}), "must be one label map"),
        (lambda array: clean(array, (1, 1, 1), min_volume_mm3=float("nan")), "min_volume_mm3 must be 0 or more"),
        (lambda array: clean(array, (1, 1)), "spacing is a number above 0 mm for each of 3 axes"),
        (lambda array: clean(array, (1, 1, 0)), "spacing is a number above 0 mm"),
        (lambda array: clean(array[None], (1, 1, 1, 1)), "two or three axes"),
        (lambda array: fill_holes_of_labels(array * 0.5), "got fractions"),
        (lambda array: fill_holes_of_labels(array.astype(np.int16) - 1), "at least 0"),
    ],
)
def test_what_cannot_be_is_refused(labels: np.ndarray, call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(labels)
