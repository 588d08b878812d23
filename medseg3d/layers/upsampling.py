"""Maps made larger: a transposed convolution, alone or merged with the convolution that follows it, bilinear
interpolation as a layer that may learn, and unpooling.

A transposed convolution of kernel and stride 2 followed by a convolution of kernel 3 is linear as a whole. Each of the
2^n positions of a fine voxel inside its coarse one sees 2^n coarse voxels, so the pair is 2^n convolutions of kernel 2
on the coarse grid: 8 coefficients an output and input channel instead of 27 in 3D, and no tensor at the fine size
between.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.convolution import TRANSPOSED_CONV
from medseg3d.layers.derived import OwnGradient, is_plain_eager, once_differentiable
from medseg3d.layers.layout import MEMORY_FORMAT, channels_last, rows

CONV_FUNCTION = {2: F.conv2d, 3: F.conv3d}
# Of the fine voxel 2 i + position, the tap of the kernel of 3 that meets the coarse voxel i + position - 1 + neighbour
# and which of its two fine voxels that is: {(position, neighbour): ((tap, half), ...)}.
_TAPS = {(0, 0): ((0, 1),), (0, 1): ((1, 0), (2, 1)), (1, 0): ((0, 0), (1, 1)), (1, 1): ((2, 0),)}


def doubling(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A transposed convolution of kernel and stride 2 without bias."""
    return TRANSPOSED_CONV[spatial_dims](in_channels, out_channels, 2, stride=2, bias=False)


def merged_weight(up: torch.Tensor, conv: torch.Tensor) -> torch.Tensor:
    """The 2^n convolutions of kernel 2 that a transposed convolution and a convolution of kernel 3 amount to.

    Args:
        up: weight (I, M, 2, ...) of the transposed convolution.
        conv: weight (O, M, 3, ...) of the convolution after it.

    Returns:
        (2^n * O, I, 2, ...) in the dtype of ``conv``; the position is the slower part of the first axis.
    """
    axes = conv.dim() - 2
    fine, coarse = conv.float(), up.float()
    merged = fine.new_zeros(2**axes, len(fine), len(coarse), *[2] * axes)
    corners = list(itertools.product((0, 1), repeat=axes))
    for (p, position), neighbour in itertools.product(enumerate(corners), corners):
        for pairs in itertools.product(*(_TAPS[pair] for pair in zip(position, neighbour, strict=True))):
            taps, halves = zip(*pairs, strict=True)
            merged[p][_at(neighbour)] += fine[_at(taps)] @ coarse[_at(halves)].T
    return channels_last(merged.flatten(0, 1).to(conv.dtype))


def merged_pointwise_weight(up: torch.Tensor, conv: torch.Tensor) -> torch.Tensor:
    """(2^n * O, I): the same for a convolution of kernel 1, weight (O, M, 1, ...)."""
    fine, coarse = conv.float().flatten(1), up.float()
    corners = itertools.product((0, 1), repeat=up.dim() - 2)
    return torch.cat([fine @ coarse[_at(corner)].T for corner in corners]).to(conv.dtype)


def add_upsampled_conv_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add to ``y_BO...`` what ``merged_weight`` makes of ``x_BI...``, which is half as long along each axis."""
    parts = CONV_FUNCTION[x.dim() - 2](x, weight, padding=1)
    return _AddPositions.apply(y, parts.to(y.dtype), True)


def add_upsampled_pointwise_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add to ``y_BO...`` what ``merged_pointwise_weight`` makes of ``x_BI...``."""
    parts = mix_channels(x, weight)
    return _AddPositions.apply(y, parts.to(y.dtype), False)


def mix_channels(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolution of kernel 1 as one matrix product: ``x_BI...`` and weight (O, I) to (B, O, ...), channels-last."""
    if torch.is_grad_enabled() and is_plain_eager() and x.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):
            x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
        y = _MixChannels.apply(x, weight)
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class _MixChannels(OwnGradient):
    """The product as a tensor of its own: what is computed in place on a view of one costs autograd copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.T) if ctx.needs_input_grad[0] else None
        return grad_x, rows(grad).T @ rows(x) if ctx.needs_input_grad[1] else None


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    shape = (len(x), len(weight), *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, memory_format=MEMORY_FORMAT[x.dim()])
    torch.mm(rows(x), weight.T, out=rows(y))
    return y


