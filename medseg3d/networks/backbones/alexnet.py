"""AlexNet: ``AlexNet`` is torchvision's, Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv 1404.5997, with its keywords and state_dict keys; ``CaffeNet`` is the one-column form of Krizhevsky, Sutskever and
Hinton, "ImageNet classification with deep convolutional neural networks", NeurIPS 2012, that Caffe trains.

They differ: torchvision's has widths of 64, 192, 384, 256 and 256, padding, neither groups nor response norms.

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from medseg3d.layers.normalization import LocalResponseNorm
from medseg3d.networks.backbones.stages import check_images


class AlexNet(nn.Module):
    """Five convolutions, pooling to 6x6, three fully connected layers.

    Args:
        num_classes: classes, one logit each.
        dropout: probability of dropout before each of the first two fully connected layers.
        in_channels: channels of the images, of at least 63x63 pixels.
    """

    smallest = 63

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, *, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of ``x_BCHW``."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_channels, "AlexNet", self.smallest)
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def alexnet(**arguments: Any) -> AlexNet:
    """61,100,840 parameters; ``arguments`` are those of ``AlexNet``."""
    return AlexNet(**arguments)


class CaffeNet(nn.Module):
    """The reference network of Caffe, for BGR images minus their mean colour; its layers have Caffe's names.

    It pools before it normalises, AlexNet as published the other way round. Pools round up, as Caffe's do.

    Args:
        num_classes: classes, one logit each.
        dropout: probability of dropout behind each of the first two fully connected layers.
        in_channels: channels of the images, of at least 39x39 pixels without ``padding``; the paper's are 227x227.
        padding: zeros around the image; FCN-AlexNet has 100.
        norm_first: normalise before pooling, as published.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        in_channels: int = 3,
        padding: int = 0,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.smallest = in_channels, max(1, 39 - 2 * padding)

        def pool_and_norm(number: int) -> list[tuple[str, nn.Module]]:
            pair: list[tuple[str, nn.Module]] = [
                (f"pool{number}", nn.MaxPool2d(3, stride=2, ceil_mode=True)),
                (f"norm{number}", LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)),
            ]
            return pair[::-1] if norm_first else pair

        layers: list[tuple[str, nn.Module]] = [
            ("conv1", nn.Conv2d(in_channels, 96, 11, stride=4, padding=padding)),
            ("relu1", nn.ReLU(inplace=True)),
            *pool_and_norm(1),
            ("conv2", nn.Conv2d(96, 256, 5, padding=2, groups=2)),
            ("relu2", nn.ReLU(inplace=True)),
            *pool_and_norm(2),
            ("conv3", nn.Conv2d(256, 384, 3, padding=1)),
            ("relu3", nn.ReLU(inplace=True)),
            ("conv4", nn.Conv2d(384, 384, 3, padding=1, groups=2)),
            ("relu4", nn.ReLU(inplace=True)),
            ("conv5", nn.Conv2d(384, 256, 3, padding=1, groups=2)),
            ("relu5", nn.ReLU(inplace=True)),
            ("pool5", nn.MaxPool2d(3, stride=2, ceil_mode=True)),
        ]
        self.features = nn.Sequential(OrderedDict(layers))
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))  # nothing to do at 227x227
        self.classifier = nn.Sequential(
            OrderedDict(
                fc6=nn.Linear(256 * 6 * 6, 4096),
                relu6=nn.ReLU(inplace=True),
                drop6=nn.Dropout(dropout),
                fc7=nn.Linear(4096, 4096),
                relu7=nn.ReLU(inplace=True),
                drop7=nn.Dropout(dropout),
                fc8=nn.Linear(4096, num_classes),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of ``x_BCHW``."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_channels, "CaffeNet", self.smallest)
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))
