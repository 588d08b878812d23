"""What a segmentation is: a class for each pixel, single objects, or both; their codes and conversions.

NumPy and SciPy only; images (two axes) and scans (three) alike.
"""

from medseg3d.tasks.categories import Categories, Category
from medseg3d.tasks.conversions import (
    instances_from_panoptic,
    instances_from_semantic,
    panoptic_from_instances,
    panoptic_from_semantic,
    semantic_from_instances,
    semantic_from_panoptic,
)
from medseg3d.tasks.instances import Instances
from medseg3d.tasks.panoptic import VOID, Panoptic, Segment
from medseg3d.tasks.regions import Region, mask_boxes
from medseg3d.tasks.rle import RLE
from medseg3d.tasks.semantic import SemanticMap

__all__ = [
    "RLE",
    "VOID",
    "Categories",
    "Category",
    "Instances",
    "Panoptic",
    "Region",
    "Segment",
    "SemanticMap",
    "instances_from_panoptic",
    "instances_from_semantic",
    "mask_boxes",
    "panoptic_from_instances",
    "panoptic_from_semantic",
    "semantic_from_instances",
    "semantic_from_panoptic",
]