class _AddPositions(OwnGradient):
    """Add to ``y_BO...``, in place, the 2^n parts of ``parts_B(PO)...``, each at its position in the coarse voxels."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, parts: torch.Tensor, shifted: bool) -> torch.Tensor:
        ctx.shape, ctx.shifted = parts.shape, shifted
        for part, fine, coarse in _pairs(parts, y, shifted):
            y[fine] += part[coarse]
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_parts = torch.empty(ctx.shape, dtype=grad.dtype, memory_format=MEMORY_FORMAT[grad.dim()]).zero_()
        for part, fine, coarse in _pairs(grad_parts, grad, ctx.shifted):
            part[coarse] = grad[fine]
        return grad, grad_parts, None


def _pairs(parts: torch.Tensor, y: torch.Tensor, shifted: bool) -> Iterator[tuple[torch.Tensor, Any, Any]]:
    """Each part, and the voxels of ``y`` and of the part that belong together."""
    corners = itertools.product((0, 1), repeat=y.dim() - 2)
    for corner, part in zip(corners, parts.split(y.shape[1], dim=1), strict=True):
        grid = [n // 2 for n in y.shape[2:]]
        fine = tuple(slice(position, None, 2) for position in corner)
        coarse = tuple(slice(p, p + n) if shifted else slice(None) for p, n in zip(corner, grid, strict=True))
        yield part, _at(fine), _at(coarse)


def tent(size: int) -> torch.Tensor:
    """(size,): the weights of linear interpolation by a factor of ``(size + 1) // 2``, for a transposed convolution."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    return 1 - (torch.arange(size, dtype=torch.float64) - centre).abs() / factor


def bilinear_weight(channels: int, size: int) -> torch.Tensor:
    """Weight (channels, channels, size, size) of a transposed convolution that interpolates each channel by itself."""
    kernel = torch.outer(tent(size), tent(size)).float()
    return torch.eye(channels)[:, :, None, None] * kernel


class BilinearUpsampling(nn.Module):
    """A transposed 2D convolution without bias that starts as bilinear interpolation (Long et al., section 3.3).

    Args:
        channels: of the input and of the output.
        kernel_size: 2 * ``stride`` or 2 * ``stride`` - 1; the latter has one of its entries on each of the input's.
        stride: the factor.
        learned: the weight is a parameter; otherwise a buffer, under the same key of the state_dict.
    """

    transposed = True  # as nn.ConvTranspose2d, for layers.sampling

    def __init__(self, channels: int, kernel_size: int, stride: int, learned: bool = False) -> None:
        super().__init__()
        if (kernel_size + 1) // 2 != stride:
            raise ValueError(
                f"bilinear interpolation by {stride} has a kernel of {2 * stride} or {2 * stride - 1}, "
                f"got {kernel_size}"
            )
        self.kernel_size, self.stride = kernel_size, stride
        self.weight: torch.Tensor
        weight = bilinear_weight(channels, kernel_size)
        if learned:
            self.register_parameter("weight", nn.Parameter(weight))
        else:
            self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x_BCHW`` -> (B, C, (H - 1) * stride + kernel_size, ...); entries at its edges miss a neighbour."""
        return F.conv_transpose2d(x, self.weight, stride=self.stride)

    def extra_repr(self) -> str:
        learned = isinstance(self.weight, nn.Parameter)
        return f"{len(self.weight)}, kernel_size={self.kernel_size}, stride={self.stride}, learned={learned}"


def unpool(x: torch.Tensor, switches: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Put every value back where a max pooling took it from, zeros elsewhere (Noh et al., section 3.2.1).

    Args:
        x: ``x_BC...`` with two or three spatial axes.
        switches: the pooling's indices, of the shape of ``x``.
        size: spatial size of what was pooled.

    Raises:
        ValueError: ``x`` and ``switches`` have different shapes.
    """
    if not torch.jit.is_tracing() and x.shape != switches.shape:
        raise ValueError(f"unpooling needs a switch for each value, got {tuple(switches.shape)} for {tuple(x.shape)}")
    place = x.new_zeros(*x.shape[:2], math.prod(size))
    return place.scatter(2, switches.flatten(2), x.flatten(2)).unflatten(2, list(size))


def _at(index: Sequence[int | slice]) -> Any:
    """The last axes at ``index``, all of the others."""
    return (..., *index)
