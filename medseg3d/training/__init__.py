"""Iteration functions and defaults for MONAI's engines."""

from medseg3d.training.checkpoint import ResumeFromLast
from medseg3d.training.iterations import PartialLabelIteration, channels_last
from medseg3d.training.surface import HausdorffInMm

__all__ = ["HausdorffInMm", "PartialLabelIteration", "ResumeFromLast", "channels_last"]
