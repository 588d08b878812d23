"""The rules of coarse-to-fine segmentation (Zhou et al., MICCAI 2017) against golden/3d/c2f, voxel for voxel."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medseg3d.inference.coarse_to_fine import dice, slice_boxes
from medseg3d.inference.fusion import at_least, fused_mask, keep_seeded, strictest

CASES = ["case_0", "case_1", "case_2"]


@pytest.fixture
def golden(shared):
    """golden(name) -> (entry of the manifest, arrays)."""
    folder = shared("golden", "3d", "c2f")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest) == CASES
    return lambda name: (manifest[name], dict(np.load(folder / f"{name}.npz")))


@pytest.mark.parametrize("name", CASES)
def test_votes_and_seeds(name, golden):
    case, arrays = golden(name)
    masks = [arrays[axis] for axis in "XYZ"]
    assert list(masks[0].shape) == case["shape"]
    for votes in (1, 2, 3):
        np.testing.assert_array_equal(at_least(votes, masks), arrays[f"F{votes}"])
        assert np.count_nonzero(at_least(votes, masks)) == case["counts"][f"F{votes}"]
    np.testing.assert_array_equal(strictest(masks), arrays["seeds"])


@pytest.mark.parametrize("name", CASES)
def test_clean_up(name, golden):
    _, arrays = golden(name)
    for votes in (1, 2, 3):
        np.testing.assert_array_equal(keep_seeded(arrays[f"F{votes}"], arrays["seeds"]), arrays[f"F{votes}P"])
    for share in (0, 1):
        own = keep_seeded(arrays["F1"], arrays["F1"], min_share=share)
        np.testing.assert_array_equal(own, arrays[f"F1P_self_ratio{share}"])
    np.testing.assert_array_equal(fused_mask([arrays[axis] for axis in "XYZ"]), arrays["F2P"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_boxes(name, axis, golden):
    case, arrays = golden(name)
    boxes = slice_boxes(arrays["F2P"], axis, neighbours=1, margin=case["box_margin"])
    rows = [[number, *(edge for part in box for edge in (part.start, part.stop))] for number, box in boxes.items()]
    assert rows == arrays[f"boxes_axis{axis}"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_dice_between_rounds(name, golden):
    case, arrays = golden(name)
    assert dice(arrays["F2"].astype(bool), arrays["F2P"].astype(bool)) == case["inter_dsc_F2_F2P"]
