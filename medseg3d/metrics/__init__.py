"""How good is a segmentation: pixels, objects, panoptic quality, distances in mm. NumPy and SciPy only."""

from medseg3d.metrics.average_precision import CocoPrecision, CocoRules, VocPrecision
from medseg3d.metrics.confusion import Confusion
from medseg3d.metrics.evaluate import evaluate_case
from medseg3d.metrics.instances import ObjectCounts, object_counts, pairwise_iou, seg_measure
from medseg3d.metrics.overlap import Overlap, dice, iou, overlaps
from medseg3d.metrics.panoptic import PanopticQuality, Quality, SegmentCounts
from medseg3d.metrics.surface import (
    SurfaceDistances,
    average_surface_distance,
    hausdorff,
    surface_dice,
    surface_distances,
)

__all__ = [
    "CocoPrecision",
    "CocoRules",
    "Confusion",
    "ObjectCounts",
    "Overlap",
    "PanopticQuality",
    "Quality",
    "SegmentCounts",
    "SurfaceDistances",
    "VocPrecision",
    "average_surface_distance",
    "dice",
    "evaluate_case",
    "hausdorff",
    "iou",
    "object_counts",
    "overlaps",
    "pairwise_iou",
    "seg_measure",
    "surface_dice",
    "surface_distances",
]
