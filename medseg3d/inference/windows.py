"""Where windows lie in an image, and how much each voxel of a window counts. Any number of spatial axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import ceil

import torch

BLENDS = ("gaussian", "constant")
PLACEMENTS = ("monai", "even")

Window = tuple[slice, ...]


def window_starts(
    image_size: Sequence[int], roi_size: Sequence[int], overlap: Sequence[float], placement: str = "monai"
) -> list[list[int]]:
    """First indices of the windows along each axis.

    "monai": the step is ``int(roi * (1 - overlap))`` and at least 1; the last window is moved back to end with the
    image. Mind floating point: roi 10 with overlap 0.8 gives int(1.9999) = 1. "even", as nnU-Net places them: as many
    windows as steps of ``roi * (1 - overlap)`` need, at equal distances (Isensee et al., Nature Methods 2021).
    """
    starts = []
    for size, roi, share in zip(image_size, roi_size, overlap, strict=True):
        last = max(size - roi, 0)
        if placement == "even":
            steps = ceil(last / (roi * (1 - share)))
            starts.append([round(last * n / max(steps, 1)) for n in range(steps + 1)])
        else:
            step = roi if roi == size else max(1, int(roi * (1 - share)))
            starts.append([min(step * n, last) for n in range(-(-last // step) + 1)])
    return starts


def windows(
    image_size: Sequence[int], roi_size: Sequence[int], overlap: Sequence[float], placement: str = "monai"
) -> Iterator[Window]:
    """The windows themselves as slices, the first axis slowest."""
    for corner in product(*window_starts(image_size, roi_size, overlap, placement)):
        yield tuple(slice(start, start + roi) for start, roi in zip(corner, roi_size, strict=True))


def importance_map(
    roi_size: Sequence[int], blend: str = "gaussian", sigma_scale: float | Sequence[float] = 0.125
) -> torch.Tensor:
    """Weight of each voxel of a window, float32, shape ``roi_size``.

    "gaussian" has its centre in the middle of the window and a standard deviation of ``sigma_scale`` times the window's
    size; it is held at 1e-3 or above so that corners keep a weight. "constant" is 1 everywhere.
    """
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
    if blend == "constant":
        return torch.ones(tuple(roi_size))
    sigmas = [sigma_scale] * len(roi_size) if isinstance(sigma_scale, int | float) else list(sigma_scale)
    weight = torch.ones(())
    for size, sigma in zip(roi_size, sigmas, strict=True):
        x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(x**2 / (-2 * (sigma * size) ** 2))
    return weight.clamp(min=max(float(weight.min()), 1e-3))
