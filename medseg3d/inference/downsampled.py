"""Downsampled: the image is made small enough for the network to see it whole, and what it says is made large again.

Shape legend: image_C... is (channels, *spatial axes), V voxels of the small grid, K classes, F features before the last
layer, ``*plane`` the axes of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.inference.grid_map import edge_to_edge
from medseg3d.inference.heads import last_pointwise
from medseg3d.inference.onto_grid import LOWEST, labels_onto
from medseg3d.inference.slabs import Head, Slab
from medseg3d.inference.strategy import like, one_image, some_images
from medseg3d.inference.streamed import Streamed

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Downsampled(Streamed):
    """A network on the whole image, resampled to a fixed size; a MONAI ``Inferer`` by its call.

    The image becomes smaller by a triangle filter as wide as the new voxels, so that nothing aliases (where it is
    already smaller than ``size``, it becomes larger by linear interpolation). Both grids span the same extent, edge to
    edge. Logits come back by linear interpolation, slice by slice: only two neighbouring slices of the small grid exist
    with a plane of full size at a time. Labels need logits along borders only. Where the network ends in a convolution
    of kernel 1 from fewer channels than there are classes, as many channels are interpolated instead, and the
    convolution comes after, which is the same but for rounding.

    Logits below -10,000, -inf of a class that is ruled out most of all, count as -10,000: infinities have no mean.

    Args:
        size: of the image that the network sees, one for each spatial axis; two or three axes.
        progress: called as ``progress(done, total)`` after each slice of logits of one image, and by ``label_map``
            after each image.

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

    def blending(self, image_size: Sequence[int], channels: int) -> tuple[int, int]:
        """The small grid's logits."""
        return prod(self.size) * channels * 4, prod(self.size)

    def slabs(self, image_BC: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The segmented image (1, C, *spatial), one slice a slab, along the axis that lost most.

        Arguments and errors as for :meth:`small`.
        """
        small = self.small(image_BC, network, *args, **kwargs)
        full = image_BC.shape[2:]
        axis = max(range(len(full)), key=lambda a: full[a] / self.size[a])
        for start, plane in enumerate(enlarged(small.values, full, axis)):
            yield Slab(axis, start, plane.unsqueeze(1 + axis), small.head)
            if self.progress is not None:
                self.progress(start + 1, full[axis])

    def small(self, image_BC: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Slab:
        """What the network makes of the image, on the small grid, as one slab.

        Args:
            image_BC: one image with as many spatial axes as ``size``.
            network: called once, on (1, C, *size) with ``args`` and ``kwargs``; returns logits (1, K, *size).

        Raises:
            ValueError: there is more than one image, its axes are not as many as those of ``size``, or the network
                returns something else.
        """
        image = one_image(image_BC)
        full = tuple(image.shape[1:])
        if len(full) != len(self.size):
            raise ValueError(
                f"size {self.size} is for {len(self.size)} spatial axes, but the image has {len(full)}: {full}"
            )
        seen = image.clone() if full == self.size else resample(image, self.size)  # the network may change its input
        logits = network(seen[None].to(image.dtype if image.is_floating_point() else torch.float32), *args, **kwargs)
        self._require_logits(logits)
        return Slab(0, 0, *factored(finite_below(logits[0].detach()), network))

    def label_map(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Class numbers (B, 1, *spatial), uint8 (int32 above 256 classes): the argmax of the logits, ties to the lower.

        Logits are interpolated only along the borders between labels: elsewhere all neighbours agree on the label. So
        a voxel whose two best classes are equal but for rounding may get the other one.

        Raises:
            ValueError: as :meth:`small`, or a logit is not a number.
        """
        images = some_images(inputs)
        labels = []
        for number in range(len(images)):
            small = self.small(images[number : number + 1], network, *args, **kwargs)
            own = labels_onto([small], edge_to_edge(self.size, images.shape[2:]))
            labels.append(torch.from_numpy(own.astype(np.uint8 if small.classes <= 256 else np.int32, copy=False)))
            if self.progress is not None:
                self.progress(number + 1, len(images))
        return like(torch.stack(labels)[:, None].to(images.device), inputs)

    def _require_logits(self, logits: Any) -> None:
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"downsampling needs one tensor of logits, but the network returns a {type(logits).__name__}: wrap it "
                "so that it returns the logits only"
            )
        if tuple(logits.shape[2:]) != self.size:
            raise ValueError(f"the network must return logits of the size {self.size}, got {tuple(logits.shape[2:])}")


