"""Receptive fields and grids: the published numbers, and what gradients of networks show."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from medseg3d.layers.sampling import Sampling, receptive_field
from medseg3d.layers.upsampling import BilinearUpsampling
from medseg3d.networks.backbones.alexnet import CaffeNet
from medseg3d.networks.backbones.googlenet import GoogLeNet
from medseg3d.networks.backbones.vgg import vgg16
from medseg3d.networks.fcn_trunks import TRUNKS


def reached(layers, size=64, channels=1):
    """Pixels with a gradient: of an entry in the middle of the output, as (entry, first pixel, last pixel)."""
    network = nn.Sequential(*layers).double()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1.0)
    x = torch.zeros(1, channels, size, size, dtype=torch.double, requires_grad=True)
    y = network(x)
    entry = y.shape[2] // 2
    y[0, 0, entry, entry].backward()
    pixels = x.grad[0].sum(0).any(0).nonzero()
    return entry, int(pixels.min()), int(pixels.max())


LAYERS = {
    "conv": [nn.Conv2d(1, 1, 5, stride=2, padding=1)],
    "dilated": [nn.Conv2d(1, 1, 3, dilation=3, padding=2), nn.Conv2d(1, 1, 2, stride=3)],
    "pooled": [nn.Conv2d(1, 1, 3), nn.AvgPool2d(3, stride=2, padding=1), nn.ReLU(), nn.AvgPool2d(2)],
    "nested": [nn.Sequential(nn.Conv2d(1, 1, 4, stride=2), nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3)))],
}


@pytest.mark.parametrize("name", LAYERS)
def test_grid_and_field_are_those_that_gradients_show(name):
    sampling = Sampling().through(*LAYERS[name])
    entry, first, last = reached(LAYERS[name])
    assert last - first + 1 == sampling.field == receptive_field(LAYERS[name])
    assert Fraction(first + last, 2) == sampling.first + entry * sampling.step


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 2, 0), (3, 2, 0), (16, 8, 4), (2, 2, 0), (63, 32, 0)])
def test_transposed_convolutions(kernel, stride, padding):
    """A constant slope stays that slope on the new grid."""
    down = nn.AvgPool2d(stride)
    coarse = Sampling().through(down)
    fine = coarse.transposed(kernel, stride, padding)
    up = nn.ConvTranspose2d(1, 1, kernel, stride, padding)
    assert Sampling().through(down, up) == fine
    ramp = torch.arange(12 * stride, dtype=torch.double).expand(1, 1, 12 * stride, -1)
    if kernel in (2 * stride, 2 * stride - 1):
        layer = BilinearUpsampling(1, kernel, stride).double()
        y = layer(down(ramp))[0, 0, 4 * stride]
        inner = slice(3 * stride, 9 * stride)
        expected = float(fine.first) - padding * float(fine.step) + torch.arange(len(y)) * float(fine.step)
        torch.testing.assert_close(y[inner], expected[inner].double())


def test_published_receptive_fields():
    trunks = {name: receptive_field(build(3, 1.0, 0.5).layers.values()) for name, build in TRUNKS.items()}
    assert (trunks["alexnet"], trunks["vgg16"], trunks["vgg16_bn"]) == (355, 404, 404)
    assert receptive_field(CaffeNet().features) == 195
    assert receptive_field(vgg16(init_weights=False).features) == 212
    # The paper's 907 counts the pooling over 7x7 that its FCN-GoogLeNet leaves out.
    inception5b = TRUNKS["googlenet"](3, 1.0, 0.5).layers.values()
    assert receptive_field(inception5b) == 715
    assert receptive_field([*inception5b, nn.AvgPool2d(7)]) == 907
    whole = GoogLeNet(aux_logits=False, init_weights=False, published=True)
    assert receptive_field(whole) == 715


def test_offsets():
    image, pooled = Sampling(), Sampling().windowed(2, 2)
    assert image.padded(3).offset_of(image) == 3 and image.offset_of(image.padded(3)) == -3
    assert not pooled.meets(image) and not pooled.transposed(3, 2).meets(image) and pooled.transposed(4, 2).meets(image)
    with pytest.raises(ValueError, match="do not coincide"):
        pooled.transposed(3, 2).offset_of(image)


def test_layers_that_cannot_be_followed_are_refused():
    with pytest.raises(ValueError, match="must be one number for all axes"):
        receptive_field(nn.Conv2d(1, 1, (3, 5)))
    branches = nn.ModuleDict({"branch1": nn.Conv2d(1, 1, 3), "branch2": nn.Conv2d(1, 1, 3, padding=1)})
    with pytest.raises(ValueError, match="the branches of ModuleDict give maps on different grids"):
        receptive_field(branches)
