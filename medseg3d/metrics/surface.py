"""Distances between surfaces in mm: Hausdorff, average surface distance, normalised surface Dice, per label.

The surface of a mask is its voxels with a face neighbour outside it; what lies beyond the array counts as outside, so
an organ cut by the edge of the scan has a surface there. Each surface voxel stands for its centre. Distances are exact,
from a k-d tree over the surface voxels of the other side: their cost grows with the surface, not with the volume.

Empty masks: with both sides empty every measure is nan (nothing to measure); with one side empty distances are inf and
the surface Dice is 0. Percentiles follow the same rule (MONAI 1.6 gives nan there).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from medseg3d.metrics.regions import as_masks, label_masks


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance in mm from every surface voxel of one side to the nearest one of the other side.

    `to_reference` has one value per surface voxel of the prediction, `to_prediction` one per surface voxel of the
    reference; values are inf where the other side is empty.
    """

    to_reference: np.ndarray
    to_prediction: np.ndarray

    @classmethod
    def of(
        cls, predicted: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | np.ndarray
    ) -> SurfaceDistances:
        """Distances between two masks of the same shape, not 0 inside; `spacing` as in `surface_distances`.

        Raises ValueError when the shapes differ, a mask holds fractions, or the spacing does not fit.
        """
        predicted, reference = as_masks(predicted, reference)
        steps = voxel_steps(spacing, predicted.ndim)
        p, r = (np.argwhere(surface(mask)) @ steps.T for mask in (predicted, reference))
        return cls(_nearest(p, r), _nearest(r, p))

    def hausdorff(self, percentile: float = 100.0, directed: bool = False) -> float:
        """Hausdorff distance in mm, or a percentile of it: the larger of the two directed percentiles.

        So `hausdorff(95)` is HD95 as in MONAI, not the 95th percentile of the pooled distances that other tools give.
        `directed=True` looks from the prediction to the reference only. `percentile` lies in (0, 100], interpolated
        linearly.
        """
        if not 0 < percentile <= 100:
            raise ValueError(f"a Hausdorff percentile lies above 0 and up to 100, got {percentile}; 100 is the maximum")
        if (missing := self._missing()) is not None:
            return missing
        sides = [self.to_reference] if directed else [self.to_reference, self.to_prediction]
        return max(float(np.percentile(side, percentile)) for side in sides)

    def average(self, symmetric: bool = True) -> float:
        """Average surface distance in mm: over the surface voxels of both sides (ASSD), or of the prediction (ASD)."""
        if (missing := self._missing()) is not None:
            return missing
        return float(np.mean(self._pooled() if symmetric else self.to_reference))

    def dice(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: share of both surfaces, in [0, 1], that lies within `tolerance_mm` of the other.

        Counted in surface voxels, not weighted by area.
        """
        if not tolerance_mm >= 0:  # which NaN is not
            raise ValueError(f"the tolerance of the surface Dice is a distance of 0 mm or more, got {tolerance_mm}")
        pooled = self._pooled()
        # A voxel exactly at the tolerance is within it, whatever the rounding: 3 * 0.1 > 0.3 in floating point.
        return float(np.mean(pooled <= tolerance_mm * (1 + 1e-6))) if len(pooled) else math.nan

    def _pooled(self) -> np.ndarray:
        return np.concatenate([self.to_reference, self.to_prediction])

    def _missing(self) -> float | None:
        """What a distance is when a side is empty; None when neither is."""
        empty_sides = (len(self.to_reference) == 0) + (len(self.to_prediction) == 0)
        return (None, math.inf, math.nan)[empty_sides]


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | np.ndarray, labels: Iterable[int]
) -> dict[int, SurfaceDistances]:
    """`SurfaceDistances` of each label between two integer label maps of the same shape.

    `spacing` is the voxel size in mm per axis, or, where the axes are not perpendicular, the matrix whose columns are
    the steps of one voxel in mm (`affine[:3, :3]`). Raises ValueError when the shapes differ, a map is not of integers,
    a label is below 1, or the spacing does not fit.
    """
    masks = label_masks(prediction, reference, labels)
    return {label: SurfaceDistances.of(p, r, spacing) for label, p, r in masks}


def hausdorff(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] | np.ndarray,
    labels: Iterable[int],
    percentile: float = 100.0,
) -> dict[int, float]:
    """Hausdorff distance per label in mm (`percentile=95` for HD95); see `SurfaceDistances.hausdorff`."""
    distances = surface_distances(prediction, reference, spacing, labels)
    return {label: d.hausdorff(percentile) for label, d in distances.items()}


def average_surface_distance(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] | np.ndarray,
    labels: Iterable[int],
    symmetric: bool = True,
) -> dict[int, float]:
    """Average (symmetric) surface distance per label in mm; see `SurfaceDistances.average`."""
    distances = surface_distances(prediction, reference, spacing, labels)
    return {label: d.average(symmetric) for label, d in distances.items()}


def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] | np.ndarray,
    labels: Iterable[int],
    tolerance_mm: float = 2.0,
) -> dict[int, float]:
    """Normalised surface Dice per label, in [0, 1]; see `SurfaceDistances.dice`."""
    distances = surface_distances(prediction, reference, spacing, labels)
    return {label: d.dice(tolerance_mm) for label, d in distances.items()}


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a bool mask, any dimension, that have a face neighbour outside it or lie on the array's edge."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        along, here = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        here[1:] &= along[:-1]
        here[:-1] &= along[1:]
        here[:1] = here[-1:] = False
    return mask & ~inner


def voxel_steps(spacing: Sequence[float] | np.ndarray, ndim: int) -> np.ndarray:
    """The (ndim, ndim) matrix that turns voxel steps into mm, from a spacing or from such a matrix itself."""
    steps = np.asarray(spacing, dtype=float)
    steps = np.diag(steps) if steps.ndim == 1 else steps
    if steps.shape != (ndim, ndim) or not np.isfinite(steps).all() or np.linalg.det(steps) == 0:
        raise ValueError(
            f"the spacing is {ndim} sizes in mm, none of them 0, or a ({ndim}, {ndim}) matrix of voxel steps;"
            f" got {spacing}"
        )
    return steps


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    if not len(points) or not len(others):
        return np.full(len(points), math.inf)
    return KDTree(others).query(points)[0]
