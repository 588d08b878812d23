"""Components of a label map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medseg3d.inference.postprocessing import DropSmallComponentsd, drop_small_components


@pytest.fixture
def labels() -> np.ndarray:
    array = np.zeros((20, 12, 12), np.uint8)
    array[1:5, 1:5, 1:5] = 1  # 64 voxels
    array[8:10, 1:5, 1:5] = 1  # 32 voxels
    array[12, 1, 1] = 1  # a speck
    array[15:18, 8:11, 8:11] = 2
    return array


@pytest.mark.parametrize(("share", "left"), [(0.0, 97), (0.4, 96), (0.5, 96), (0.51, 64), (1.0, 64)])
def test_pieces_below_the_share_are_dropped(labels: np.ndarray, share: float, left: int) -> None:
    before = labels.copy()
    result = drop_small_components(labels, share)
    assert (result == 1).sum() == left
    assert (result == 2).sum() == 27
    assert np.array_equal(labels, before)


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
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    data = {"pred": MetaTensor(torch.from_numpy(labels[None]), affine=affine)}
    result = DropSmallComponentsd("pred", 1.0)(data)["pred"]
    assert torch.equal(result.affine, affine)
    assert result.dtype == torch.uint8
    assert int((result == 1).sum()) == 64


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="min_share must lie in"):
        DropSmallComponentsd("pred", share)
