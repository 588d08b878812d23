"""Boxes: areas, overlaps, clipping, formats, and the coder between boxes and regression targets.

Girshick, "Fast R-CNN", ICCV 2015, and Ren et al., "Faster R-CNN", NeurIPS 2015, in the form that torchvision has of
them. With ``inclusive`` a box's x1 and y1 are its last pixels, so that its sides are ``x1 - x0 + 1`` (Detectron);
without, they are where it ends.

Shape legend: ``boxes_N4`` are (x0, y0, x1, y1) in pixels, ``codes_N4`` (dx, dy, dw, dh).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LARGEST_SCALE = math.log(1000 / 16)  # of a side, when codes are turned into boxes
FORMATS = ("xyxy", "xywh", "cxcywh")


def in_full_precision(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, whole numbers as float32 too; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def box_area(boxes_N4: torch.Tensor, inclusive: bool = False) -> torch.Tensor:
    """Areas (N,) in square pixels; of inverted boxes the product of their sides."""
    x0, y0, x1, y1 = in_full_precision(boxes_N4).unbind(-1)
    return (x1 - x0 + inclusive) * (y1 - y0 + inclusive)


def box_iou(a_N4: torch.Tensor, b_M4: torch.Tensor, inclusive: bool = False) -> torch.Tensor:
    """Intersection over union of every pair, (N, M), 0 to 1; NaN where neither box has an area."""
    inter, union = _inter_and_union(a_N4, b_M4, inclusive)
    return inter.div_(union)


def generalized_box_iou(a_N4: torch.Tensor, b_M4: torch.Tensor) -> torch.Tensor:
    """IoU less the empty part of the smallest box around both, (N, M), -1 to 1 (Rezatofighi et al., CVPR 2019)."""
    inter, union = _inter_and_union(a_N4, b_M4, inclusive=False)
    ax0, ay0, ax1, ay1 = in_full_precision(a_N4)[:, None].unbind(-1)
    bx0, by0, bx1, by1 = in_full_precision(b_M4)[None].unbind(-1)
    width = torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)
    height = torch.maximum(ay1, by1) - torch.minimum(ay0, by0)
    around = width.clamp_(min=0) * height.clamp_(min=0)
    return inter / union - (around - union) / around


def _inter_and_union(a_N4: torch.Tensor, b_M4: torch.Tensor, inclusive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # Coordinate by coordinate: a crowd of objects against all anchors is large.
    ax0, ay0, ax1, ay1 = in_full_precision(a_N4)[:, None].unbind(-1)
    bx0, by0, bx1, by1 = in_full_precision(b_M4)[None].unbind(-1)
    inter = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0) + inclusive).clamp(min=0)
    inter = inter * (torch.minimum(ay1, by1) - torch.maximum(ay0, by0) + inclusive).clamp(min=0)
    union = box_area(a_N4, inclusive)[:, None] + box_area(b_M4, inclusive)[None] - inter
    return inter, union


def clip_boxes_to_image(boxes_X4: torch.Tensor, size: Sequence[int], inclusive: bool = False) -> torch.Tensor:
    """Boxes (..., 4) cut to an image of ``size`` (height, width)."""
    height, width = size
    x = boxes_X4[..., 0::2].clamp(0, width - inclusive)
    y = boxes_X4[..., 1::2].clamp(0, height - inclusive)
    return torch.stack((x, y), -1).flatten(-2)


def remove_small_boxes(boxes_N4: torch.Tensor, min_size: float, inclusive: bool = False) -> torch.Tensor:
    """Indices of the boxes with both sides of at least ``min_size`` pixels."""
    sides = boxes_N4[:, 2:] - boxes_N4[:, :2] + inclusive
    return torch.where((sides >= min_size).all(1))[0]


def box_convert(boxes_X4: torch.Tensor, in_fmt: str, out_fmt: str) -> torch.Tensor:
    """Boxes (..., 4) from one format to another: "xyxy", "xywh" (corner and sides), "cxcywh" (centre and sides).

    Raises:
        ValueError: another format.
    """
    if in_fmt not in FORMATS or out_fmt not in FORMATS:
        raise ValueError(f"formats of boxes are {', '.join(FORMATS)}, got {in_fmt!r} and {out_fmt!r}")
    if in_fmt == out_fmt:
        return boxes_X4.clone()
    first, second = boxes_X4[..., :2], boxes_X4[..., 2:]
    if in_fmt == "xywh":
        first, second = first, first + second
    elif in_fmt == "cxcywh":
        first, second = first - 0.5 * second, first + 0.5 * second
    if out_fmt == "xywh":
        first, second = first, second - first
    elif out_fmt == "cxcywh":
        first, second = (first + second) / 2, second - first
    return torch.cat((first, second), -1)


def masks_to_boxes(masks_NHW: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4), float32, whose corners are the first and the last pixel of each mask; zeros of an empty mask.

    A training target needs boxes with an area: add 1 to x1 and y1.
    """
    boxes = torch.zeros((len(masks_NHW), 4), device=masks_NHW.device)
    for box, mask in zip(boxes, masks_NHW != 0, strict=True):
        if mask.any():
            y, x = torch.where(mask.any(1))[0], torch.where(mask.any(0))[0]
            box[:] = torch.stack((x[0], y[0], x[-1], y[-1]))
    return boxes


