"""Masks between the frame of their boxes and that of the image: He et al., "Mask R-CNN", ICCV 2017, section 3.

Both ways are bilinear and separable: a matrix for the rows, one for the columns, and no picture in between.

Shape legend: ``masks_NMM`` lie in the frames of ``boxes_N4``, (x0, y0, x1, y1) in pixels of the image of H x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from medseg3d.networks.detection.boxes import in_full_precision
from medseg3d.networks.detection.roi_align import samples_along_axis

PIXELS = 2**26  # of the pictures that are made at a time, where they are thresholded


def masks_of_own_class(masks_NKMM: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Of the masks of all K classes that of each box's ``labels_N``, (N, M, M)."""
    return masks_NKMM[torch.arange(len(labels_N), device=labels_N.device), labels_N]


def paste_masks_in_image(
    masks_NMM: torch.Tensor,
    boxes_N4: torch.Tensor,
    image_size: Sequence[int],
    padding: int = 1,
    threshold: float | None = None,
) -> torch.Tensor:
    """Masks, resized to their boxes, in empty pictures.

    A mask is first padded by a border of zeros, and its box grows to match; the box's corners are then cut to whole
    pixels, the last one included. What lies outside of the image is left out.

    Args:
        masks_NMM: (N, M, M) or (N, 1, M, M): probabilities, or logits.
        boxes_N4: boxes of any place and size.
        image_size: (H, W).
        padding: width of the border, in pixels of the mask.
        threshold: return whether values are above it, which takes a fourth of the memory.

    Returns:
        (N, H, W), zero outside of the boxes; bool with ``threshold``.
    """
    masks = in_full_precision(masks_NMM.flatten(0, 1) if masks_NMM.dim() == 4 else masks_NMM)
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2] or len(masks) != len(boxes_N4):
        raise ValueError(
            f"masks must be square and one for each of {len(boxes_N4)} boxes, got a shape of {tuple(masks_NMM.shape)}"
        )
    height, width = image_size
    side = masks.shape[-1] + 2 * padding
    masks = F.pad(masks, (padding,) * 4)
    first_N2, last_N2 = _whole_pixels(boxes_N4, side / (side - 2 * padding))

    def pasted(part: slice) -> torch.Tensor:
        rows_NHM = _enlarging(first_N2[part, 1], last_N2[part, 1], side, height, masks.dtype)
        columns_NWM = _enlarging(first_N2[part, 0], last_N2[part, 0], side, width, masks.dtype)
        with torch.autocast(masks.device.type, enabled=False):
            return rows_NHM @ masks[part] @ columns_NWM.mT

    if threshold is None:
        return pasted(slice(None))
    pictures = torch.empty((len(masks), height, width), dtype=torch.bool, device=masks.device)
    at_a_time = max(1, PIXELS // (height * width))
    for start in range(0, len(masks), at_a_time):
        part = slice(start, start + at_a_time)
        pictures[part] = pasted(part) > threshold
    return pictures


def _whole_pixels(boxes_N4: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last pixels (N, 2), x and y, of boxes grown by ``scale`` about their centres, cut towards zero."""
    boxes = in_full_precision(boxes_N4)
    if scale == 1:  # exactly: a corner on a whole pixel stays there
        first, last = boxes[:, :2].long(), boxes[:, 2:].long()
        return first, torch.maximum(last, first)
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    first, last = (centre - half).long(), (centre + half).long()
    return first, torch.maximum(last, first)


def _enlarging(first_N: torch.Tensor, last_N: torch.Tensor, side: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Matrices (N, length, side) that stretch ``side`` values over the pixels from the first to the last, half-pixel
    centres, edges repeated; rows of zeros outside of them."""
    pixel = torch.arange(length, device=first_N.device) - first_N[:, None]
    extent = (last_N - first_N + 1)[:, None]
    position = ((pixel + 0.5) * (side / extent.to(dtype)) - 0.5).clamp(0, side - 1)[..., None]
    weights = (1 - (position - torch.arange(side, device=first_N.device)).abs()).clamp(min=0)
    return weights * ((pixel >= 0) & (pixel < extent))[..., None]


def project_masks_on_boxes(
    masks_GHW: torch.Tensor, boxes_N4: torch.Tensor, objects_N: torch.Tensor, size: int
) -> torch.Tensor:
    """Masks of objects in the frames of boxes, the training target of the mask head: (N, size, size), 0 to 1.

    RoIAlign with as many samples in a bin as it has pixels; values are not rounded to 0 and 1.

    Args:
        masks_GHW: masks of the objects of an image.
        boxes_N4: boxes.
        objects_N: the object of each box.
        size: bins of a side.
    """
    boxes = in_full_precision(boxes_N4.detach())
    targets = boxes.new_zeros((len(boxes), size, size))
    start_N2, extent_N2 = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    samples = (extent_N2 / size).ceil().long().tolist()
    height, width = masks_GHW.shape[1:]
    lengths = torch.tensor([[width], [height]], device=boxes.device)
    for i, (object_, (across, down)) in enumerate(zip(objects_N.tolist(), samples, strict=True)):
        start, extent = start_N2[i], extent_N2[i]
        rows, first_row = _averaging(start[1:], extent[1:], size, down, lengths[1])
        columns, first_column = _averaging(start[:1], extent[:1], size, across, lengths[0])
        crop = masks_GHW[object_, first_row : first_row + rows.shape[1], first_column : first_column + columns.shape[1]]
        with torch.autocast(boxes.device.type, enabled=False):
            targets[i] = rows @ crop.to(boxes.dtype) @ columns.T
    return targets


def _averaging(
    start_1: torch.Tensor, extent_1: torch.Tensor, bins: int, samples: int, length_1: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """A matrix (bins, pixels) that takes the means of bins, and the first of its pixels."""
    pixels_1BK, weights_1BK = samples_along_axis(start_1, extent_1, bins, samples, length_1)
    first, last = int(pixels_1BK.min()), int(pixels_1BK.max())
    matrix = weights_1BK.new_zeros((bins, last - first + 1))
    return matrix.scatter_add_(1, pixels_1BK[0] - first, weights_1BK[0]), first
