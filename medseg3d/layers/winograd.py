"""3D convolution on CPUs in fewer multiplications or passes than PyTorch's own.

Winograd's minimal filtering (Winograd, "Arithmetic complexity of computations", SIAM 1980; Lavin and Gray, CVPR 2016)
along the first spatial axis: m neighbouring slices of the output need m + r - 1 convolutions in the plane instead of
m * r, of sums of input slices. The plane's convolutions are PyTorch's. A convolution of few channels, which PyTorch is
slow at and leaves channels-first, is one in the plane over patches. Results differ from PyTorch's by rounding only.

Shape legend: ``x_BC...`` is (batch, channels, D, H, W); a tile is m slices of the output, a point one of m + r - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from medseg3d.layers.derived import Derived, OwnGradient, is_plain_eager, once_differentiable
from medseg3d.layers.layout import channels_last, is_channels_last, with_metadata_of

# (slices of a tile, taps): points of interpolation beside 0 and infinity, those of the smallest error among fractions
# of small numbers, searched with random weights (after Barabasz et al., "Error analysis and improving the accuracy of
# Winograd convolution", ACM TOMS 2020).
POINTS: dict[tuple[int, int], tuple[float, ...]] = {
    (4, 3): (1 / 2, -2, -2 / 3, 4 / 3),
    (4, 5): (1, -1, 1 / 2, -1 / 2, 2, -2),
    (2, 5): (1 / 2, -2, 3 / 2, -3 / 4),
}
# Slices of a tile for a precision and a number of taps. In bfloat16 both have twice the error of a plain convolution;
# four slices with 5 taps would have four times as much.
SLICES = {(torch.float32, 3): 4, (torch.float32, 5): 4, (torch.bfloat16, 3): 4, (torch.bfloat16, 5): 2}
# Measured: below these there is little to gain.
FROM_VOXELS = 12**3
FROM_VOXELS_WITH_GRADIENTS = 40**3
FROM_CHANNELS_TIMES_TAPS = {torch.float32: 64, torch.bfloat16: 80}
FEW_CHANNELS = 4
WORKSPACE = 2**22  # values of transformed input at a time


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` that computes on a CPU as this module's docstring says."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        size = self.kernel_size[0]
        cube = self.kernel_size == (size,) * 3 and self.padding == (size // 2,) * 3 and size % 2 == 1 and size > 1
        unit = self.stride == (1, 1, 1) and self.dilation == (1, 1, 1) and self.groups == 1
        self._keeps_size = cube and unit and self.padding_mode == "zeros"
        self._transformed = Derived()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        if self._keeps_size:
            return convolve(x, self.weight, self.bias, self._transformed)
        return self._conv_forward(x, self.weight, self.bias)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transformed: Derived) -> torch.Tensor:
    """3D convolution of stride 1 with a cubic kernel of odd size that keeps the size of ``x_BC...``.

    ``transformed`` keeps what was computed from ``weight``, whose memory it stands for.
    """
    if is_plain_eager() and x.device.type == "cpu" and len(x):
        if torch.is_autocast_enabled("cpu"):
            x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
        records = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        y = _convolve_and_record(x, weight) if records else _convolve(x, weight, transformed)
        if y is not None:
            return with_metadata_of(x, y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1, 1)))
    return F.conv3d(x, weight, bias, padding=weight.shape[-1] // 2)


def _convolve(x: torch.Tensor, weight: torch.Tensor, transformed: Derived) -> torch.Tensor | None:
    if x.shape[1] <= FEW_CHANNELS and x.dtype == weight.dtype:
        return convolve_patches(x, weight)
    return convolve_tiles(x, transformed(transform_weight, weight)) if _gains(x, weight) else None


def _convolve_and_record(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    # The gradient of the weights has no precision to spare.
    large = prod(x.shape[2:]) >= FROM_VOXELS_WITH_GRADIENTS
    return _Convolution.apply(x, weight) if large and x.dtype == torch.float32 and _gains(x, weight) else None


class _Convolution(OwnGradient):
    """Convolution in tiles; so are both of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return convolve_tiles(x, transform_weight(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = channels_last(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = convolve_tiles(grad, transform_weight(weight.flip(2, 3, 4).transpose(0, 1)))
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient_of_tiles(x, grad, weight.shape[2])
        return grad_x, grad_weight


def _gains(x: torch.Tensor, weight: torch.Tensor) -> bool:
    taps = weight.shape[2]
    slices = SLICES.get((x.dtype, taps))
    if x.dtype != weight.dtype or slices is None or x.shape[2] % slices:
        return False
    if x.dtype == torch.bfloat16 and _multiplies_bfloat16_in_tiles():
        return False
    wide = min(weight.shape[:2]) * taps >= FROM_CHANNELS_TIMES_TAPS[x.dtype]
    return wide and prod(x.shape[2:]) >= FROM_VOXELS and is_channels_last(x)


@lru_cache
def _multiplies_bfloat16_in_tiles() -> bool:
    """Whether the processor has AMX: then bfloat16 is so fast that the transforms cost more than they save."""
    return torch.cpu._is_amx_tile_supported()


def convolve_patches(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolution of odd kernel that keeps the size, slice by slice: taps along D and W become channels in the plane.

    Args:
        x: (B, I, D, H, W).
        weight: (O, I, r, r, r).

    Returns:
        (B, O, D, H, W), channels-last.
    """
    batch, inputs, depth, height, width = x.shape
    outputs, _, taps, _, _ = weight.shape
    halo = taps // 2
    patches = F.pad(x, (halo, halo, 0, 0, halo, halo)).unfold(2, taps, 1).unfold(4, taps, 1)
    of_plane = channels_last(weight.permute(0, 1, 2, 4, 3).reshape(outputs, -1, taps, 1))
    y = torch.empty(batch, outputs, depth, height, width, dtype=x.dtype, memory_format=torch.channels_last_3d)
    plane = x.new_empty((height, width, inputs, taps, taps))
    for image, result in zip(patches.permute(0, 2, 3, 4, 1, 5, 6), y.unbind(), strict=True):
        for patches_of_slice, slice_of_result in zip(image, result.unbind(1), strict=True):
            plane.copy_(patches_of_slice)
            slice_of_result.copy_(F.conv2d(plane.flatten(2).movedim(-1, 0)[None], of_plane, padding=(halo, 0))[0])
    return y


@lru_cache
def transforms(slices: int, taps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Toom and Cook's matrices of the outputs (slices, P), the weights (P, taps) and the inputs (P, P), float64.

    A filter of ``taps`` gives ``slices`` values from P = slices + taps - 1 as
    outputs @ ((weights @ filter) * (inputs @ values)).
    """
    points = (0.0, *POINTS[slices, taps])

    def powers(n: int) -> torch.Tensor:
        """A polynomial of n coefficients at each point; at infinity it is its last coefficient."""
        rows = [[point**i for i in range(n)] for point in points]
        return torch.tensor([*rows, [0.0] * (n - 1) + [1.0]], dtype=torch.float64)

    with torch.inference_mode(False):
        return powers(slices).T, powers(taps), torch.linalg.inv(powers(len(points) + 1)).T


def transform_weight(weight: torch.Tensor) -> list[torch.Tensor]:
    """(O, I, r, r, r) -> for each point a weight (O, I, r, r) of a convolution in the plane."""
    _, of_weights, _ = transforms(SLICES[weight.dtype, weight.shape[2]], weight.shape[2])
    outputs, inputs, *_, height, width = weight.shape
    points = [channels_last(weight.new_empty((outputs, inputs, height, width))) for _ in of_weights]
    for number, filters in enumerate(weight):  # one output at a time: float64 copies of all would be the peak of memory
        for point, values in zip(points, torch.einsum("pd,idhw->pihw", of_weights, filters.double()), strict=True):
            point[number] = values
    return points


def convolve_tiles(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Convolution that keeps the size, with the weights that ``transform_weight`` gives.

    Args:
        x: (B, I, D, H, W), channels-last; D is a multiple of the slices of a tile.
        weights: (O, I, r, r) for each point.

    Returns:
        (B, O, D, H, W), channels-last.
    """
    batch, inputs, depth, height, width = x.shape
    outputs, _, taps, _ = weights[0].shape
    slices = len(weights) - taps + 1
    of_outputs, _, of_inputs = (matrix.to(x.dtype) for matrix in transforms(slices, taps))
    length = height * width * inputs
    y = torch.empty(batch, outputs, depth, height, width, dtype=x.dtype, memory_format=torch.channels_last_3d)
    results = y.movedim(1, -1).view(batch, depth // slices, slices, -1)
    at_a_time = max(1, WORKSPACE // (len(weights) * length))
    for image, result in zip(x.movedim(1, -1), results, strict=True):
        starts = range(0, len(result), at_a_time)
        for start, out in zip(starts, result.split(at_a_time), strict=True):
            tiles = _tiles(image.view(depth, length), start, len(out), slices, taps)
            sums = torch.bmm(of_inputs.expand(len(out), -1, -1), tiles)
            products = [
                _in_plane(plane.view(-1, height, width, inputs), weight)
                for plane, weight in zip(sums.unbind(1), weights, strict=True)
            ]
            torch.bmm(of_outputs.expand(len(out), -1, -1), torch.stack(products, 1), out=out)
    return y


def weight_gradient_of_tiles(x: torch.Tensor, grad: torch.Tensor, taps: int) -> torch.Tensor:
    """Gradient of the weights (O, I, r, r, r), computed point by point.

    Args:
        x: (B, I, D, H, W) that went in, channels-last; D is a multiple of the slices of a tile.
        grad: (B, O, D, H, W) of what came out, channels-last.
        taps: r.
    """
    inputs, depth, height, width = x.shape[1:]
    outputs = grad.shape[1]
    slices = SLICES[x.dtype, taps]
    points = slices + taps - 1
    of_outputs, of_weights, of_inputs = (matrix.to(x.dtype) for matrix in transforms(slices, taps))
    length = height * width * inputs
    at_a_time = max(1, WORKSPACE // (points * length))
    by_point = x.new_zeros(points, outputs, inputs, taps, taps)
    for image, image_grad in zip(x.movedim(1, -1), grad.movedim(1, -1), strict=True):
        tiles_of_grad = image_grad.view(depth // slices, slices, -1)
        starts = range(0, len(tiles_of_grad), at_a_time)
        for start, part in zip(starts, tiles_of_grad.split(at_a_time), strict=True):
            tiles = _tiles(image.view(depth, length), start, len(part), slices, taps)
            sums = torch.bmm(of_inputs.expand(len(part), -1, -1), tiles)
            sums_of_grad = torch.bmm(of_outputs.T.expand(len(part), -1, -1), part)
            for point, plane, plane_grad in zip(by_point, sums.unbind(1), sums_of_grad.unbind(1), strict=True):
                plane = plane.view(-1, height, width, inputs).movedim(-1, 1)
                plane_grad = plane_grad.view(-1, height, width, outputs).movedim(-1, 1)
                point += conv2d_weight(plane, point.shape, plane_grad, padding=taps // 2)
    return torch.einsum("pd,poihw->oidhw", of_weights, by_point)


def _tiles(image: torch.Tensor, start: int, count: int, slices: int, taps: int) -> torch.Tensor:
    """(count, slices + taps - 1, ...) slices of an image (D, ...) for consecutive tiles; zeros beyond both ends."""
    halo = taps // 2
    first, stop = start * slices - halo, (start + count) * slices + halo
    inside = image[max(0, first) : stop]
    missing = (max(0, -first), max(0, stop - len(image)))
    if any(missing):
        inside = F.pad(inside, (0, 0, *missing))
    # Neighbouring tiles share taps - 1 slices.
    shape, strides = (count, slices + taps - 1, image.shape[1]), (slices * image.stride(0), image.stride(0), 1)
    return inside.as_strided(shape, strides)


def _in_plane(plane: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = F.conv2d(plane.movedim(-1, 1), weight, padding=weight.shape[-1] // 2)
    return y.movedim(1, -1).reshape(len(y), -1)
