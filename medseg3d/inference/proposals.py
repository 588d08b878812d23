"""Instance-wise inference: a network on object proposals, whose scores are pasted into the image and combined.

Noh, Hong and Han, "Learning deconvolution network for semantic segmentation", ICCV 2015, section 4.3. Where proposals
come from is the caller's choice.

Shape legend: ``image_CHW`` is (channels, height, width), K is the number of classes, N of proposals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Network = Callable[[torch.Tensor], torch.Tensor]
COMBINATIONS = ("max", "sum")


@torch.no_grad()
def segment_proposals(
    network: Network,
    image_CHW: torch.Tensor,
    boxes_N4: torch.Tensor,
    *,
    size: tuple[int, int] = (224, 224),
    smallest_side: int = 112,
    most: int | None = 50,
    combine: str = "max",
    batch_size: int = 1,
) -> torch.Tensor:
    """Scores (K, H, W) of the image: of each pixel and class the highest over all proposals.

    A proposal's scores are zero outside of its box, so a pixel that lies in none, or not in all, has none below zero.

    Args:
        network: (B, C, *size) -> logits (B, K, *size).
        image_CHW: the image, preprocessed, on the network's device.
        boxes_N4: proposals (x1, y1, x2, y2) in pixels, best first: pixels from x1 up to x2, rounded outwards, and
            clipped to the image.
        size: height and width to which each proposal is resized.
        smallest_side: proposals with a shorter side, clipped, are left out; the release's is half of ``size``.
        most: how many of those that are left count; None for all.
        combine: "max", or "sum" of the scores.
        batch_size: proposals in one pass of the network.

    Raises:
        ValueError: on other shapes or choices, boxes that are not finite, and where no proposal is large enough.
    """
    _check(image_CHW, boxes_N4, combine)
    height, width = image_CHW.shape[1:]
    boxes = [box for box in _clipped(boxes_N4, height, width) if _shorter_side(box) >= max(1, smallest_side)][:most]
    if not boxes:
        raise ValueError(
            f"none of the {len(boxes_N4)} proposals has sides of {smallest_side} pixels or more within the image of "
            f"{height}x{width}: give larger ones, or lower smallest_side"
        )
    total: torch.Tensor | None = None
    seen = torch.zeros((height, width), dtype=torch.long, device=image_CHW.device)
    for start in range(0, len(boxes), batch_size):
        batch = boxes[start : start + batch_size]
        crops = torch.cat([_resized(image_CHW[None, :, y1:y2, x1:x2], size) for x1, y1, x2, y2 in batch])
        for (x1, y1, x2, y2), scores in zip(batch, network(crops).float(), strict=True):
            if total is None:
                total = scores.new_full((len(scores), height, width), -torch.inf if combine == "max" else 0.0)
            part = _resized(scores[None], (y2 - y1, x2 - x1))[0]
            target = total[:, y1:y2, x1:x2]
            target.copy_(torch.maximum(target, part) if combine == "max" else target + part)
            seen[y1:y2, x1:x2] += 1
    assert total is not None
    return torch.where(seen == len(boxes), total, total.clamp(min=0)) if combine == "max" else total


def ensemble_scores(a_KHW: torch.Tensor, b_KHW: torch.Tensor, combine: str = "mean") -> torch.Tensor:
    """Scores of two networks as one, such as DeconvNet's with FCN-8s's.

    Args:
        a_KHW, b_KHW: scores of the same classes and pixels.
        combine: "mean", as in the paper, or "product" of the scores with zero for those below, as in its release.

    Raises:
        ValueError: the shapes differ, or another choice.
    """
    if a_KHW.shape != b_KHW.shape:
        raise ValueError(f"scores of one shape are needed, got {tuple(a_KHW.shape)} and {tuple(b_KHW.shape)}")
    if combine not in ("mean", "product"):
        raise ValueError(f"combine must be 'mean' or 'product', got {combine!r}")
    return (a_KHW + b_KHW) / 2 if combine == "mean" else a_KHW.clamp(min=0) * b_KHW.clamp(min=0)


def _check(image_CHW: torch.Tensor, boxes_N4: torch.Tensor, combine: str) -> None:
    if image_CHW.dim() != 3 or min(image_CHW.shape) < 1:
        raise ValueError(f"the image must be (channels, height, width), not empty, got {tuple(image_CHW.shape)}")
    if boxes_N4.dim() != 2 or boxes_N4.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4) of x1, y1, x2, y2, got {tuple(boxes_N4.shape)}")
    if not torch.isfinite(boxes_N4).all():
        raise ValueError("boxes must be finite, got NaN or infinity")
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {', '.join(map(repr, COMBINATIONS))}, got {combine!r}")


def _clipped(boxes_N4: torch.Tensor, height: int, width: int) -> list[tuple[int, int, int, int]]:
    limit = torch.tensor([width, height], dtype=torch.float64)
    boxes = boxes_N4.detach().cpu().double()
    first = boxes[:, :2].floor().clamp(min=0).minimum(limit)
    last = boxes[:, 2:].ceil().clamp(min=0).minimum(limit)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in torch.cat([first, last], dim=1).long().tolist()]


def _shorter_side(box: tuple[int, int, int, int]) -> int:
    x1, y1, x2, y2 = box
    return min(x2 - x1, y2 - y1)


def _resized(x_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=False)
