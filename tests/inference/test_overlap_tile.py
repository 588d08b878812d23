"""Tiles of networks without padding: seamless, mirrored at the edges, for any size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from medseg3d.inference import OverlapTile
from medseg3d.networks.unet import ronneberger_unet


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_stored_mirror_padding(shared):
    stored = np.load(shared("golden", "2d", "equations") / "unet.npz")
    x = torch.from_numpy(stored["mirror_in"])
    seen = []
    OverlapTile((17, 15), (9, 7))(x[None, None], lambda tile: seen.append(tile) or tile[..., 4:-4, 4:-4])
    np.testing.assert_array_equal(seen[0][0, 0], stored["mirror_out"])


@pytest.mark.parametrize("size", [(20, 30), (4, 4), (1, 7), (13, 8), (3, 50)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_seams(size, batch_size):
    """Valid convolutions of tiles are those of the whole mirrored image."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).double().eval()
    image = noise(2, 2, *size).double()
    rows, columns = (torch.from_numpy(np.pad(np.arange(n), 2, mode="reflect")) for n in size)
    expected = network(image[:, :, rows][..., columns])
    strategy = OverlapTile(12, 8, batch_size)
    found = strategy(image, network)
    torch.testing.assert_close(found, expected.float())
    assert (strategy.label_map(image, network)[:, 0] == expected.argmax(1)).all()


def test_the_papers_network_and_three_axes():
    network = ronneberger_unet(channels=(4, 4, 4, 4, 4), padding="valid").eval()
    calls = []
    network.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    strategy = OverlapTile(204, 20)
    assert strategy(noise(1, 1, 45, 18), network).shape == (1, 2, 45, 18)
    assert len(calls) == strategy.count((45, 18)) == 3
    volume = noise(1, 1, 5, 9, 6)
    torch.testing.assert_close(OverlapTile((6, 4, 8), (4, 4, 2))(volume, lambda x: x[:, :, 1:-1, :, 3:-3]), volume)


@pytest.mark.parametrize(
    ("tile", "output", "message"),
    [
        (10, 12, "as large as its tile or an even number of voxels smaller"),
        (10, 7, "even number"),
        ((10, 8), (8, 0), "even number"),
    ],
)
def test_sizes_that_do_not_fit(tile, output, message):
    with pytest.raises(ValueError, match=message):
        OverlapTile(tile, output)


def test_a_network_that_gives_something_else():
    message = re.escape("tiles of 12 must give logits (1, K, 8, 8), the network gave (1, 1, 12, 12): set output_size")
    with pytest.raises(ValueError, match=message):
        OverlapTile(12, 8)(noise(1, 1, 20, 20), lambda x: x)
    with pytest.raises(ValueError, match="for 3 spatial axes, but the image has 2"):
        OverlapTile((12, 12, 12), 8)(noise(1, 1, 20, 20), lambda x: x)
