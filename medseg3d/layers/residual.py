"""The convolutional half of UNETR and Swin UNETR: pairs of 3^n convolutions, with and without a shortcut, and what
upsamples between them. Hatamizadeh et al., "UNETR", WACV 2022, section 3.2; the blocks are those of He et al., "Deep
residual learning", CVPR 2016. The state_dict keys are those of MONAI 1.6.

Everything runs channels-last, the layout in which transformers leave their tokens and convolutions are fastest.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.convolution import CONV, TRANSPOSED_CONV, NameAndArguments, is_convolution, norm_layer
from medseg3d.layers.derived import Derived, is_hooked, is_plain_eager, must_be_called
from medseg3d.layers.layout import channels_last
from medseg3d.layers.normalization import normalize_and_activate
from medseg3d.layers.upsampling import (
    add_upsampled_conv_,
    add_upsampled_pointwise_,
    doubling,
    merged_pointwise_weight,
    merged_weight,
    mix_channels,
)
from medseg3d.layers.winograd import convolve

SLOPE = 0.01  # of the leaky ReLU
# Merging the upsampling with its convolution pays for wide layers on large grids (measured on CPUs).
MERGE_FROM_VOXELS = 32**3
MERGE_FROM_CHANNELS = 32


def pointwise(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The convolution of kernel and stride 1 in a ``_Named`` on ``x_BC...``, as a matrix product if nobody can tell."""
    conv = _only_conv(layer)
    built = conv is not None and is_convolution(conv, CONV[x.dim() - 2], 1)
    if not built or must_be_called(layer):
        return layer(x)
    return mix_channels(x, conv.weight.flatten(1), conv.bias)


class _Named(nn.Sequential):
    """A layer under the key ``conv``."""

    conv: Any

    def __init__(self, conv: nn.Module) -> None:
        super().__init__(OrderedDict(conv=conv))


def _only_conv(layer: nn.Module) -> Any:
    """What a ``_Named`` holds; None for what was put in its place, or if there is more in it."""
    return layer.conv if type(layer) is _Named and len(layer) == 1 and "forward" not in vars(layer) else None