class BoxCoder:
    """Boxes as shifts and log scales of other boxes, and back (Girshick et al., R-CNN, CVPR 2014, appendix C).

    Args:
        weights: of dx, dy, dw and dh.
        largest_scale: bound of dw and dh in ``decode``, before ``exp``.
        inclusive: whether x1 and y1 are the last pixels.
    """

    def __init__(
        self, weights: Sequence[float] = (1, 1, 1, 1), largest_scale: float = LARGEST_SCALE, inclusive: bool = False
    ) -> None:
        if len(weights) != 4:
            raise ValueError(f"a box coder has four weights, of dx, dy, dw and dh, got {weights}")
        self.weights = tuple(weights)
        self.largest_scale = largest_scale
        self.inclusive = inclusive

    def encode(self, targets_N4: torch.Tensor, boxes_N4: torch.Tensor) -> torch.Tensor:
        """Codes (N, 4) of targets, relative to boxes; both must have an area."""
        tx, ty, tw, th = self._centres_and_sides(targets_N4)
        x, y, w, h = self._centres_and_sides(boxes_N4)
        wx, wy, ww, wh = self.weights
        codes = wx * (tx - x) / w, wy * (ty - y) / h, ww * torch.log(tw / w), wh * torch.log(th / h)
        return torch.stack(codes, -1)

    def decode(self, codes_NX: torch.Tensor, boxes_N4: torch.Tensor) -> torch.Tensor:
        """Boxes (N, K, 4) of codes (N, 4 K), relative to boxes."""
        codes_NK4 = in_full_precision(codes_NX).unflatten(-1, (-1, 4))
        x, y, w, h = (value[:, None] for value in self._centres_and_sides(boxes_N4))
        dx, dy, dw, dh = (code / weight for code, weight in zip(codes_NK4.unbind(-1), self.weights, strict=True))
        centre_x, centre_y = dx * w + x, dy * h + y
        half_w = 0.5 * (dw.clamp(max=self.largest_scale).exp() * w)
        half_h = 0.5 * (dh.clamp(max=self.largest_scale).exp() * h)
        pixel = int(self.inclusive)
        corners = centre_x - half_w, centre_y - half_h, centre_x + half_w - pixel, centre_y + half_h - pixel
        return torch.stack(corners, -1)

    def _centres_and_sides(self, boxes_N4: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x0, y0, x1, y1 = in_full_precision(boxes_N4).unbind(-1)
        w, h = x1 - x0 + self.inclusive, y1 - y0 + self.inclusive
        return x0 + 0.5 * w, y0 + 0.5 * h, w, h
