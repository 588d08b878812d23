"""Object by object: which predicted instance is which of the reference, and how many were found. Any number of axes.

`ObjectCounts` for predictions that are simply there (label maps, nuclei); average precision, which ranks predictions by
their score, is in `average_precision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from medseg3d.metrics.ratios import ratio
from medseg3d.metrics.summing import Summable
from medseg3d.tasks import Instances

Geometry = Literal["masks", "boxes"]


def pairwise_iou(
    rows: Instances, columns: Instances, geometry: Geometry = "masks", crowd: bool = False, inclusive: bool = False
) -> np.ndarray:
    """Intersection over union of each instance in ``rows`` with each in ``columns``: (rows, columns), in [0, 1].

    Pairs of empty masks or boxes have 0. With ``crowd`` the union with a crowd in ``columns`` is the instance of the
    row alone, as in COCO. ``inclusive`` counts the last pixel of a box as in VOC: widths are x1 - x0 + 1.

    Raises:
        ValueError: the images have two shapes.
    """
    if rows.shape != columns.shape:
        raise ValueError(f"instances to compare lie in one image, got the shapes {rows.shape} and {columns.shape}")
    if geometry == "masks":
        common, sizes, others = _common_voxels(rows, columns), _voxels(rows), _voxels(columns)
    elif geometry == "boxes":
        common, sizes, others = _common_boxes(rows.boxes, columns.boxes, float(inclusive))
    else:
        raise ValueError(f"geometry is 'masks' or 'boxes', got {geometry!r}")
    unions = sizes[:, None] + others - common
    if crowd:
        unions = np.where(columns.crowd, sizes[:, None], unions)
    return np.divide(common, unions, out=np.zeros(common.shape), where=common > 0)


@dataclass(frozen=True)
class ObjectCounts(Summable):
    """Objects found, false alarms and objects missed, at one IoU threshold. A value; ``+`` adds images up."""

    found: int = 0
    false_alarms: int = 0
    missed: int = 0

    @classmethod
    def of(
        cls,
        prediction: Instances,
        reference: Instances,
        threshold: float = 0.5,
        geometry: Geometry = "masks",
        classes: bool = True,
    ) -> ObjectCounts:
        """The counts of one image or scan.

        As many pairs of IoU >= ``threshold`` are made as can be, each object in one pair at most; with ``classes`` only
        within a class. Crowds of the reference are neither found nor missed, and a prediction without a pair that lies
        in one of them by that share is no false alarm.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"the IoU threshold lies above 0 and up to 1, got {threshold}")
        iou = pairwise_iou(prediction, reference, geometry, crowd=True)
        possible = iou >= threshold
        if classes:
            possible &= prediction.classes[:, None] == reference.classes
        paired = possible & ~reference.crowd
        # A pair more outweighs any IoU.
        rows, columns = linear_sum_assignment(np.where(paired, 1 + min(iou.shape) + iou, 0), maximize=True)
        hit = paired[rows, columns]
        alone = np.ones(len(prediction), bool)
        alone[rows[hit]] = False
        alarms = alone & ~(possible & reference.crowd).any(axis=1)
        found = int(hit.sum())
        return cls(found, int(alarms.sum()), int((~reference.crowd).sum()) - found)

    def __add__(self, other: ObjectCounts) -> ObjectCounts:
        return ObjectCounts(
            self.found + other.found, self.false_alarms + other.false_alarms, self.missed + other.missed
        )

    @property
    def precision(self) -> float:
        """Share of the predicted objects that are right; nan if nothing was predicted."""
        return ratio(self.found, self.found + self.false_alarms)

    @property
    def recall(self) -> float:
        """Share of the reference's objects that were found; nan if there are none."""
        return ratio(self.found, self.found + self.missed)

    @property
    def f1(self) -> float:
        """2 found / (2 found + false alarms + missed); nan if neither side has an object."""
        return ratio(2 * self.found, 2 * self.found + self.false_alarms + self.missed)

    @property
    def threat_score(self) -> float:
        """found / (found + false alarms + missed): the measure whose mean over thresholds ranked the 2018 Data Science
        Bowl."""
        return ratio(self.found, self.found + self.false_alarms + self.missed)


def object_counts(
    prediction: Instances, reference: Instances, thresholds: Sequence[float] = (0.5,), geometry: Geometry = "masks"
) -> dict[float, ObjectCounts]:
    """`ObjectCounts` at each threshold."""
    return {threshold: ObjectCounts.of(prediction, reference, threshold, geometry) for threshold in thresholds}


def seg_measure(prediction: Instances, reference: Instances) -> float:
    """SEG of the Cell Tracking Challenge, in [0, 1]: the mean, over the objects R of the reference, of the IoU with the
    one object S that holds more than half of it, or 0 where there is none; nan without a reference.

    Maška et al., "A benchmark for comparison of cell tracking algorithms", Bioinformatics 30, 2014.
    """
    if not len(reference):
        return float("nan")
    common = _common_voxels(reference, prediction)
    matched = common > 0.5 * _voxels(reference)[:, None]
    return float((pairwise_iou(reference, prediction) * matched).max(axis=1, initial=0.0).mean())


def _voxels(instances: Instances) -> np.ndarray:
    return np.array([region.area for region in instances.regions], float)


def _common_voxels(rows: Instances, columns: Instances) -> np.ndarray:
    common = np.zeros((len(rows), len(columns)))
    axes = len(rows.shape)
    (low, high), (low_, high_) = (
        np.array([(r.corner, np.add(r.corner, r.inside.shape)) for r in side.regions], int)
        .reshape(-1, 2, axes)
        .swapaxes(0, 1)
        for side in (rows, columns)
    )
    meet = (np.maximum(low[:, None], low_) < np.minimum(high[:, None], high_)).all(axis=-1)
    for i, j in np.argwhere(meet).tolist():
        common[i, j] = rows.regions[i].common(columns.regions[j])
    return common


def _common_boxes(rows: np.ndarray, columns: np.ndarray, extra: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Common volumes (rows, columns) of boxes, and the volumes of either side; ``extra`` is added to each width."""
    axes = rows.shape[1] // 2

    def volume(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.prod((high - low + extra).clip(0), axis=-1)

    low = np.maximum(rows[:, None, :axes], columns[:, :axes])
    high = np.minimum(rows[:, None, axes:], columns[:, axes:])
    return (
        volume(low, high),
        volume(rows[:, :axes], rows[:, axes:]),
        volume(columns[:, :axes], columns[:, axes:]),
    )
