"""Downsampled: the image is made small enough for the network to see it whole, and what it says is made large again.

Shape legend: image_C... is (channels, *spatial axes), V voxels of the small grid, K classes, F features before the last
layer, ``*plane`` the axes of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.inference.slabs import Head, Slab
from medseg3d.inference.streamed import Streamed, one_image

MODES = {1: "linear", 2: "bilinear"}


class Downsampled(Streamed):
    """A network on the whole image, resampled to a fixed size; a MONAI ``Inferer`` by its call.

    The image becomes smaller by a triangle filter as wide as the new voxels, so that nothing aliases (where it is
    already smaller than ``size``, it becomes larger by linear interpolation). Both grids span the same extent, edge to
    edge. Logits come back by linear interpolation, slice by slice: only the small grid's two neighbouring slices exist
    with a plane of full size. Where the network ends in a convolution of kernel 1 from fewer channels than there are
    classes, as many channels are interpolated instead, and the convolution comes after, which is the same but for
    rounding.

    Args:
        size: of the image that the network sees, one for each spatial axis; two or three axes.
        progress: called as ``progress(done, total)`` after each slice of one image.

    Raises:
        ValueError: a size is less than 1, or they are not two or three.
    """

    def __init__(
        self, size: Sequence[int] = (128, 128, 64), progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.size = tuple(size)
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            raise ValueError(f"size must be two or three numbers of voxels, 1 or more each, got {size}")
        self.progress = progress

    def slabs(self, image_BC: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The segmented image (1, C, *spatial), one slice a slab, along the axis that lost most.

        Args:
            image_BC: one image with as many spatial axes as ``size``.
            network: called once, on (1, C, *size) with ``args`` and ``kwargs``; returns logits (1, K, *size).

        Raises:
            ValueError: there is more than one image, its axes are not as many as those of ``size``, or the network
                returns something else.
        """
        image = one_image(image_BC)
        full = image.shape[1:]
        if len(full) != len(self.size):
            raise ValueError(
                f"size {self.size} is for {len(self.size)} spatial axes, but the image has {len(full)}: {tuple(full)}"
            )
        small = resample(image, self.size)
        logits = network(small[None], *args, **kwargs)
        self._require_logits(logits)
        values, head = factored(logits[0].detach(), network)
        axis = max(range(len(full)), key=lambda a: full[a] / self.size[a])
        for start, plane in enumerate(enlarged(values, full, axis)):
            yield Slab(axis, start, plane.unsqueeze(1 + axis), head)
            if self.progress is not None:
                self.progress(start + 1, full[axis])

    def _require_logits(self, logits: Any) -> None:
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"downsampling needs one tensor of logits, but the network returns a {type(logits).__name__}: wrap it "
                "so that it returns the logits only"
            )
        if tuple(logits.shape[2:]) != self.size:
            raise ValueError(f"the network must return logits of the size {self.size}, got {tuple(logits.shape[2:])}")


def resample(image_C: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(C, *spatial) -> (C, *size) by :func:`axis_weights` along each axis; a floating type is kept, else float32."""
    result = image_C.float()
    growth = [new / old for new, old in zip(size, image_C.shape[1:], strict=True)]
    for axis in sorted(range(len(size)), key=lambda a: growth[a]):  # what shrinks most leaves least for the others
        if growth[axis] != 1:
            weights = axis_weights(image_C.shape[1 + axis], size[axis]).to(result.device)
            result = (result.movedim(1 + axis, -1) @ weights.T).movedim(-1, 1 + axis)
    return result.to(image_C.dtype if image_C.is_floating_point() else torch.float32).contiguous()


def axis_weights(n_in: int, n_out: int) -> torch.Tensor:
    """The (n_out, n_in) float32 matrix that resamples an axis linearly; its rows sum to 1.

    Where the new voxels are larger, the triangle is as wide as they are; beyond the ends the signal goes on at its last
    value.
    """
    ratio = n_in / n_out
    width = max(1.0, ratio)
    centres = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * ratio - 0.5
    voxels = centres.floor().long() + torch.arange(-ceil(width), ceil(width) + 2)
    values = (1 - (voxels - centres).abs() / width).clamp(min=0)
    weights = torch.zeros(n_out, n_in, dtype=torch.float64).scatter_add_(1, voxels.clamp(0, n_in - 1), values)
    return (weights / weights.sum(1, keepdim=True)).float()


def enlarged(values_F: torch.Tensor, full: Sequence[int], axis: int) -> Iterator[torch.Tensor]:
    """Slices (F, *plane) along ``axis`` of (F, *small) interpolated linearly to the size ``full``."""
    slices = values_F.movedim(1 + axis, 0)
    plane = [size for other, size in enumerate(full) if other != axis]
    made: dict[int, torch.Tensor] = {}  # the two neighbours, with a plane of full size

    def neighbour(number: int) -> torch.Tensor:
        if number not in made:
            own = slices[number].float()
            same = list(own.shape[1:]) == plane
            made[number] = own if same else F.interpolate(own[None], plane, mode=MODES[len(plane)])[0]
        return made[number]

    for number in range(full[axis]):
        place = (number + 0.5) * len(slices) / full[axis] - 0.5
        place = min(max(place, 0), len(slices) - 1)
        before = int(place)
        for old in [n for n in made if n < before]:
            del made[old]
        share = place - before
        yield neighbour(before).lerp(neighbour(before + 1), share) if share else neighbour(before)


def factored(logits_K: torch.Tensor, network: Callable) -> tuple[torch.Tensor, Head | None]:
    """Logits (K, *small) as fewer values (F, *small) and a head that makes the logits of them; or as they are.

    The logits of a last layer of kernel 1 lie in the span of its weight's F columns. Their coordinates in an
    orthonormal basis of it say the same as the F features, and the network need not run again for them.
    """
    classes = len(logits_K)
    layer = _last_pointwise(network, classes)
    if layer is None:
        return logits_K, None
    logits_KV = logits_K.flatten(1).float()
    basis_KF = torch.linalg.qr(layer.weight.detach().flatten(1).float()).Q
    bias_K = basis_KF.new_zeros(classes) if layer.bias is None else layer.bias.detach().float()
    head = Head(basis_KF, bias_K)
    values_FV = basis_KF.T @ (logits_KV - bias_K[:, None])
    rounding = 1e-5 if logits_K.dtype == torch.float32 else 2e-2
    if not (head(values_FV) - logits_KV).norm() <= rounding * logits_KV.norm():
        return logits_K, None
    return values_FV.view(-1, *logits_K.shape[1:]), head


def _last_pointwise(network: Callable, classes: int) -> nn.Conv2d | nn.Conv3d | None:
    """The last convolution of kernel 1 from fewer channels than classes to as many, which may or may not run last."""
    found = None
    for module in network.modules() if isinstance(network, nn.Module) else ():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.weight.flatten(1).shape[0] == classes:
            found = module if module.weight.flatten(1).shape[1] < classes else None
    return found
