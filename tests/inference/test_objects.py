"""Objects from semantic maps: parted, grown back and numbered; on drawn shapes and on the contours of real nuclei."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medseg3d.data.border_weights import part_touching
from medseg3d.inference.objects import ObjectsFromLogitsd, components, filled, grown, watershed


def discs(*centres, radius=8, size=(40, 60)):
    rows, columns = np.indices(size)
    return np.any([(rows - y) ** 2 + (columns - x) ** 2 < radius**2 for y, x in centres], axis=0)


def test_components_are_joined_by_faces_and_small_ones_left_out():
    foreground = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]], bool)
    assert components(foreground).max() == 4
    found = components(foreground, least=2)
    assert found.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]] and found.dtype == np.int32


def test_the_watershed_parts_what_touches_and_nothing_else():
    touching = discs((20, 18), (20, 32))
    assert components(touching).max() == 1
    parts = watershed(touching)
    assert parts.max() == 2 and ((parts > 0) == touching).all()
    assert set(np.unique(parts[:, :22])) == {0, parts[20, 18]}
    assert watershed(discs((20, 30), radius=12)).max() == 1


@pytest.mark.parametrize("scale", [1, 4])
def test_a_neck_parts_large_and_small_alike(scale):
    size, centres, radius = (40 * scale, 60 * scale), ((20 * scale, 18 * scale), (20 * scale, 32 * scale)), 8 * scale
    dumbbell = discs(*centres, radius=radius, size=size)  # the way between the discs is half as wide as they are
    ellipse = discs(*((20 * scale, column * scale) for column in range(20, 33)), radius=radius, size=size)
    notched = ellipse.copy()
    notched[12 * scale : 14 * scale, 25 * scale : 28 * scale] = False
    assert watershed(dumbbell, spread=1.0, neck=0.8).max() == 2
    assert watershed(dumbbell, spread=1.0, neck=0.4).max() == 1
    assert watershed(notched, spread=1.0).max() > 1 and watershed(notched, spread=1.0, neck=0.8).max() == 1


def test_a_neck_joins_in_a_row_and_in_three_dimensions():
    row = np.zeros((12, 12, 40), bool)
    rows, columns, ends = np.indices(row.shape)
    for centre, radius in ((8, 5.5), (16, 5.0), (31, 5.5)):
        row |= (rows - 6) ** 2 + (columns - 6) ** 2 + (ends - centre) ** 2 < radius**2
    row[5:8, 5:8, 20:28] = True
    parts = watershed(row, spread=1.0, neck=0.7)
    assert parts.max() == 2 and parts[6, 6, 8] == parts[6, 6, 16] != parts[6, 6, 31]
    assert ((parts > 0) == row).all() and watershed(row, spread=1.0, neck=0.2).max() == 1


def test_the_watershed_in_three_dimensions_keeps_single_voxels():
    volume = np.zeros((9, 20, 20), bool)
    volume[2:7, 2:8, 2:8] = volume[2:7, 12:18, 2:8] = volume[8, 19, 19] = True
    parts = watershed(volume, spread=1.0)
    assert parts.max() == 3 and ((parts > 0) == volume).all()
    assert watershed(volume, spread=1.0, least=2).max() == 2
    assert watershed(np.ones((3, 4), bool)).max() == 1


@pytest.mark.parametrize("part", [components, watershed])
def test_no_foreground_no_objects(part):
    assert not part(np.zeros((5, 6), bool)).any()


def test_small_holes_are_filled_and_bays_are_not():
    shape = np.ones((12, 14), bool)
    shape[2:4, 2:5] = False  # 6 voxels within
    shape[6:10, 2:10] = False  # 32 voxels within
    shape[0:3, 10] = False  # a bay of 3
    expected = shape.copy()
    expected[2:4, 2:5] = True
    before = shape.copy()
    assert (filled(shape, 6) == expected).all() and (filled(shape, 5) == shape).all()
    assert (shape == before).all() and filled(np.zeros((3, 3), bool), 9).sum() == 0
    ball = np.ones((5, 5, 5), bool)
    ball[2, 2, 2] = False
    assert filled(ball, 1).all()
    logits = torch.from_numpy(np.stack([~shape, shape])).float() * 10
    assert (ObjectsFromLogitsd("pred", holes=6)({"pred": logits})["pred"] > 0).sum() == expected.sum()


def test_objects_grow_to_the_middle():
    objects = np.zeros((3, 9), np.int32)
    objects[1, 1], objects[1, 7] = 2, 1
    assert grown(objects, 1)[1].tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1]
    assert grown(objects, 2.9)[1].tolist() == [2, 2, 2, 2, 0, 1, 1, 1, 1]
    assert grown(objects, 9, within=np.eye(3, 9, dtype=bool))[1].tolist() == [0, 2, 0, 0, 0, 0, 0, 1, 0]
    assert not grown(np.zeros((2, 2), np.int32), 3).any()


def test_parted_nuclei_are_found_again(shared):
    """The target of training holds every nucleus: components grown by the free line are the contoured nuclei."""
    folder = shared("data", "dsb2018-nuclei")
    objects = np.asarray(Image.open(folder / "1f6b7cead153_labels.png")).astype(np.int32)
    found = grown(components(part_touching(objects) > 0), 1.5, within=objects > 0)
    shares = []
    for number in range(1, objects.max() + 1):
        mask = objects == number
        best = np.bincount(found[mask])[1:]
        shares.append(best.max(initial=0) / (mask | (found == best.argmax() + 1)).sum() if len(best) else 0)
    assert np.mean(np.array(shares) > 0.9) > 0.95


def test_the_transform():
    logits = torch.zeros(2, 40, 60)
    logits[1] = torch.from_numpy(discs((20, 15), (20, 45))).float() * 4 - 2
    data = {"pred": MetaTensor(logits, affine=torch.diag(torch.tensor([2.0, 2, 1, 1])))}
    found = ObjectsFromLogitsd("pred", grow=1.0)(data)["pred"]
    assert found.shape == (1, 40, 60) and found.max() == 2
    assert (found > 0).sum() > (logits[1] > 0).sum()
    torch.testing.assert_close(found.affine, data["pred"].affine)
    joined = {"pred": torch.stack([torch.zeros(40, 60), torch.from_numpy(discs((20, 18), (20, 32))) * 6.0 - 3])}
    assert ObjectsFromLogitsd("pred")(joined)["pred"].max() == 1
    assert ObjectsFromLogitsd("pred", method="watershed")(joined)["pred"].max() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "grabcut"}, "'components' or 'watershed', got 'grabcut'"), ({"threshold": 1.5}, "got 1.5")],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectsFromLogitsd("pred", **arguments)
