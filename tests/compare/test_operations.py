"""Operations of a strategy against sums worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.compare.operations import Operations
from medseg3d.inference import CoarseToFine, Downsampled, OverlapTile, Slices, SubVolumes

IMAGE = torch.zeros(1, 1, 20, 24, 28)
FLAT = nn.Conv2d(1, 3, 3, padding=1)  # 2 x 27 operations a pixel
SOLID = nn.Conv3d(1, 3, 3, padding=1)  # 2 x 81 a voxel


def test_windows_of_sub_volumes():
    strategy = SubVolumes(16, overlap=0.5)
    windows, flops = Operations(SOLID, strategy).count(IMAGE)
    assert windows == strategy.count(IMAGE.shape[2:]) > 1
    assert flops == windows * 16**3 * 162


def test_batches_of_windows_count_each_window():
    one = Operations(SOLID, SubVolumes(16)).count(IMAGE)
    assert Operations(SOLID, SubVolumes(16, batch_size=4)).count(IMAGE) == one


def test_slices_of_three_axes():
    assert Operations(FLAT, Slices(axes=(0, 1, 2))).count(IMAGE) == (20 + 24 + 28, 3 * 20 * 24 * 28 * 54)


def test_slices_with_a_network_for_each_axis():
    wide = nn.Conv2d(1, 3, 5, padding=2)  # 2 x 75
    expected = (20 + 28, 20 * 24 * 28 * (54 + 150))
    assert Operations(nn.ModuleDict({"0": FLAT, "2": wide}), Slices(axes=(0, 2))).count(IMAGE) == expected
    assert Operations(nn.ModuleList([FLAT, wide]), Slices(axes=(0, 2))).count(IMAGE) == expected


def test_slices_with_neighbours_and_padding():
    network = nn.Conv2d(3, 2, 1)  # 2 x 6
    found = Operations(network, Slices(axes=0, neighbours=1, divisible=16)).count(IMAGE)
    assert found == (20, 20 * 32 * 32 * 12)


def test_downsampled_is_one_window():
    assert Operations(SOLID, Downsampled((8, 8, 8))).count(IMAGE) == (1, 8**3 * 162)


def test_tiles_that_lose_their_margin():
    strategy = OverlapTile(16, 12)
    windows, flops = Operations(nn.Conv3d(1, 2, 5), strategy).count(IMAGE)
    assert windows == strategy.count(IMAGE.shape[2:]) == 2 * 2 * 3
    assert flops == windows * 12**3 * 2 * 250


def test_what_depends_on_the_image_is_not_counted():
    assert Operations(FLAT, CoarseToFine()).count(IMAGE) is None
    assert Operations(FLAT, None).count(IMAGE) is None


def test_a_network_that_does_not_take_the_windows_is_an_error():
    with pytest.raises(ValueError, match="does not take an input"):
        Operations(nn.Conv3d(2, 3, 1), SubVolumes(16)).count(IMAGE)


def test_the_network_stays_as_it_was():
    before = {name: tensor.clone() for name, tensor in SOLID.state_dict().items()}
    Operations(SOLID, SubVolumes(16)).count(IMAGE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in SOLID.state_dict().items())
    assert not SOLID._forward_hooks and next(SOLID.parameters()).device.type == "cpu"
