"""Scans in, segmentations out. Only here are image files opened.

The names below are imported when first used, so that a command that reads no file waits for no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg3d.io.atomic import write_atomic, write_text
    from medseg3d.io.coco import read_coco, read_coco_results, write_coco, write_coco_results
    from medseg3d.io.dicom import list_series, read_dicom
    from medseg3d.io.formats import RASTER_SUFFIXES
    from medseg3d.io.inputs import Case, Inputs, NothingFound, find_inputs
    from medseg3d.io.labels import LabelTable, default_color, sidecar_path
    from medseg3d.io.panoptic import read_panoptic, write_panoptic, write_panoptic_png
    from medseg3d.io.raster import read_image, read_label_image, write_image, write_label_image
    from medseg3d.io.volumes import (
        as_volume,
        read_geometry,
        read_label_table,
        read_volume,
        write_label_map,
        write_volume,
    )

_HOME = {
    "atomic": ("write_atomic", "write_text"),
    "coco": ("read_coco", "read_coco_results", "write_coco", "write_coco_results"),
    "dicom": ("list_series", "read_dicom"),
    "formats": ("RASTER_SUFFIXES",),
    "inputs": ("Case", "Inputs", "NothingFound", "find_inputs"),
    "labels": ("LabelTable", "default_color", "sidecar_path"),
    "panoptic": ("read_panoptic", "write_panoptic", "write_panoptic_png"),
    "raster": ("read_image", "read_label_image", "write_image", "write_label_image"),
    "volumes": ("as_volume", "read_geometry", "read_label_table", "read_volume", "write_label_map", "write_volume"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "RASTER_SUFFIXES",
    "Case",
    "Inputs",
    "LabelTable",
    "NothingFound",
    "as_volume",
    "default_color",
    "find_inputs",
    "list_series",
    "read_coco",
    "read_coco_results",
    "read_dicom",
    "read_geometry",
    "read_image",
    "read_label_image",
    "read_label_table",
    "read_panoptic",
    "read_volume",
    "sidecar_path",
    "write_atomic",
    "write_coco",
    "write_coco_results",
    "write_image",
    "write_label_image",
    "write_label_map",
    "write_panoptic",
    "write_panoptic_png",
    "write_text",
    "write_volume",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
