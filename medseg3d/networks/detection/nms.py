"""Greedy non-maximum suppression, exact, in whole-array steps.

The best box stays and removes all that overlap it by more than the threshold, then the next best that is left, and so
on. Boxes are taken in ranks of ``BLOCK``: a block loses what the kept boxes before it overlap, and what is left is
settled among itself, one after another.

Shape legend: ``boxes_N4`` are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from medseg3d.networks.detection.boxes import in_full_precision

BLOCK = 128
PAIRS_OF_A_PASS = 2**16  # what starting one more pass costs, in pairs of boxes compared


def nms(
    boxes_N4: torch.Tensor, scores_N: torch.Tensor, iou_threshold: float, *, inclusive: bool = False
) -> torch.Tensor:
    """Indices of the boxes that stay, the best first; of equal scores the first one is better.

    A box goes if its IoU with a better one that stays is above ``iou_threshold`` (not if equal). Boxes without an area
    overlap nothing.

    Args:
        boxes_N4: (N, 4).
        scores_N: (N,).
        iou_threshold: 0 to 1.
        inclusive: whether x1 and y1 are the last pixels.

    Raises:
        ValueError: shapes that do not fit.
    """
    return batched_nms(boxes_N4, scores_N, None, iou_threshold, inclusive=inclusive)


def batched_nms(
    boxes_N4: torch.Tensor,
    scores_N: torch.Tensor,
    groups_N: torch.Tensor | None,
    iou_threshold: float,
    *,
    inclusive: bool = False,
) -> torch.Tensor:
    """``nms`` within each group (class, image or level); indices of what stays, the best of all groups first.

    Groups are compared, not moved apart by offsets, so the coordinates may have any sign and size.
    """
    _check(boxes_N4, scores_N, groups_N)
    with torch.no_grad(), torch.autocast(boxes_N4.device.type, enabled=False):
        order = scores_N.argsort(descending=True, stable=True)
        boxes = in_full_precision(boxes_N4)[order]
        groups = None if groups_N is None else groups_N[order]
        names = () if groups is None else groups.unique()
        if len(boxes) ** 2 <= PAIRS_OF_A_PASS * len(names) or groups is None:
            return order[_keep(boxes, groups, iou_threshold, inclusive)]
        keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for group in names:
            members = torch.where(groups == group)[0]
            keep[members] = _keep(boxes[members], None, iou_threshold, inclusive)
        return order[keep]


def _keep(boxes_N4: torch.Tensor, groups_N: torch.Tensor | None, threshold: float, inclusive: bool) -> torch.Tensor:
    """Which of the boxes, the best first, stay: bool (N,)."""
    limit = _at_most(threshold, boxes_N4.dtype)
    candidates = _Boxes(boxes_N4, groups_N, inclusive)
    kept = candidates[:0]
    keep = torch.zeros(len(boxes_N4), dtype=torch.bool, device=boxes_N4.device)
    for start in range(0, len(boxes_N4), BLOCK):
        block = candidates[start : start + BLOCK]
        index = torch.arange(start, start + len(block), device=boxes_N4.device)
        if len(kept):
            left = torch.where(~kept.overlaps(block, limit).any(0))[0]
            block, index = block[left], index[left]
        stays = _settle(block.overlaps(block, limit).triu_(1))
        keep[index[stays]] = True
        kept = candidates[torch.where(keep)[0]]
    return keep


def _settle(removes_NN: torch.Tensor) -> torch.Tensor:
    """Which boxes stay, in ascending order, if box i, where it stays, removes box j > i where ``removes_NN[i, j]``.

    One after another, but with a row of the matrix as the bits of one number.
    """
    bits_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=removes_NN.device)
    bytes_NB8 = F.pad(removes_NN, (0, -len(removes_NN) % 8)).unflatten(1, (-1, 8)) * bits_8
    removed, stays = 0, []
    for i, row in enumerate(bytes_NB8.sum(2, dtype=torch.uint8).tolist()):
        if not removed >> i & 1:
            stays.append(i)
            removed |= int.from_bytes(row, "little")
    return torch.tensor(stays, dtype=torch.long, device=removes_NN.device)


class _Boxes:
    """Boxes with their areas and groups."""

    def __init__(
        self, boxes_N4: torch.Tensor, groups_N: torch.Tensor | None, inclusive: bool, area_N: torch.Tensor | None = None
    ) -> None:
        self.boxes, self.groups, self.inclusive = boxes_N4, groups_N, inclusive
        x0, y0, x1, y1 = boxes_N4.unbind(1)
        self.area = (x1 - x0 + inclusive) * (y1 - y0 + inclusive) if area_N is None else area_N

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: torch.Tensor | slice) -> _Boxes:
        groups = None if self.groups is None else self.groups[index]
        return _Boxes(self.boxes[index], groups, self.inclusive, self.area[index])

    def overlaps(self, other: _Boxes, limit: float) -> torch.Tensor:
        """Whether the IoU is above the limit and the group is the same: bool (N, M). In place, block by block."""
        x0, y0, x1, y1 = self.boxes[:, :, None].unbind(1)
        other_x0, other_y0, other_x1, other_y1 = other.boxes.T.contiguous().unbind(0)
        width = torch.minimum(x1, other_x1).sub_(torch.maximum(x0, other_x0))
        height = torch.minimum(y1, other_y1).sub_(torch.maximum(y0, other_y0))
        if self.inclusive:
            width.add_(1), height.add_(1)
        inter = width.clamp_(min=0).mul_(height.clamp_(min=0))
        union = torch.add(self.area[:, None], other.area, out=height).sub_(inter)
        above = inter.div_(union) > limit
        if self.groups is not None and other.groups is not None:
            above &= self.groups[:, None] == other.groups
        return above


def _at_most(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of this type up to the threshold: x > threshold, exactly, if and only if x is above it."""
    rounded = torch.tensor(threshold, dtype=dtype)
    if rounded.item() > threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded.item()


def _check(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor | None) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), got a shape of {tuple(boxes.shape)}")
    for name, values in (("scores", scores), ("groups", groups)):
        if values is not None and values.shape != boxes.shape[:1]:
            raise ValueError(f"{name} must be ({len(boxes)},), one for each box, got a shape of {tuple(values.shape)}")