def finite_below(logits: torch.Tensor) -> torch.Tensor:
    """Logits that are ``LOWEST`` at least; those that are not numbers stay."""
    return logits.clamp_min(LOWEST) if logits.numel() and logits.amin() < LOWEST else logits


def resample(values_C: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(C, *spatial) -> (C, *size), float32: linear, and with a wider triangle where voxels become larger."""
    result = values_C.float()
    growth = [new / old for new, old in zip(size, values_C.shape[1:], strict=True)]
    for axis in sorted(range(len(size)), key=lambda a: growth[a]):  # what shrinks most leaves least for the others
        if growth[axis] < 1:
            weights = weights_of(result.shape[1 + axis], size[axis]).to(result.device)
            result = (result.movedim(1 + axis, -1) @ weights.T).movedim(-1, 1 + axis)
    if max(growth) > 1:
        result = F.interpolate(result[None], tuple(size), mode=MODES[len(size)])[0]
    return result.contiguous()


def weights_of(n_in: int, n_out: int) -> torch.Tensor:
    """The (n_out, n_in) float32 matrix that resamples an axis as preprocessing does."""
    (one,) = edge_to_edge([n_in], [n_out])
    return torch.from_numpy(one.weights).float()


def enlarged(values_F: torch.Tensor, full: Sequence[int], axis: int) -> Iterator[torch.Tensor]:
    """Slices (F, *plane) along ``axis`` of values (F, *small) resampled to the size ``full``."""
    slices = values_F.movedim(1 + axis, 0)
    plane = [size for other, size in enumerate(full) if other != axis]
    planes: dict[int, torch.Tensor] = {}  # the small grid's slices of which the next one is made, in full size
    for weights in weights_of(len(slices), full[axis]):
        taps = weights.nonzero().flatten().tolist()
        planes = {tap: planes[tap] if tap in planes else resample(slices[tap], plane) for tap in taps}
        total, mean = float(weights[taps[0]]), planes[taps[0]]
        for tap in taps[1:]:
            total += float(weights[tap])
            mean = mean.lerp(planes[tap], float(weights[tap]) / total)
        yield mean


def factored(logits_K: torch.Tensor, network: Callable) -> tuple[torch.Tensor, Head | None]:
    """Logits (K, *small) as fewer values (F, *small) and a head that makes the logits of them; or as they are.

    The logits of a last layer of kernel 1 lie in the span of its weight's F columns. Their coordinates in an
    orthonormal basis of it say the same as the F features, and the network need not run again for them.
    """
    classes = len(logits_K)
    found = last_pointwise(network, classes) if isinstance(network, nn.Module) else None
    if found is None:
        return logits_K, None
    _, layer = found
    logits_KV = logits_K.flatten(1).float()
    basis_KF = torch.linalg.qr(layer.weight.detach().flatten(1).float()).Q
    bias_K = basis_KF.new_zeros(classes) if layer.bias is None else layer.bias.detach().float()
    head = Head(basis_KF, bias_K)
    values_FV = basis_KF.T @ (logits_KV - bias_K[:, None])
    rounding = 1e-5 if logits_K.dtype == torch.float32 else 2e-2
    if not (head(values_FV) - logits_KV).norm() <= rounding * logits_KV.norm():
        return logits_K, None
    return values_FV.view(-1, *logits_K.shape[1:]), head
