"""What a detector learns from, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

FARTHEST = 1_000_000  # coordinates of boxes, in pixels


def check_targets(
    images: Sequence[torch.Tensor],
    targets: Sequence[Mapping[str, torch.Tensor]],
    num_classes: int,
    masks: bool,
    inclusive: bool = False,
) -> None:
    """Raise unless every picture has a target that fits it.

    Args:
        images: pictures (C, H, W).
        targets: "boxes", "labels" and, if ``masks``, "masks" of each.
        num_classes: classes, with background as class 0.
        masks: whether masks are needed.
        inclusive: whether boxes end with their last pixels: those of objects one pixel wide end where they begin.

    Raises:
        ValueError: which target is wrong, the rule, and what it is.
    """
    if isinstance(targets, Mapping) or len(targets) != len(images):
        got = "one dictionary" if isinstance(targets, Mapping) else f"{len(targets)} of them"
        raise ValueError(f"targets are a list with a dictionary for each of {len(images)} images, got {got}")
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        try:
            _check(image, target, num_classes, masks, inclusive)
        except ValueError as error:
            raise ValueError(f"target {index}: {error}") from None


def _check(
    image: torch.Tensor, target: Mapping[str, torch.Tensor], num_classes: int, masks: bool, inclusive: bool
) -> None:
    needed = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
    if missing := [name for name in needed if not isinstance(target.get(name), torch.Tensor)]:
        raise ValueError(f"it needs tensors {', '.join(needed)}, and has no {', '.join(missing)}")
    boxes, labels = target["boxes"], target["labels"]
    count = len(boxes)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes are (N, 4), got {tuple(boxes.shape)}; of no objects they are torch.zeros(0, 4)")
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(f"labels are ({count},), int64, one for each box, got {tuple(labels.shape)}, {labels.dtype}")
    if masks and tuple(target["masks"].shape) != (count, *image.shape[-2:]):
        raise ValueError(
            f"masks are {(count, *image.shape[-2:])}, one for each box on the whole image, got "
            f"{tuple(target['masks'].shape)}"
        )
    if not count:
        return
    if masks:
        _check_masks(target["masks"])
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 1 or highest >= num_classes:
        raise ValueError(
            f"labels lie between 1 and {num_classes - 1} (0 is background, num_classes={num_classes}), got {lowest} to "
            f"{highest}"
        )
    _check_boxes(boxes, image.shape[-2:], inclusive)


def _check_masks(masks: torch.Tensor) -> None:
    if masks.dtype != torch.bool:
        low, high = (value.item() for value in masks.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"masks hold 0 and 1, got {low} to {high}: pass masks > 0")


def _check_boxes(boxes: torch.Tensor, size: Sequence[int], inclusive: bool) -> None:
    sides = boxes[:, 2:] - boxes[:, :2]
    bad = ~torch.isfinite(boxes).all(1) | ((sides < 0) if inclusive else (sides <= 0)).any(1)
    if bad.any():
        which, rule = int(bad.nonzero()[0]), "<=" if inclusive else "<"
        raise ValueError(
            f"boxes are (x0, y0, x1, y1), finite, with x0 {rule} x1 and y0 {rule} y1, got {boxes[which].tolist()} as "
            f"box {which}: leave out objects without an area"
        )
    away = (boxes[:, 2:] + inclusive <= 0).any(1) | (boxes[:, :2] >= boxes.new_tensor([size[1], size[0]])).any(1)
    away |= (boxes.abs() > FARTHEST).any(1)
    if away.any():
        which = int(away.nonzero()[0])
        raise ValueError(
            f"boxes lie on their image of {size[0]} x {size[1]} pixels, in part at least and within {FARTHEST:,} "
            f"pixels, got {boxes[which].tolist()} as box {which}: leave out objects that are not in the image"
        )
