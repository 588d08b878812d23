"""A volume: an array on a voxel grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from medseg3d.geometry import Frame, Geometry

_OF_ONE_GRID = frozenset({"nifti", "qform"})  # what a header says of the grid it was read with, and of no other


@dataclass(frozen=True, eq=False)
class Volume:
    """An array (D, H, W) and its affine (4, 4), voxel index -> world mm, RAS+. A value: it never changes in place.

    The array is a read-only view of the caller's, not a copy. `header` is what a file says beyond its voxels and must
    survive a round trip: "format", "units", "time_units", "sform_code", "qform_code", "qform", "nifti", "path",
    "modality", "notes". Raises ValueError where `Geometry` does.
    """

    array: np.ndarray
    affine: np.ndarray
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        array = np.asarray(self.array).view()
        array.flags.writeable = False
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "affine", self.geometry.affine)

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self.array.shape, self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.geometry.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxel centres along each axis."""
        return self.geometry.spacing

    @property
    def orientation(self) -> str:
        """The anatomical direction in which each axis increases, such as "RAS"."""
        return self.geometry.orientation

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def with_array(self, array: np.ndarray) -> Volume:
        """Another array on the same grid, with the same header; ValueError if its shape differs."""
        if np.shape(array) != self.shape:
            raise ValueError(f"the array must have the shape of the volume's grid, {self.shape}, got {np.shape(array)}")
        return replace(self, array=array)

    def moved(self, frame: Frame, labels: bool = False, fill: float | None = None, order: int = 1) -> Volume:
        """The volume on the frame's target grid, as a label map if `labels`; ValueError if it is not on the source's.

        `fill` is the value where nothing is known: by default 0 for labels, and for an image its smallest value,
        such as air. The header keeps all but what describes the old grid ("nifti", "qform").
        """
        if not self.geometry.same_as(frame.source):
            raise ValueError(
                f"the frame starts from another grid than the volume's: {frame.source}, not {self.geometry}"
            )
        if labels:
            array = frame.label_map(self.array, fill=int(fill or 0))
        else:
            array = frame.image(self.array, fill=float(self.array.min()) if fill is None else fill, order=order)
        header = {key: value for key, value in self.header.items() if key not in _OF_ONE_GRID}
        return Volume(array, frame.target.affine, header)

    def reoriented(self, codes: str) -> Volume:
        """The volume with its axes in the order and the directions of `codes`, such as "RAS"."""
        return self.moved(self.geometry.reorient(codes), fill=0)
