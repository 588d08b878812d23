"""Public weights in, with a report; our own weights out. Nothing that a file brings is ever run.

`load_checkpoint` reads a file (`files`), lays its names onto the network's (`names`), converts what old releases stored
differently (`conversions`), compares (`comparison`), settles the order of patch merging (`merging`) and loads all of it
or nothing.
"""

from __future__ import annotations

from medseg3d.checkpoints.loading import load_checkpoint
from medseg3d.checkpoints.report import CheckpointMismatch, CheckpointReport
from medseg3d.checkpoints.saving import save_checkpoint

__all__ = ["CheckpointMismatch", "CheckpointReport", "load_checkpoint", "save_checkpoint"]
