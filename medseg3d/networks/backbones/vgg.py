"""VGG: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015, in the
form that torchvision has of it, with or without batch norm, with its keywords and state_dict keys.

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medseg3d.networks.backbones.stages import check_images

# Widths of the convolutions between two poolings.
Widths = Sequence[Sequence[int]]
VGG11: Widths = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG13: Widths = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
VGG16: Widths = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
VGG19: Widths = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class VGG(nn.Module):
    """3x3 convolutions with five poolings, pooling to 7x7, three fully connected layers.

    Args:
        features: the convolutions, as ``make_layers`` makes them.
        num_classes: classes, one logit each.
        init_weights: He's normal initial weights; without it PyTorch's, which take less time.
        dropout: probability of dropout behind each of the first two fully connected layers.
    """

    smallest = 32

    def __init__(
        self, features: nn.Sequential, num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.features = features
        convs = [layer for layer in features if isinstance(layer, nn.Conv2d)]
        self.in_channels = convs[0].in_channels
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(convs[-1].out_channels * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        if init_weights:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's normal initial weights of convolutions, small ones of the fully connected layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of ``x_BCHW``, of at least 32x32 pixels."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_channels, "VGG", self.smallest)
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def make_layers(widths: Widths, batch_norm: bool = False, in_channels: int = 3) -> nn.Sequential:
    """Convolutions of these widths, each with a ReLU, and a pooling behind each group of them."""
    layers: list[nn.Module] = []
    for group in widths:
        for width in group:
            layers.append(nn.Conv2d(in_channels, width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            in_channels = width
        layers.append(nn.MaxPool2d(2, stride=2))
    return nn.Sequential(*layers)


def _vgg(widths: Widths, batch_norm: bool, in_channels: int = 3, **arguments: Any) -> VGG:
    return VGG(make_layers(widths, batch_norm, in_channels), **arguments)


def vgg11(**arguments: Any) -> VGG:
    """132,863,336 parameters; ``arguments`` are ``in_channels`` and those of ``VGG`` but the first, here and below."""
    return _vgg(VGG11, batch_norm=False, **arguments)


def vgg11_bn(**arguments: Any) -> VGG:
    """132,868,840 parameters."""
    return _vgg(VGG11, batch_norm=True, **arguments)


def vgg13(**arguments: Any) -> VGG:
    """133,047,848 parameters."""
    return _vgg(VGG13, batch_norm=False, **arguments)


def vgg13_bn(**arguments: Any) -> VGG:
    """133,053,736 parameters."""
    return _vgg(VGG13, batch_norm=True, **arguments)


def vgg16(**arguments: Any) -> VGG:
    """138,357,544 parameters."""
    return _vgg(VGG16, batch_norm=False, **arguments)


def vgg16_bn(**arguments: Any) -> VGG:
    """138,365,992 parameters."""
    return _vgg(VGG16, batch_norm=True, **arguments)


def vgg19(**arguments: Any) -> VGG:
    """143,667,240 parameters."""
    return _vgg(VGG19, batch_norm=False, **arguments)


def vgg19_bn(**arguments: Any) -> VGG:
    """143,678,248 parameters."""
    return _vgg(VGG19, batch_norm=True, **arguments)
