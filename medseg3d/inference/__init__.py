"""Strategies that bring a network and a volume together."""

from medseg3d.inference.sub_volumes import SubVolumes

__all__ = ["SubVolumes"]
