"""Windows of slices: the right voxels, the right neighbours, the classes that were asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from monai.transforms import ClassesToIndices
from torch.utils.data import default_collate

from medseg3d.data.slices import RandSliced
from medseg3d.inference import Slices

SHAPE = (9, 11, 13)
FILL = -7.0


def case(labels=None):
    """A volume in which each voxel holds its own index, and its labels."""
    image = torch.arange(np.prod(SHAPE), dtype=torch.float32).reshape(1, *SHAPE)
    labels = torch.zeros(1, *SHAPE, dtype=torch.uint8) if labels is None else labels
    return {"image": image, "label": labels, "label_cls_indices": ClassesToIndices(num_classes=3)(labels)}


def drawn(data, seed=0, **options):
    transform = RandSliced(["image", "label"], label_keys="label", fill=FILL, **{"size": (6, 7), **options})
    return transform.set_random_state(seed)(data)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_channels_are_neighbouring_slices_as_inference_gives_them(axis, seed):
    data = case()
    window = drawn(data, seed, axes=[axis], neighbours=2)["image"]
    seen = []

    def network(stacks):
        seen.append(stacks.clone())
        return stacks[:, :2]

    Slices(axes=axis, neighbours=2, batch_size=20).label_map(data["image"][None], network)
    stacks = torch.cat(seen)
    shape = tuple(stacks.shape[2:])
    at = np.unravel_index(int(window[2, 0, 0]), SHAPE)
    row, column = (at[other] for other in range(3) if other != axis)
    assert window.shape == (5, 6, 7) and row + 6 <= shape[0] and column + 7 <= shape[1]
    torch.testing.assert_close(window, stacks[at[axis], :, row : row + 6, column : column + 7], rtol=0, atol=0)


def test_the_label_is_that_of_the_middle_slice():
    data = case()
    data["label"] = (data["image"] % 251).to(torch.uint8)
    result = drawn(data, axes=[1], neighbours=1)
    torch.testing.assert_close(result["label"], (result["image"][1:2] % 251).to(torch.uint8), rtol=0, atol=0)


def test_what_lies_outside_is_filled():
    result = drawn(case(), size=(20, 5), axes=[0])
    inside = result["image"][0] != FILL
    assert inside.all(dim=1).nonzero().flatten().tolist() == list(range(5, 16))
    assert inside.any(dim=1).sum() == 11 and not result["label"].any()


def test_classes_and_axes_are_drawn_as_often_as_asked():
    labels = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    labels[0, 4, 5, 6], labels[0, 1, 1, 1] = 1, 2
    data = case(labels)
    transform = RandSliced(["image", "label"], (1, 1), "label", axes=[0, 2], ratios=[0, 1, 3]).set_random_state(0)
    counts = Counter(int(transform(data)["label"]) for _ in range(400))
    assert set(counts) == {1, 2} and 2.2 < counts[2] / counts[1] < 4.2
    lines = RandSliced("image", (1, 13), axes=[0, 2], fill=FILL).set_random_state(0)
    along_last = sum(bool((lines(data)["image"] == FILL).any()) for _ in range(200))  # there a row has 11 voxels
    assert 60 < along_last < 140


def test_a_class_that_is_not_there_is_not_drawn():
    result = drawn(case(), ratios=[0, 1, 1])
    assert result["image"].shape == (1, 6, 7)


def test_windows_are_cut_where_the_volume_lies():
    data = case()
    there = {**data, "image": data["image"].to("meta"), "label": data["label"].to("meta")}
    result = drawn(there, size=(20, 5), neighbours=1)
    assert result["image"].is_meta and result["label"].is_meta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (6,)}, "size must be rows and columns"),
        ({"neighbours": -1}, "neighbours must be 0 or more"),
        ({"axes": []}, "axes must be one or more"),
        ({"axes": [3]}, "axes must be one or more"),
        ({"ratios": [1, 1]}, "ratios has 2 entries, but there are 3 classes"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        drawn(case(), **options)


def test_windows_of_several_volumes_make_a_batch():
    """Lists of indices are of another length in each volume, which cannot be collated: they go."""
    more = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    more[0, 4] = 1
    batch = default_collate([drawn(case(), seed=1), drawn(case(more), seed=2)])
    assert batch.keys() == {"image", "label"} and batch["image"].shape == (2, 1, 6, 7)


def test_the_callers_volume_is_not_changed():
    data = case()
    before = data["image"].clone()
    drawn(data, neighbours=1)["image"].fill_(0)
    torch.testing.assert_close(data["image"], before, rtol=0, atol=0)
    assert "label_cls_indices" in data