class ConvBlock(nn.Module):
    """Convolution, norm, leaky ReLU, convolution, norm, a shortcut where ``residual``, leaky ReLU.

    Where the shape changes, the shortcut has a 1^n convolution and a norm of its own.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        norm: what ``norm_layer`` takes.
        residual: whether there is a shortcut.
        stride: of the first convolution, and of the shortcut's.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        norm: NameAndArguments,
        residual: bool,
        stride: int = 1,
    ) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        self.conv1 = _Named(conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False))
        self.norm1 = norm_layer(norm, out_channels, spatial_dims)
        self.conv2 = _Named(conv(out_channels, out_channels, 3, padding=1, bias=False))
        self.norm2 = norm_layer(norm, out_channels, spatial_dims)
        self.residual = residual
        self.stride = stride
        self.projects = residual and (in_channels != out_channels or stride != 1)
        if self.projects:
            self.conv3 = _Named(conv(in_channels, out_channels, 1, stride=stride, bias=False))
            self.norm3 = norm_layer(norm, out_channels, spatial_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = channels_last(x)
        # PyTorch takes an image of one channel for channels-first.
        return self.finish(channels_last(self.conv1(x)), self.shortcut(x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor | None:
        """What is added in the end, before its norm: ``x`` or a projection of it; None without a shortcut."""
        if not self.projects:
            return x if self.residual else None
        return pointwise(x, self.conv3) if self.stride == 1 else self.conv3(x)

    def finish(self, y: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
        """All that comes after the first convolution, of whose output ``y_BC...`` nothing is left."""
        y = self.conv2(normalize_and_activate(y, self.norm1, SLOPE, block=self))
        if shortcut is not None and self.projects:
            shortcut = normalize_and_activate(shortcut, self.norm3, block=self)
        return normalize_and_activate(y, self.norm2, SLOPE, shortcut, block=self)


class EncoderBlock(nn.Module):
    """A ``ConvBlock`` on a skip's way, under the key ``layer``."""

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, norm: NameAndArguments, residual: bool = True
    ) -> None:
        super().__init__()
        self.layer = ConvBlock(spatial_dims, in_channels, out_channels, norm, residual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class UpBlock(nn.Module):
    """Twice the size, the skip beside it, then a ``ConvBlock``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the coarse input.
        out_channels: channels of the skip and of the output.
        norm: what ``norm_layer`` takes.
        residual: whether the ``ConvBlock`` has a shortcut.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, norm: NameAndArguments, residual: bool = True
    ) -> None:
        super().__init__()
        self.transp_conv = _Named(doubling(spatial_dims, in_channels, out_channels))
        self.conv_block = ConvBlock(spatial_dims, 2 * out_channels, out_channels, norm, residual)
        self._merged_conv, self._merged_shortcut, self._transformed = Derived(), Derived(), Derived()

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """``x_BC...`` and ``skip_BC...``, which is twice as long along each axis."""
        if self._merges(x):
            return self._merged(channels_last(x), channels_last(skip))
        return self.conv_block(torch.cat([self.transp_conv(channels_last(x)), channels_last(skip)], dim=1))

    def _merges(self, x: torch.Tensor) -> bool:
        large = prod(x.shape[2:]) >= MERGE_FROM_VOXELS
        if not (large and x.device.type == "cpu" and is_plain_eager()) or is_hooked(self):
            return False
        return self._is_built(x.dim() - 2) and self.conv_block.conv1.conv.out_channels >= MERGE_FROM_CHANNELS

    def _is_built(self, axes: int) -> bool:
        """Whether the convolutions that are merged are those that were built here."""
        block = self.conv_block
        if type(block) is not ConvBlock or "forward" in vars(block):
            return False
        ours = is_convolution(_only_conv(self.transp_conv), TRANSPOSED_CONV[axes], 2, 2, bias=False)
        ours = ours and is_convolution(_only_conv(block.conv1), CONV[axes], 3, padding=1, bias=False)
        return ours and (not block.residual or is_convolution(_only_conv(block.conv3), CONV[axes], 1, bias=False))

    def _convolve(self, skip: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if skip.dim() == 4:
            return F.conv2d(skip, weight, padding=1)
        return convolve(skip, weight, None, self._transformed)

    def _merged(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """The same with the upsampling merged into the convolutions; both are linear, so the skip's share is added."""
        block, channels = self.conv_block, skip.shape[1]
        up, conv = self.transp_conv.conv.weight, block.conv1.conv.weight
        y = self._convolve(skip, conv[:, channels:])
        add_upsampled_conv_(y, x, self._merged_conv(lambda u, c: merged_weight(u, c[:, :channels]), up, conv))
        if not block.residual:
            return block.finish(y, None)
        projection = block.conv3.conv.weight
        shortcut = mix_channels(skip, projection[:, channels:].flatten(1))
        merged = self._merged_shortcut(lambda u, c: merged_pointwise_weight(u, c[:, :channels]), up, projection)
        return block.finish(y, add_upsampled_pointwise_(shortcut, x, merged))


class ProjectionUpBlock(nn.Module):
    """Tokens of the transformer to a skip: twice the size, and ``num_layer`` times more, each time with a
    ``ConvBlock``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_layer: how often the size is doubled again.
        norm: what ``norm_layer`` takes.
        conv_block: whether each further doubling is followed by a ``ConvBlock``.
        residual: whether that has a shortcut.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        num_layer: int,
        norm: NameAndArguments,
        conv_block: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()

        def stage() -> nn.Module:
            up = _Named(doubling(spatial_dims, out_channels, out_channels))
            if not conv_block:
                return up
            return nn.Sequential(up, ConvBlock(spatial_dims, out_channels, out_channels, norm, residual))

        self.transp_conv_init = _Named(doubling(spatial_dims, in_channels, out_channels))
        self.blocks = nn.ModuleList(stage() for _ in range(num_layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.transp_conv_init(channels_last(x))
        for block in self.blocks:
            x = block(x)
        return x


class OutBlock(nn.Module):
    """The head: a convolution of kernel 1 to one logit a class."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _Named(CONV[spatial_dims](in_channels, out_channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pointwise(x, self.conv)
