"""RoIAlign: He et al., "Mask R-CNN", ICCV 2017, section 3, in the form that torchvision has of it.

A bin of a region is the mean of sampled points, a sample the bilinear mix of four pixels. Both are weighted sums of
pixels, and their weights are products of one factor for the row and one for the column. So all maps are laid out as one
table with a row of channels for each pixel, and each bin is a weighted sum of rows of that table, which is what
``embedding_bag`` computes: no sample is ever stored, and the gradient of the maps comes with it.

Shape legend: ``features_BCHW`` is (batch, channels, height, width); ``rois_R5`` are (image, x0, y0, x1, y1); P, Q are
the rows and columns of bins, K the pixels that a bin takes along an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.networks.detection.boxes import box_area, in_full_precision

LOOKUPS = 2**22  # pixels that are gathered at a time, which bounds the memory of their indices and weights


def roi_align(
    features_BCHW: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """Features of regions on a fixed grid, (R, C, P, Q), in channels-last memory format.

    Gradients reach the features, not the boxes. Samples more than a pixel outside of the map count as 0.

    Args:
        features_BCHW: maps of the images.
        boxes: (R, 5) with the index of the image first, or a list of (N, 4), one for each image.
        output_size: bins (P, Q), or one number for both.
        spatial_scale: pixels of the map per pixel of the boxes.
        sampling_ratio: samples of a bin along each axis; 0 or less for as many as it has pixels, rounded up.
        aligned: shift by half a pixel, as centres of pixels ask for, and let regions have any size; otherwise their
            sides are at least one pixel of the map (torchvision's detectors).

    Raises:
        ValueError: shapes that do not fit, or the index of an image that there is not.
    """
    rois_R5 = as_rois(boxes)
    _check(features_BCHW, rois_R5)
    levels_R = torch.zeros(len(rois_R5), dtype=torch.long, device=rois_R5.device)
    return _align([features_BCHW], [spatial_scale], rois_R5, levels_R, output_size, sampling_ratio, aligned)


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign on the level of a pyramid that suits a region's size (Lin et al., FPN, CVPR 2017, equation 1).

    Args:
        featmap_names: names of the maps that are used; others are not looked at.
        output_size: bins (P, Q), or one number for both.
        sampling_ratio: as for ``roi_align``.
        canonical_scale, canonical_level: sqrt(area) of a region, in pixels of the image, and its level, where stride
            2^k is level k.
        aligned, inclusive: conventions of ``roi_align`` and of the area.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | tuple[int, int],
        sampling_ratio: int = 2,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        inclusive: bool = False,
    ) -> None:
        super().__init__()
        self.featmap_names = tuple(featmap_names)
        self.output_size = pair(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale, self.canonical_level = canonical_scale, canonical_level
        self.aligned, self.inclusive = aligned, inclusive

    def forward(
        self,
        x: Mapping[str, torch.Tensor],
        boxes: Sequence[torch.Tensor],
        image_shapes: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Features (R, C, P, Q) of all boxes, image after image.

        Args:
            x: maps by name, the finest first.
            boxes: (N, 4) of each image, in pixels of the resized image.
            image_shapes: (height, width) of the resized images, best with their padding: the strides follow from the
                largest one, and below 68 pixels the padding makes a difference.
        """
        features = [x[name] for name in self.featmap_names if name in x]
        if not features:
            raise ValueError(f"none of the maps {', '.join(self.featmap_names)} is there, but {', '.join(x)}")
        rois_R5 = as_rois(boxes)
        _check(features[0], rois_R5)
        scales = [self._scale(feature, image_shapes) for feature in features]
        levels_R = self.levels(rois_R5[:, 1:], scales)
        return _align(features, scales, rois_R5, levels_R, self.output_size, self.sampling_ratio, self.aligned)

    @staticmethod
    def _scale(feature_BCHW: torch.Tensor, image_shapes: Sequence[tuple[int, int]]) -> float:
        """The power of two next to the ratio of the map's height to that of the largest image."""
        ratio = feature_BCHW.shape[2] / max(height for height, _ in image_shapes)
        return float(2 ** torch.tensor(ratio).log2().round())

    def levels(self, boxes_R4: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
        """Index of each box's map, (R,)."""
        first, last = (-round(torch.tensor(scale).log2().item()) for scale in (scales[0], scales[-1]))
        size = box_area(boxes_R4, self.inclusive).sqrt()
        levels = torch.floor(self.canonical_level + torch.log2(size / self.canonical_scale) + 1e-6)
        # An inverted box has no level and would have none of the features either.
        return levels.nan_to_num(first, posinf=last, neginf=first).clamp(first, last).long() - first

    def extra_repr(self) -> str:
        return f"{self.featmap_names}, {self.output_size}, sampling_ratio={self.sampling_ratio}"


def as_rois(boxes: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """(R, 5) with the index of the image first, of a list of (N, 4) for each image; (R, 5) as it is."""
    if isinstance(boxes, torch.Tensor):
        return boxes
    images = [torch.full_like(box[:, :1], image) for image, box in enumerate(boxes)]
    return torch.cat([torch.cat(images), torch.cat(list(boxes))], dim=1)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def samples_along_axis(
    start_R: torch.Tensor, extent_R: torch.Tensor, bins: int, samples: int, length_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels that each bin takes along an axis, and their weights: (R, bins, K) each.

    Args:
        start_R, extent_R: where regions start, and how long they are, in pixels of their map.
        bins: bins of a region.
        samples: samples of a bin; two pixels are taken for each.
        length_R: pixels of the maps.
    """
    bin_R11 = (extent_R / bins)[:, None, None]
    bin_index = torch.arange(bins, device=start_R.device)[:, None]
    centre = torch.arange(samples, device=start_R.device) + 0.5
    position = start_R[:, None, None] + bin_index * bin_R11 + centre * bin_R11 / samples
    length = length_R[:, None, None]
    inside = (position >= -1) & (position <= length)
    position = position.clamp(min=0)
    low = torch.minimum(position.long().clamp(min=0), length - 1)
    high = torch.minimum(low + 1, length - 1)
    share = torch.where(low < length - 1, position - low, 0)
    weights = torch.stack((1 - share, share), -1) / samples
    weights = torch.where(inside[..., None], weights, 0)
    return torch.stack((low, high), -1).flatten(2), weights.flatten(2)


def _align(
    features: Sequence[torch.Tensor],
    scales: Sequence[float],
    rois_R5: torch.Tensor,
    levels_R: torch.Tensor,
    output_size: int | tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """Regions on their levels: the maps become one table, the regions are put into groups of one number of samples."""
    dtype, device = features[0].dtype, features[0].device
    bins = pair(output_size)
    table = in_full_precision(torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], 1).flatten(0, 1))
    grids = torch.tensor([feature.shape[2:] for feature in features], device=device)
    pixels = grids.prod(1)
    with torch.no_grad():
        rois = rois_R5.detach().to(table.dtype)
        scale_R1 = torch.tensor(scales, dtype=table.dtype, device=device)[levels_R][:, None]
        start_R2 = rois[:, 1:3] * scale_R1 - 0.5 * aligned
        extent_R2 = rois[:, 3:5] * scale_R1 - 0.5 * aligned - start_R2
        if not aligned:
            extent_R2 = extent_R2.clamp(min=1)
        first_R = rois[:, 0].long() * pixels.sum() + (pixels.cumsum(0) - pixels)[levels_R]
        grid_R2 = grids[levels_R]
        counts = [sampling_ratio] * 2
        if sampling_ratio > 0:
            groups = [(counts, torch.arange(len(rois), device=device))]
        else:
            per_bin = extent_R2 / torch.tensor(bins[::-1], dtype=table.dtype, device=device)
            unique, which = per_bin.nan_to_num(0).ceil().clamp(min=0).long().unique(dim=0, return_inverse=True)
            groups = [(counts, torch.where(which == i)[0]) for i, counts in enumerate(unique.tolist())]
    pooled, order = [], []
    for (along_x, along_y), members in groups:
        lookups = 4 * bins[0] * bins[1] * max(1, along_x * along_y)
        for part in members.split(max(1, LOOKUPS // lookups)):
            with torch.no_grad():
                grid, start, extent = grid_R2[part], start_R2[part], extent_R2[part]
                rows = samples_along_axis(start[:, 1], extent[:, 1], bins[0], along_y, grid[:, 0])
                columns = samples_along_axis(start[:, 0], extent[:, 0], bins[1], along_x, grid[:, 1])
            pooled.append(_sum_of_pixels(table, first_R[part], grid[:, 1], rows, columns))
            order.append(part)
    if not pooled:
        return table.new_zeros((0, table.shape[1], *bins), dtype=dtype)
    result_RPQC = torch.cat(pooled) if len(pooled) > 1 else pooled[0]
    if len(pooled) > 1:
        result_RPQC = result_RPQC[torch.cat(order).argsort()]
    return result_RPQC.permute(0, 3, 1, 2).to(dtype)


def _sum_of_pixels(
    table_TC: torch.Tensor,
    first_R: torch.Tensor,
    width_R: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    columns: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Bins (R, P, Q, C): every pixel of a bin's rows and columns, times the product of its weights."""
    row_RPK, row_weight_RPK = rows
    column_RQK, column_weight_RQK = columns
    start_RPK = first_R[:, None, None] + row_RPK * width_R[:, None, None]
    index = start_RPK[:, :, None, :, None] + column_RQK[:, None, :, None, :]
    weight = row_weight_RPK[:, :, None, :, None] * column_weight_RQK[:, None, :, None, :]
    shape = index.shape[:3]
    if not index.numel():  # no regions, or inverted ones, which have no samples
        return table_TC.new_zeros((*shape, table_TC.shape[1]))
    index, weight = index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)
    bags = F.embedding_bag(index, table_TC, mode="sum", per_sample_weights=weight)
    return bags.unflatten(0, shape)


def _check(features_BCHW: torch.Tensor, rois_R5: torch.Tensor) -> None:
    if features_BCHW.dim() != 4:
        raise ValueError(f"features must be (batch, channels, height, width), got {tuple(features_BCHW.shape)}")
    if rois_R5.dim() != 2 or rois_R5.shape[1] != 5:
        raise ValueError(
            "boxes must be (R, 5) with the index of the image first, or a list of (N, 4) for each image, got a shape "
            f"of {tuple(rois_R5.shape)}"
        )
    if len(rois_R5):
        first, last = rois_R5[:, 0].min().item(), rois_R5[:, 0].max().item()
        if first < 0 or last >= len(features_BCHW):
            raise ValueError(
                f"the boxes name images {first:g} to {last:g}, there are maps of images 0 to {len(features_BCHW) - 1}"
            )
