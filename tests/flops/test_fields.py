"""How far networks see, against published numbers, the formula for chains, and what gradients show."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.flops import receptive_field
from medseg3d.layers import sampling
from medseg3d.networks import SwinUNETR, UNet, VNet, cicek_unet, fcn_resnet50
from medseg3d.networks.detection.mask_rcnn import MaskRCNN
from medseg3d.networks.fcn_trunks import TRUNKS


@pytest.mark.parametrize(
    ("backbone", "field"), [("alexnet", 355), ("vgg16", 404), ("googlenet", 715), ("googlenet with its pooling", 907)]
)
def test_published_receptive_fields(backbone, field):
    layers = list(TRUNKS[backbone.partition(" ")[0]](3, 1.0, 0.5).layers.values())
    if backbone.endswith("pooling"):
        layers.append(nn.AvgPool2d(7, 1))
    found = receptive_field(nn.Sequential(*layers), (1, 3, 256, 320))
    assert found.field == (field, field) == (sampling.receptive_field(layers),) * 2
    assert found.coarsest == (32, 32) and found.because == ""


class Skips(nn.Module):
    """Crops, skips, interpolation, unequal axes and a matrix product of channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, (3, 5), padding=(1, 2))
        self.down = nn.Conv2d(2, 4, 3, stride=(2, 3), dilation=(2, 1), padding=(2, 1))
        self.mix = nn.Linear(4, 2)
        self.up = nn.ConvTranspose2d(2, 2, (3, 4), stride=(2, 3), padding=(1, 0))

    def forward(self, x):
        x = self.first(F.pad(x, (1, 0, 2, 1)))[:, :, 1:, :-1]
        low = self.mix(self.down(x).transpose(1, 2).transpose(-1, 2)).movedim(-1, 1)
        up = self.up(F.avg_pool2d(low, 3, 1, 1))
        rows, columns = min(x.shape[2], up.shape[2]), min(x.shape[3], up.shape[3])
        return torch.cat([x[:, :, :rows, :columns], up[:, :, :rows, :columns] * 2], dim=1)


NETWORKS = {
    "skips": (Skips(), (1, 1, 96, 96)),
    "u-net": (UNet(2, 1, 1, channels=(2, 2, 2), norm=None), (1, 1, 128, 128)),
    "valid": (UNet(2, 1, 1, channels=(2, 2, 2), norm=None, padding="valid"), (1, 1, 124, 124)),
    "nearest": (
        nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3)),
        (1, 1, 32, 32),
    ),
    "linear": (nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=4, mode="bilinear")), (1, 1, 48, 48)),
    "aligned": (
        nn.Sequential(nn.Conv2d(1, 1, 2, 3), nn.Upsample((50, 43), mode="bilinear", align_corners=True)),
        (1, 1, 60, 60),
    ),
    "odd factors": (nn.Sequential(nn.AvgPool2d(2), nn.Upsample((45, 75), mode="bilinear")), (1, 1, 60, 60)),
    "pools": (nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), nn.MaxPool2d(2, dilation=3)), (1, 1, 64, 64)),
}


def shown_by_gradients(network, shape):
    """The widest field of the entries in the middle of the output, along each axis."""
    network = network.double().eval()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1.0)
    # All alike in every window of a pooling: a rising image shows one voxel of it, a falling one another.
    spans = []
    for direction in (1, -1):
        ramp = torch.arange(shape[2], dtype=torch.double) * direction + 1000
        x = (ramp[:, None] + ramp[: shape[3]]).expand(shape).clone().requires_grad_()
        y = network(x)
        middle = [n // 2 for n in y.shape[2:]]
        for entry in [(middle[0] + i, middle[1] + j) for i in range(-6, 6) for j in range(-6, 6)]:
            (gradient,) = torch.autograd.grad(y[0][(slice(None), *entry)].sum(), x, retain_graph=True)
            seen = gradient[0, 0].nonzero()
            spans.append((entry, seen.amin(0).tolist(), seen.amax(0).tolist()))
    widest = [0, 0]
    for entry in {entry for entry, *_ in spans}:
        for axis in (0, 1):
            first = min(low[axis] for at, low, _ in spans if at == entry)
            last = max(high[axis] for at, _, high in spans if at == entry)
            widest[axis] = max(widest[axis], last - first + 1)
    return tuple(widest)


@pytest.mark.parametrize("name", NETWORKS)
def test_fields_are_those_that_gradients_show(name):
    network, shape = NETWORKS[name]
    assert receptive_field(network, shape).field == shown_by_gradients(network, shape)


def test_volumes():
    found = receptive_field(cicek_unet(1, 2), (1, 1, 32, 32, 16))
    # 68 voxels at the bottom, and between 3 and 5 entries of step 8 are met by the four convolutions on the way up.
    assert found.field == (68 + 4 * 8,) * 3
    assert found.stride == (1, 1, 1) and found.coarsest == (8, 8, 8)
    strides = receptive_field(UNet(3, 1, 1, channels=(2, 2, 2), strides=(2, (2, 2, 1))), (1, 1, 16, 16, 16))
    assert strides.coarsest == (4, 4, 2) and strides.field[2] < strides.field[0] == strides.field[1]
    assert receptive_field(VNet(3, 1, 2, width=2), (1, 1, 32, 32, 32)).field[0] > 372


def test_stride_of_a_trunk():
    trunk = receptive_field(nn.Sequential(nn.Conv3d(1, 2, 3, 2, 1), nn.MaxPool3d(3, 3)), (1, 1, 36, 36, 36))
    assert trunk.stride == trunk.coarsest == (6, 6, 6) and trunk.field == (7, 7, 7)
    up = nn.Sequential(nn.Conv2d(1, 1, 3, 3), nn.ConvTranspose2d(1, 1, 2, 2))
    assert receptive_field(up, (1, 1, 36, 36)).stride == (Fraction(3, 2),) * 2


def test_what_sees_everything_says_why():
    swin = receptive_field(SwinUNETR(1, 2, feature_size=12), (1, 1, 64, 64, 64))
    assert swin.field == (None,) * 3 and swin.because == "making tokens of voxels"
    gate = nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1))
    assert receptive_field(gate, (1, 1, 16, 16)).because == "a mean of all voxels"
    sixteen = nn.Sequential(nn.Flatten(2), nn.Linear(256, 256), nn.Unflatten(2, (16, 16)))
    assert receptive_field(sixteen, (1, 1, 16, 16)).field == (None, None)


def test_norms_see_a_voxel_alone_and_dropout_nothing():
    norms = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.Dropout2d(), nn.GroupNorm(2, 4), nn.PReLU(4))
    assert receptive_field(norms.train(), (1, 1, 16, 16)).field == (3, 3) and norms.training


def test_writing_into_a_part_is_not_overlooked():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 1
            y[:, :1].add_(F.avg_pool2d(x[:, :1], 5, 1, 2))
            return y

    found = receptive_field(Writes(), (1, 2, 16, 16))
    assert found.field == (None, None) and found.because == "writing into a part of a tensor"


def test_pictures_and_sizes_that_cannot_be_followed():
    with pytest.raises(ValueError, match="ask it of its backbone"):
        receptive_field(MaskRCNN("resnet18", num_classes=2, min_size=64), (1, 3, 64, 64))
    with pytest.raises(ValueError, match="the next size that it takes"):
        receptive_field(UNet(channels=(2, 2)), (1, 1, 9, 8, 8))
    assert receptive_field(fcn_resnet50(num_classes=2), (1, 3, 64, 64)).coarsest == (8, 8)
