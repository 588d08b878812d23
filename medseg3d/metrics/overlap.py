"""Measures of shared voxels: Dice, intersection over union, precision, recall and volumes, per label.

A ratio 0 / 0 is nan, "not defined", and never 0 or 1: where prediction and reference are both empty there is nothing to
agree or disagree on. `dice` and `iou` take `empty=1.0` for those who count it as agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from medseg3d.metrics.ratios import ratio
from medseg3d.metrics.regions import as_masks, label_masks


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of one label: in the prediction, in the reference, and in both."""

    predicted: int
    reference: int
    common: int

    @classmethod
    def of(cls, predicted: np.ndarray, reference: np.ndarray) -> Overlap:
        """Counts of two masks of the same shape, not 0 inside.

        Raises ValueError when the shapes differ, or a mask holds fractions such as probabilities.
        """
        predicted, reference = as_masks(predicted, reference)
        return cls(*(int(np.count_nonzero(mask)) for mask in (predicted, reference, predicted & reference)))

    @property
    def dice(self) -> float:
        """2 |P and R| / (|P| + |R|), in [0, 1]; 0 if one side is empty, nan if both are."""
        return ratio(2 * self.common, self.predicted + self.reference)

    @property
    def iou(self) -> float:
        """|P and R| / |P or R|, in [0, 1]; 0 if one side is empty, nan if both are."""
        return ratio(self.common, self.predicted + self.reference - self.common)

    @property
    def precision(self) -> float:
        """Share of the predicted voxels that are right, in [0, 1]; nan if nothing was predicted."""
        return ratio(self.common, self.predicted)

    @property
    def recall(self) -> float:
        """Share of the reference that was found (sensitivity), in [0, 1]; nan if the reference is empty."""
        return ratio(self.common, self.reference)

    @property
    def volume_error_percent(self) -> float:
        """100 (|P| - |R|) / |R|: -100 or more, negative where the prediction is too small; nan if R is empty."""
        return 100 * ratio(self.predicted - self.reference, self.reference)


def overlaps(prediction: np.ndarray, reference: np.ndarray, labels: Iterable[int]) -> dict[int, Overlap]:
    """`Overlap` of each label between two integer label maps of the same shape.

    Raises ValueError when the shapes differ, a map is not of integers, or a label is below 1.
    """
    return {label: Overlap.of(p, r) for label, p, r in label_masks(prediction, reference, labels)}


def dice(
    prediction: np.ndarray, reference: np.ndarray, labels: Iterable[int], empty: float = math.nan
) -> dict[int, float]:
    """Dice per label, in [0, 1]; `empty` where neither map holds the label. Arguments and errors as `overlaps`."""
    return _filled({label: o.dice for label, o in overlaps(prediction, reference, labels).items()}, empty)


def iou(
    prediction: np.ndarray, reference: np.ndarray, labels: Iterable[int], empty: float = math.nan
) -> dict[int, float]:
    """Intersection over union per label, in [0, 1]; else as `dice`."""
    return _filled({label: o.iou for label, o in overlaps(prediction, reference, labels).items()}, empty)


def _filled(values: dict[int, float], empty: float) -> dict[int, float]:
    return {label: empty if math.isnan(value) else value for label, value in values.items()}
