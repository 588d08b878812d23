"""Strategies that bring a network and a volume together."""

from medseg3d.inference.body import BodyBox
from medseg3d.inference.coarse_to_fine import CoarseToFine
from medseg3d.inference.downsampled import Downsampled
from medseg3d.inference.overlap_tile import OverlapTile
from medseg3d.inference.slices import Slices
from medseg3d.inference.sub_volumes import SubVolumes

__all__ = ["BodyBox", "CoarseToFine", "Downsampled", "OverlapTile", "Slices", "SubVolumes"]
