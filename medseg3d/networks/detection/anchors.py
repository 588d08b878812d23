"""Anchors: Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1.1, in the form that torchvision has of them.

Shape legend: ``anchors_A4`` are (x0, y0, x1, y1) in pixels of the padded image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Sizes = Sequence[float] | Sequence[Sequence[float]]
PYRAMID_SIZES = ((32,), (64,), (128,), (256,), (512,))
RATIOS = (0.5, 1.0, 2.0)


class AnchorGenerator:
    """Boxes of some sizes and shapes around every pixel of some maps.

    Args:
        sizes: for each map the square roots of the areas in pixels; one number stands for a map with one size.
        aspect_ratios: for each map heights over widths; one list of numbers holds for every map.

    Raises:
        ValueError: a size or ratio that is not positive, or other numbers of maps.
    """

    def __init__(self, sizes: Sizes = PYRAMID_SIZES, aspect_ratios: Sizes = RATIOS) -> None:
        self.sizes = [_floats(size) for size in sizes]
        shared = all(isinstance(ratio, int | float) for ratio in aspect_ratios)
        ratios = [value for ratio in aspect_ratios for value in _floats(ratio)]
        self.aspect_ratios = [ratios] * len(self.sizes) if shared else [_floats(ratio) for ratio in aspect_ratios]
        if len(self.sizes) != len(self.aspect_ratios):
            raise ValueError(
                f"sizes are those of {len(self.sizes)} maps and aspect_ratios those of {len(self.aspect_ratios)}: give "
                "both for every map, or one list of ratios for all"
            )
        if not self.sizes or any(not values or min(values) <= 0 for values in (*self.sizes, *self.aspect_ratios)):
            raise ValueError(f"sizes and ratios are positive, got {sizes} and {aspect_ratios}")
        self.cell_anchors = [_cell(size, ratio) for size, ratio in zip(self.sizes, self.aspect_ratios, strict=True)]

    def num_anchors_per_location(self) -> list[int]:
        """Anchors of each pixel of each map."""
        return [len(cell) for cell in self.cell_anchors]

    def __call__(self, features: Sequence[torch.Tensor], image_size: Sequence[int]) -> list[torch.Tensor]:
        """Anchors (A, 4) of each map, row by row, pixel by pixel; those of a pixel are neighbours.

        They lie on multiples of whole strides, image size // map size, without a shift by half a pixel.

        Args:
            features: maps (B, C, H, W).
            image_size: (height, width) of the padded images.

        Raises:
            ValueError: another number of maps than ``sizes`` has.
        """
        if len(features) != len(self.cell_anchors):
            raise ValueError(
                f"anchors have sizes for {len(self.cell_anchors)} maps, the backbone gives {len(features)}: pass as "
                "many sizes"
            )
        anchors = []
        for feature, cell in zip(features, self.cell_anchors, strict=True):
            dtype = torch.float64 if feature.dtype == torch.float64 else torch.float32
            height, width = feature.shape[-2:]
            x = torch.arange(width, device=feature.device, dtype=dtype) * (image_size[1] // width)
            y = torch.arange(height, device=feature.device, dtype=dtype) * (image_size[0] // height)
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((grid_x, grid_y, grid_x, grid_y), -1).reshape(-1, 1, 4)
            anchors.append((shifts + cell.to(shifts)).flatten(0, 1))
        return anchors


def _floats(values: float | Sequence[float]) -> list[float]:
    return [float(values)] if isinstance(values, int | float) else [float(value) for value in values]


def _cell(sizes: Sequence[float], ratios: Sequence[float]) -> torch.Tensor:
    """Anchors around 0, rounded (half to even), ratio by ratio."""
    size, ratio = torch.tensor(sizes), torch.tensor(ratios)
    height_ratio = ratio.sqrt()[:, None]
    heights, widths = (height_ratio * size).flatten(), (size / height_ratio).flatten()
    return (torch.stack((-widths, -heights, widths, heights), 1) / 2).round()
