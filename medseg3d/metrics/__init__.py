"""How good is a segmentation: overlap in voxels, distances in mm, per label. NumPy and SciPy only."""

from medseg3d.metrics.evaluate import evaluate_case
from medseg3d.metrics.overlap import Overlap, dice, iou, overlaps
from medseg3d.metrics.surface import (
    SurfaceDistances,
    average_surface_distance,
    hausdorff,
    surface_dice,
    surface_distances,
)

__all__ = [
    "Overlap",
    "SurfaceDistances",
    "average_surface_distance",
    "dice",
    "evaluate_case",
    "hausdorff",
    "iou",
    "overlaps",
    "surface_dice",
    "surface_distances",
]
