"""Deformable convolution in 2D.

Version 1: Dai et al., "Deformable Convolutional Networks", ICCV 2017, equation 2: every tap of the kernel looks at a
place of its own, moved by a predicted offset. Version 2: Zhu et al., "Deformable ConvNets v2", CVPR 2019, equation 1:
what it finds there is scaled by a predicted mask too.

Shape legend: ``x_BIHW`` is the input, ``offset_B(2GK)QR`` the offsets of the K taps for each of G groups of channels,
(Q, R) the size of the output. Arguments and keys are torchvision's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

Pair = int | tuple[int, int]


def deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolution whose taps look where ``offset`` says, bilinearly, with zeros outside the image.

    Taps are computed one after the other, so that the memory is that of one input at the size of the output and not of
    all taps; gradients reach every tensor. Places are computed in float32 at least, whatever the input is: in half
    precision they would be whole voxels off beyond the 256th.

    Args:
        input: (B, I, H, W).
        offset: (B, 2 * G * kh * kw, Q, R) in voxels of the input: for each group of channels and each tap, in the
            kernel's row-major order, first the offset along H, then the one along W. G divides I.
        weight: (O, I / groups, kh, kw).
        bias: (O,).
        stride, padding, dilation: one number or one an axis.
        mask: (B, G * kh * kw, Q, R), version 2's factors; none are version 1.

    Returns:
        (B, O, Q, R).

    Raises:
        ValueError: on shapes that do not fit together.
    """
    steps, edges, spread = _pair(stride), _pair(padding), _pair(dilation)
    offset_groups = _check(input, offset, weight, steps, edges, spread, mask)
    batch, inputs, height, width = input.shape
    rows, columns = offset.shape[2:]
    groups = inputs // weight.shape[1]
    grouped = _in_full_precision(input).reshape(batch * offset_groups, inputs // offset_groups, height, width)
    offset = _in_full_precision(offset).unflatten(1, (offset_groups, -1, 2)).flatten(0, 1)
    if mask is not None:
        mask = mask.unflatten(1, (offset_groups, -1)).flatten(0, 1)
    first_row = torch.arange(rows, device=input.device) * steps[0] - edges[0]
    first_column = torch.arange(columns, device=input.device) * steps[1] - edges[1]
    result = None if bias is None else bias.view(1, -1, 1, 1)
    for tap, (i, j) in enumerate(_taps(weight)):
        y = offset[:, tap, 0] + (first_row + i * spread[0]).view(-1, 1)
        x = offset[:, tap, 1] + first_column + j * spread[1]
        found = _sample(grouped, y, x).to(input.dtype)
        if mask is not None:
            found = found * mask[:, tap, None]
        found = found.reshape(batch, inputs, rows, columns)
        term = F.conv2d(found, weight[:, :, i, j, None, None], groups=groups)
        result = term if result is None else result + term
    assert result is not None
    return result


def _taps(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(weight.shape[2]) for j in range(weight.shape[3]))


def _sample(x: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Values (N, C, Q, R) of ``x_NCHW`` at rows and columns (N, Q, R), in voxels."""
    height, width = x.shape[2:]
    # Sizes of 1 would divide by zero; without aligned corners the scale is that of voxels' edges.
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    # Autocast leaves values and grid as they are where both are of float32.
    return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)


def _in_full_precision(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    x: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: torch.Tensor | None,
) -> int:
    """The number of groups of channels that the offsets stand for."""
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"a deformable convolution takes images (B, I, H, W), got {tuple(x.shape)}")
    if x.shape[1] % weight.shape[1] or weight.shape[0] % (x.shape[1] // weight.shape[1]):
        raise ValueError(
            f"a weight of {tuple(weight.shape)} does not fit an input of {x.shape[1]} channels: the channels must be a "
            "multiple of the weight's second axis, and its first axis a multiple of that number of groups"
        )
    size = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    expected = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in size)
    taps = weight.shape[2] * weight.shape[3]
    groups, rest = divmod(offset.shape[1], 2 * taps)
    if rest or not groups or x.shape[1] % groups:
        raise ValueError(
            f"offsets of {taps} taps have 2 * {taps} channels for each group of the input's {x.shape[1]} channels, "
            f"got {offset.shape[1]}"
        )
    for name, tensor, channels in (("offset", offset, 2 * groups * taps), ("mask", mask, groups * taps)):
        if tensor is not None and tuple(tensor.shape) != (len(x), channels, *expected):
            raise ValueError(f"{name} must be {(len(x), channels, *expected)}, got {tuple(tensor.shape)}")
    return groups


class DeformConv2d(nn.Module):
    """``deform_conv2d`` with its weights; offsets (and mask) come with the input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups ({groups}) must divide in_channels ({in_channels}) and out_channels ({out_channels})"
            )
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=bias)
        self.weight = conv.weight
        self.bias = conv.bias

    def forward(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
