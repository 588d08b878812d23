"""How a segmented image leaves a strategy: in slabs, finished slices along one axis, each of which is soon forgotten.

Labels, probabilities and uncertainties are made of one slab at a time, so memory grows neither with the number of
classes nor with the length of the scan. Where the network ends in a convolution of kernel 1 from fewer channels than
there are classes, slabs hold those channels, and the convolution is applied to what is asked of them: it is linear, and
so are blending and interpolation, so the order does not matter but for rounding.

Shape legend: K classes, F channels before the head, V voxels, ... spatial axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

# Logits that exist at a time. On a CPU they stay in the cache; on a GPU its memory is spared.
BLOCK = 2**18
BLOCK_ON_GPU = 2**25


@dataclass(frozen=True)
class Head:
    """The last layer of a network, a convolution of kernel 1.

    Attributes:
        weight: (K, F).
        bias: (K,) or None.
        linear: whether it may change places with interpolation, as a convolution may.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    linear: ClassVar[bool] = True

    def __call__(self, features_FV: torch.Tensor) -> torch.Tensor:
        """(F, V) -> logits (K, V), float32."""
        weight = self.weight.to(features_FV.device, torch.float32)
        if self.bias is None:
            return weight @ features_FV.float()
        return torch.addmm(self.bias.to(weight)[:, None], weight, features_FV.float())


@dataclass(frozen=True)
class Slab:
    """Finished slices of one image.

    Attributes:
        axis: the spatial axis along which slabs follow each other.
        start: the image's slice that is the slab's first.
        values: (C, ...) logits, or with a ``head`` the features it takes. The memory may be used again for the next
            slab: what is to be kept must be copied.
        head: what makes logits of the values.
    """

    axis: int
    start: int
    values: torch.Tensor
    head: Head | None = None

    @property
    def stop(self) -> int:
        return self.start + self.values.shape[1 + self.axis]

    @property
    def classes(self) -> int:
        return len(self.values) if self.head is None else len(self.head.weight)

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the slab lies among the spatial axes of its image."""
        axes = self.values.dim() - 1
        return tuple(slice(self.start, self.stop) if axis == self.axis else slice(None) for axis in range(axes))

    def logits(self) -> torch.Tensor:
        """(K, ...) float32."""
        if self.head is None:
            return self.values.float()
        return self.head(self.values.flatten(1)).view(-1, *self.values.shape[1:])

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits (K, V) of a few voxels at a time, and which of the flattened voxels they are."""
        size = self.values.shape[1:]
        plane = prod(size[1:])
        voxels = max(1, (BLOCK if self.values.device.type == "cpu" else BLOCK_ON_GPU) // self.classes)
        together = max(1, voxels // plane)
        for first in range(0, size[0], together):
            some = self.values[:, first : first + together]
            if some.stride(0) == 1:  # channels-last: voxels can still be numbered without a copy
                values_FV = some.movedim(0, -1).reshape(-1, len(some)).T
            else:
                values_FV = some.flatten(1)
            for start in range(0, values_FV.shape[1], voxels):
                block = values_FV[:, start : start + voxels]
                begin = first * plane + start
                place = slice(begin, begin + block.shape[1])
                yield place, block.float() if self.head is None else self.head(block)

    def labels(self) -> torch.Tensor:
        """(...) the class of the largest logit, ties to the lower class; uint8, int32 above 256 classes.

        Raises:
            ValueError: there is one channel only, or a logit is not a number.
        """
        if self.classes < 2:
            raise ValueError(
                "one channel has no argmax: give two or more, those of background and object for one object, or take "
                "the sigmoid of the logits and a threshold"
            )
        labels = torch.empty(prod(self.values.shape[1:]), dtype=label_dtype(self.classes), device=self.values.device)
        for part, logits_KV in self.blocks():
            labels[part] = largest(logits_KV)[0]
        return labels.view(self.values.shape[1:])


def label_dtype(classes: int) -> torch.dtype:
    """The smallest type that PyTorch computes with and that holds the numbers of so many classes."""
    return torch.uint8 if classes <= 256 else torch.int32


def largest(logits_KV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class (V,) of the largest logit, ties to the lower class, and that logit (V,).

    Raises:
        ValueError: a logit is not a number.
    """
    if logits_KV.device.type == "cpu":
        labels, best = _first_of_the_largest(logits_KV)
    else:
        labels = logits_KV.argmax(0)
        best = logits_KV.gather(0, labels[None])[0]
        labels = labels.to(label_dtype(len(logits_KV)))
    if best.isnan().any():
        raise ValueError(
            "the network's output is not a number at some voxels: its weights or its input are broken, or the "
            "precision is too small for it; try float32"
        )
    return labels, best


def _first_of_the_largest(logits_KV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum, then the first class that has it: both are vectorised on CPUs, where PyTorch's argmax is not."""
    classes, voxels = logits_KV.shape
    dtype = torch.promote_types(logits_KV.dtype, torch.float32)  # counts classes exactly
    rank_K1 = torch.arange(classes, 0, -1, dtype=dtype)[:, None]
    labels = torch.empty(voxels, dtype=label_dtype(classes))
    best = torch.empty(voxels, dtype=dtype)
    at_a_time = max(1, BLOCK // classes)
    for start in range(0, voxels, at_a_time):
        part = slice(start, start + at_a_time)
        block_KV = logits_KV[:, part].to(dtype).contiguous()
        best[part] = block_KV.amax(0)
        is_best_KV = torch.eq(block_KV, best[part], out=torch.empty_like(block_KV))  # to booleans takes 7 times as long
        labels[part] = classes - is_best_KV.mul_(rank_K1).amax(0)
    return labels, best.to(logits_KV.dtype)
