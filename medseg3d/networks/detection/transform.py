"""Pictures into a batch for a detector, and its detections back: resize, normalise, pad, with a record of the frames.

As in torchvision: the shorter side becomes ``min_size`` unless the longer one would exceed ``max_size``; sides are
rounded down; pictures are resized bilinearly, masks to the nearest pixel; zeros fill up the right and the bottom.

Shape legend: ``image_CHW`` is a picture, ``boxes_N4`` are (x0, y0, x1, y1) in pixels, ``masks_NHW`` lie on a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Target = dict[str, torch.Tensor]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ResizeRecord:
    """The frames of a picture before and after it was resized, and the way between them.

    Attributes:
        original, resized: (height, width) in pixels.
    """

    original: tuple[int, int]
    resized: tuple[int, int]

    def to_resized(self, boxes_N4: torch.Tensor) -> torch.Tensor:
        """Boxes, or points (N, 2) as (x, y), of the original picture in the frame of the resized one."""
        return _scaled(boxes_N4, self.original, self.resized)

    def to_original(self, boxes_N4: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return _scaled(boxes_N4, self.resized, self.original)

    def resize_masks(self, masks_NHW: torch.Tensor) -> torch.Tensor:
        """Masks of the original picture in the frame of the resized one: the nearest pixel, uint8."""
        if not len(masks_NHW):
            return masks_NHW.new_zeros((0, *self.resized), dtype=torch.uint8)
        return F.interpolate(masks_NHW[:, None].float(), size=self.resized, mode="nearest")[:, 0].byte()


def _scaled(points: torch.Tensor, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    numbers = [torch.tensor(size, dtype=torch.float32, device=points.device) for size in (after, before)]
    ratio_y, ratio_x = numbers[0] / numbers[1]
    return points * torch.stack((ratio_x, ratio_y)).repeat(points.shape[-1] // 2)


class DetectionTransform:
    """What a detector does to its pictures and targets first, and to its detections last.

    Args:
        min_size: shorter side of the resized pictures; of several one is drawn at random for each picture with a
            target, and the last one is used without.
        max_size: bound of the longer side.
        image_mean, image_std: of each channel of pictures with values from 0 to 1.
        size_divisible: the batch's sides are multiples of it.
        fixed_size: (height, width) for every picture instead of ``min_size`` and ``max_size``.
        scale: factor of the sides of every picture instead, for pictures whose pixels all have one size.

    Raises:
        ValueError: on arguments out of range.
    """

    def __init__(
        self,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        size_divisible: int = 32,
        fixed_size: tuple[int, int] | None = None,
        scale: float | None = None,
    ) -> None:
        self.min_size = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        self.max_size = max_size
        self.image_mean = tuple(IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = tuple(IMAGENET_STD if image_std is None else image_std)
        self.size_divisible = size_divisible
        self.fixed_size = fixed_size
        self.scale = scale
        if not self.min_size or min(self.min_size) < 1 or max_size < 1 or size_divisible < 1:
            raise ValueError(
                f"sizes are positive, got min_size={min_size}, max_size={max_size}, size_divisible={size_divisible}"
            )
        if scale is not None and (scale <= 0 or fixed_size is not None):
            raise ValueError(f"scale is a positive factor, without a fixed_size, got {scale} and {fixed_size}")
        if len(self.image_mean) != len(self.image_std) or not all(self.image_std):
            raise ValueError(
                "image_mean and image_std have a number for each channel, and none of the latter is 0, got "
                f"{image_mean} and {image_std}"
            )

    def __call__(
        self, images: Sequence[torch.Tensor], targets: Sequence[Mapping[str, torch.Tensor]] | None = None
    ) -> tuple[torch.Tensor, list[ResizeRecord], list[Target] | None]:
        """The batch (B, C, H, W), a record for each picture, and the targets in the resized frames.

        Args:
            images: pictures (C, H, W) of any sizes, floating-point, 0 to 1.
            targets: with "boxes", "labels" and, if there are any, "masks"; they are not changed.

        Raises:
            ValueError: a picture of another shape or type.
        """
        pictures, records = [], []
        for index, image in enumerate(images if isinstance(images, Iterable) else [images]):
            self._check(image, index)
            resized, record = self._resize(self._normalise(image), training=targets is not None)
            pictures.append(resized)
            records.append(record)
        if not pictures:
            raise ValueError("there are no images: pass at least one")
        moved = None if targets is None else [_move(t, r) for t, r in zip(targets, records, strict=True)]
        return self._batch(pictures), records, moved

    def _check(self, image: torch.Tensor, index: int) -> None:
        if not isinstance(image, torch.Tensor):
            raise ValueError(
                f"images are tensors, image {index} is a {type(image).__name__}: of a picture of 8 bits pass "
                "torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255"
            )
        channels = len(self.image_mean)
        if image.dim() != 3 or image.shape[0] != channels or not all(image.shape[1:]):
            raise ValueError(
                f"images are ({channels}, height, width) with at least one pixel, image {index} has a shape of "
                f"{tuple(image.shape)}"
            )
        if not image.is_floating_point():
            raise ValueError(
                f"images hold floating-point values from 0 to 1, image {index} is {image.dtype}: divide it by its "
                "largest possible value, 255 for 8 bits"
            )

    def _normalise(self, image_CHW: torch.Tensor) -> torch.Tensor:
        mean, std = (image_CHW.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return (image_CHW - mean) / std

    def _resize(self, image_CHW: torch.Tensor, training: bool) -> tuple[torch.Tensor, ResizeRecord]:
        original = (image_CHW.shape[1], image_CHW.shape[2])
        if self.fixed_size is not None:
            resized = (self.fixed_size[0], self.fixed_size[1])
        else:
            scale = self._scale(original, training) if self.scale is None else self.scale
            resized = (max(1, math.floor(original[0] * scale)), max(1, math.floor(original[1] * scale)))
        if resized != original:
            image_CHW = F.interpolate(image_CHW[None], size=resized, mode="bilinear", align_corners=False)[0]
        return image_CHW, ResizeRecord(original, resized)

    def _scale(self, size: tuple[int, int], training: bool) -> float:
        choice = int(torch.randint(len(self.min_size), ())) if training and len(self.min_size) > 1 else -1
        return min(self.min_size[choice] / min(size), self.max_size / max(size))

    def _batch(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [-(-side // self.size_divisible) * self.size_divisible for side in (height, width)]
        batch = images[0].new_zeros((len(images), images[0].shape[0], *padded))
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image
        return batch


def _move(target: Mapping[str, torch.Tensor], record: ResizeRecord) -> Target:
    moved = {**target, "boxes": record.to_resized(target["boxes"])}
    if "masks" in target:
        moved["masks"] = record.resize_masks(target["masks"])
    return moved
