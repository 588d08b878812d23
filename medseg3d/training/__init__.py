"""Iteration functions and defaults for MONAI's engines.

The names below are imported when first used: a bundle's inference needs ``channels_last``, but not the ``train`` extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg3d.training.checkpoint import ResumeFromLast
    from medseg3d.training.iterations import DetectionIteration, SegmentationIteration, channels_last
    from medseg3d.training.objects import ObjectF1
    from medseg3d.training.surface import HausdorffInMm

_MODULE_OF = {
    "DetectionIteration": "iterations",
    "HausdorffInMm": "surface",
    "ObjectF1": "objects",
    "ResumeFromLast": "checkpoint",
    "SegmentationIteration": "iterations",
    "channels_last": "iterations",
}

__all__ = [
    "DetectionIteration",
    "HausdorffInMm",
    "ObjectF1",
    "ResumeFromLast",
    "SegmentationIteration",
    "channels_last",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
