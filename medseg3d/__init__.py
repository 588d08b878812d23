"""medseg3d: 3D medical image segmentation with slices, downsampled volumes and sub-volumes.

The names below are imported when they are first used: importing medseg3d imports neither torch nor MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medseg3d.version import __version__

if TYPE_CHECKING:
    from medseg3d.bundle import load_model
    from medseg3d.data.sample import sample_ct
    from medseg3d.geometry import Geometry
    from medseg3d.io import LabelTable, read_volume, write_label_map
    from medseg3d.pictures import PictureSegmentation, PictureSegmenter
    from medseg3d.segmentation import Segmentation
    from medseg3d.segmenter import Segmenter
    from medseg3d.volume import Volume

_MODULE_OF = {
    "Geometry": "medseg3d.geometry",
    "LabelTable": "medseg3d.io",
    "PictureSegmentation": "medseg3d.pictures",
    "PictureSegmenter": "medseg3d.pictures",
    "Segmentation": "medseg3d.segmentation",
    "Segmenter": "medseg3d.segmenter",
    "Volume": "medseg3d.volume",
    "load_model": "medseg3d.bundle",
    "read_volume": "medseg3d.io",
    "sample_ct": "medseg3d.data.sample",
    "write_label_map": "medseg3d.io",
}

__all__ = [
    "Geometry",
    "LabelTable",
    "PictureSegmentation",
    "PictureSegmenter",
    "Segmentation",
    "Segmenter",
    "Volume",
    "__version__",
    "load_model",
    "read_volume",
    "sample_ct",
    "write_label_map",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
