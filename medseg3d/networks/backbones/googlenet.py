"""GoogLeNet: Szegedy et al., "Going deeper with convolutions", CVPR 2015, in the form that torchvision has of it, with
its keywords and state_dict keys.

That form has batch norm instead of biases and response norms, 3x3 kernels where the paper has 5x5, and a last pooling
of 2x2 instead of 3x3. With ``published`` it is the paper's.

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.normalization import LocalResponseNorm
from medseg3d.networks.backbones.stages import check_images

# Per colour: mean and standard deviation of ImageNet's images, which torchvision's inputs are normalised with.
IMAGENET_STATISTICS = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))


class GoogLeNetOutputs(NamedTuple):
    """Logits (B, num_classes): of the network, and of its heads at inception4d and inception4a."""

    logits: torch.Tensor
    aux_logits2: torch.Tensor
    aux_logits1: torch.Tensor


class GoogLeNet(nn.Module):
    """Nine inception modules behind three convolutions.

    Args:
        num_classes: classes, one logit each.
        aux_logits: two more heads, for training: there the network returns ``GoogLeNetOutputs``. In eval mode they do
            nothing.
        transform_input: the images are normalised with ImageNet's statistics; bring them to the range -1 to 1 that the
            public weights were trained with.
        init_weights: initial weights of the paper's successor (truncated normal of 0.01), else PyTorch's.
        dropout: probability of dropout before the last layer.
        dropout_aux: the same in the other two heads.
        in_channels: channels of the images; 3 if ``transform_input``. They have at least 15x15 pixels, 31x31 if
            ``published``.
        published: the paper's kernels, pooling, biases and response norms, without batch norm.

    Raises:
        ValueError: ``transform_input`` with other channels than 3; in ``forward``, another shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        *,
        in_channels: int = 3,
        published: bool = False,
    ) -> None:
        super().__init__()
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input is for images of 3 colours, got in_channels={in_channels}")
        self.aux_logits, self.transform_input, self.in_channels = aux_logits, transform_input, in_channels
        self.smallest = 31 if published else 15

        def inception(*widths: int) -> Inception:
            return Inception(*widths, published=published)

        def response_norm() -> nn.Module:
            return LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) if published else nn.Identity()

        self.conv1 = BasicConv2d(in_channels, 64, 7, stride=2, padding=3, norm=not published)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = response_norm()
        self.conv2 = BasicConv2d(64, 64, 1, norm=not published)
        self.conv3 = BasicConv2d(64, 192, 3, padding=1, norm=not published)
        self.norm2 = response_norm()
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(3 if published else 2, stride=2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = InceptionAux(512, num_classes, dropout_aux, norm=not published) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux, norm=not published) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        if init_weights:
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor | GoogLeNetOutputs:
        """Logits (B, num_classes) of ``x_BCHW``; in training with ``aux_logits`` those of all three heads."""
        check_images(x, self.in_channels, "GoogLeNet", self.smallest)
        x = to_inception_range(x) if self.transform_input else x
        x = self.norm1(self.maxpool1(self.conv1(x)))
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x4a = self.inception4a(x)
        x4d = self.inception4d(self.inception4c(self.inception4b(x4a)))
        x = self.maxpool4(self.inception4e(x4d))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        if self.training and self.aux1 is not None and self.aux2 is not None:
            return GoogLeNetOutputs(logits, self.aux2(x4d), self.aux1(x4a))
        return logits


def googlenet(**arguments: Any) -> GoogLeNet:
    """13,004,888 parameters, 6,624,904 without the two further heads; ``arguments`` are those of ``GoogLeNet``."""
    return GoogLeNet(**arguments)


def to_inception_range(x: torch.Tensor) -> torch.Tensor:
    """``x_BCHW`` normalised with ImageNet's statistics -> normalised with 0.5 and 0.5."""
    mean, std = x.new_tensor(IMAGENET_STATISTICS).T.view(2, 3, 1, 1).unbind()
    return x * (std / 0.5) + (mean - 0.5) / 0.5


class BasicConv2d(nn.Module):
    """A convolution with batch norm, or with a bias where ``norm`` is False, and a ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, norm: bool = True, **conv: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=not norm, **conv)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """A 1x1, a 3x3, a 5x5 convolution and a pooling side by side, their channels concatenated.

    Args:
        in_channels: channels of the input.
        ch1x1: of the first branch.
        ch3x3red, ch3x3: of the second, before and behind its 3x3 convolution.
        ch5x5red, ch5x5: of the third.
        pool_proj: of the fourth.
        published: a 5x5 convolution in the third branch, not a 3x3 one; biases, not batch norm.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        *,
        published: bool = False,
    ) -> None:
        super().__init__()
        norm = not published
        edge = 5 if published else 3
        self.branch1 = BasicConv2d(in_channels, ch1x1, 1, norm=norm)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, ch3x3red, 1, norm=norm), BasicConv2d(ch3x3red, ch3x3, 3, padding=1, norm=norm)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, ch5x5red, 1, norm=norm),
            BasicConv2d(ch5x5red, ch5x5, edge, padding=edge // 2, norm=norm),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), BasicConv2d(in_channels, pool_proj, 1, norm=norm)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class InceptionAux(nn.Module):
    """A classifier on an inner map, for training; (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.7, *, norm: bool = True) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, 1, norm=norm)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4)))
        x = F.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(self.dropout(x))
