"""What is no batch of images, and networks that give no logits: every strategy says so in words."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from medseg3d.inference import CoarseToFine, Downsampled, OverlapTile, Slices, SubVolumes

STRATEGIES = {
    "sub_volumes": SubVolumes(4),
    "sub_volumes with a crop": SubVolumes(4, crop=lambda image: tuple(slice(0, n) for n in image.shape[1:])),
    "slices": Slices(),
    "three axes": Slices((0, 1, 2)),
    "downsampled": Downsampled((4, 4, 4)),
    "overlap_tile": OverlapTile(8, 4),
    "coarse_to_fine": CoarseToFine(),
}
WAYS = {
    "logits": lambda strategy, *given: strategy(*given),
    "labels": lambda strategy, *given: strategy.label_map(*given),
    "slabs": lambda strategy, *given: list(strategy.slabs(*given)),
}
IMAGE = torch.zeros(1, 1, 8, 8, 8)


def two_classes(window):
    return torch.cat([window, window], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE[:0], "one image or more, got a batch of shape (0, 1, 8, 8, 8)"),
        (IMAGE[0, 0, 0], "spatial axes or more, got (8, 8): image[None] adds an axis in front"),
        (
            IMAGE.numpy(),
            "must be a tensor (batch, channels, ...), got a numpy.ndarray: torch.as_tensor(image) makes one",
        ),
        (None, "must be a tensor (batch, channels, ...), got a builtins.NoneType"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(name, way, image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WAYS[way](STRATEGIES[name], image, two_classes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_network_that_returns_nothing_is_refused(name, way):
    with pytest.raises(ValueError, match="NoneType"):
        WAYS[way](STRATEGIES[name], IMAGE, lambda window: None)


@pytest.mark.parametrize("way", WAYS)
def test_a_forgotten_axis_is_told_where_the_network_takes_what_is_left(way):
    """A convolution of PyTorch takes one window for many channels and gives as many windows as classes."""
    network = nn.Conv3d(1, 3, 3, padding=1).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"as many windows and axes.*\(batch, channels, \.\.\.\)"):
        WAYS[way](SubVolumes(4), IMAGE[0], network)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda window: window.flatten(2), "as many windows and axes"),
        (lambda window: window[0], "as many windows and axes"),
        (lambda window: (window, 3), "got one of type int"),
        (lambda window: {"logits": None}, "got one of type NoneType"),
    ],
)
def test_outputs_that_cannot_be_put_together_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        SubVolumes(4)(IMAGE, network)
