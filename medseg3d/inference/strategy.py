"""What the strategies have in common: all they give follows from the slabs in which a segmented image leaves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch

from medseg3d.inference.slabs import Slab, label_dtype


class _Seen(Exception):
    """Nothing more than the first window was wanted."""


class Strategy(ABC):
    """A way to bring a network and an image together; a MONAI ``Inferer`` by its call."""

    @abstractmethod
    def slabs(self, image_BC: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The segmented image (1, C, *spatial), every slice once and in order."""

    @abstractmethod
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """Logits (B, K, *spatial) of images (B, C, *spatial)."""

    def count(self, image_size: Sequence[int]) -> int:
        """Windows, slices or volumes of one image that go through a network."""
        return 1

    def box(self, image_BC: torch.Tensor) -> tuple[slice, ...]:
        """The part of an image (1, C, *spatial) that networks see, a slice for each spatial axis."""
        return tuple(slice(0, size) for size in image_BC.shape[2:])

    def blending(self, image_size: Sequence[int], channels: int) -> tuple[int, int]:
        """Bytes that the sums of ``channels`` take for one image in ``slabs``, and the voxels of its thickest slab."""
        return 0, prod(image_size)

    def example(self, image_BC: torch.Tensor) -> torch.Tensor:
        """A window of an image (1, C, *spatial) as a network gets it, for whoever wants to try the network first."""
        seen: list[torch.Tensor] = []

        def network(window: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(window.clone())
            raise _Seen

        with suppress(_Seen):
            for _ in self.slabs(image_BC, network):
                pass
        return seen[0]

    @torch.no_grad()
    def label_map(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Class numbers (B, 1, *spatial), uint8 (int32 above 256 classes): the argmax of the logits, ties to the lower.

        Raises:
            ValueError: the network gives one channel only, or a logit is not a number.
        """
        images = some_images(inputs)
        labels: torch.Tensor | None = None
        for number in range(len(images)):
            for slab in self.slabs(images[number : number + 1], network, *args, **kwargs):
                found = slab.labels()
                if labels is None:
                    shape = (len(images), 1, *images.shape[2:])
                    labels = torch.empty(shape, dtype=label_dtype(slab.classes), device=found.device)
                labels[number, 0][slab.place] = found
        assert labels is not None
        return like(labels, inputs)


def plain(inputs: torch.Tensor) -> torch.Tensor:
    """A MetaTensor without its metadata, which every operation would copy."""
    return inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs


def like(result: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The result with the metadata and the history of a MetaTensor input, so that MONAI can invert it."""
    if not hasattr(inputs, "copy_meta_from"):
        return result
    output: Any = type(inputs)(result)
    return output.copy_meta_from(inputs)


def some_images(images_BC: torch.Tensor, axes: int = 1) -> torch.Tensor:
    """A batch (B, C, *spatial) as a plain tensor.

    Raises:
        ValueError: it is no tensor, there is no image in it, or it has fewer than so many spatial axes.
    """
    if not isinstance(images_BC, torch.Tensor):
        raise ValueError(
            "an image must be a tensor (batch, channels, ...), got a "
            f"{type(images_BC).__module__}.{type(images_BC).__name__}: torch.as_tensor(image) makes one"
        )
    if images_BC.dim() < 2 + axes:
        raise ValueError(
            f"an image must be (batch, channels, ...) with {axes} spatial axes or more, got {tuple(images_BC.shape)}: "
            "image[None] adds an axis in front"
        )
    if len(images_BC) == 0:
        raise ValueError(f"there must be one image or more, got a batch of shape {tuple(images_BC.shape)}")
    return plain(images_BC)


def one_image(image_BC: torch.Tensor, axes: int = 2) -> torch.Tensor:
    """A batch of one image (1, C, *spatial) as a plain tensor (C, *spatial).

    Raises:
        ValueError: as ``some_images``, or there is more than one image.
    """
    images = some_images(image_BC, axes)
    if len(images) != 1:
        raise ValueError(f"slabs are of one image at a time, got {len(images)}: call slabs for each")
    return images[0]
