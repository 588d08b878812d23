"""Iteration functions and defaults for MONAI's engines.

The names below are imported when first used: a bundle's inference needs ``channels_last``, but not the ``train`` extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg3d.training.averaging import AveragedWeights
    from medseg3d.training.checkpoint import BestWeights, ResumeFromLast
    from medseg3d.training.curves import Curves
    from medseg3d.training.guard import Guarded
    from medseg3d.training.iterations import DetectionIteration, Diverged, SegmentationIteration, channels_last
    from medseg3d.training.muon import Muon
    from medseg3d.training.objects import ObjectAP, ObjectF1
    from medseg3d.training.pretraining import PretrainingIteration, PretrainingValidation
    from medseg3d.training.schedules import WarmupCosine
    from medseg3d.training.seeds import SeedEveryEpoch
    from medseg3d.training.stopping import StopEarly
    from medseg3d.training.surface import HausdorffInMm

_MODULE_OF = {
    "AveragedWeights": "averaging",
    "BestWeights": "checkpoint",
    "Curves": "curves",
    "DetectionIteration": "iterations",
    "Diverged": "iterations",
    "Guarded": "guard",
    "HausdorffInMm": "surface",
    "Muon": "muon",
    "ObjectAP": "objects",
    "ObjectF1": "objects",
    "PretrainingIteration": "pretraining",
    "PretrainingValidation": "pretraining",
    "ResumeFromLast": "checkpoint",
    "SeedEveryEpoch": "seeds",
    "SegmentationIteration": "iterations",
    "StopEarly": "stopping",
    "WarmupCosine": "schedules",
    "channels_last": "iterations",
}

__all__ = [
    "AveragedWeights",
    "BestWeights",
    "Curves",
    "DetectionIteration",
    "Diverged",
    "Guarded",
    "HausdorffInMm",
    "Muon",
    "ObjectAP",
    "ObjectF1",
    "PretrainingIteration",
    "PretrainingValidation",
    "ResumeFromLast",
    "SeedEveryEpoch",
    "SegmentationIteration",
    "StopEarly",
    "WarmupCosine",
    "channels_last",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
