"""One case against its reference: a row of measures for every label."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from medseg3d.metrics.overlap import Overlap
from medseg3d.metrics.regions import label_masks
from medseg3d.metrics.surface import SurfaceDistances, voxel_steps

Row = dict[str, Any]

COLUMNS = (
    *("label", "name", "dice", "nsd", "nsd_tolerance_mm", "hd95_mm", "hd_mm", "assd_mm", "iou", "precision", "recall"),
    *("volume_ml", "reference_ml", "volume_error_ml", "volume_error_percent", "note"),
)


def evaluate_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] | np.ndarray,
    labels: Mapping[int, str],
    nsd_tolerance_mm: float = 2.0,
    ignore: Collection[int] = (),
) -> list[Row]:
    """Measures of each label (id -> name; the background 0 is left out) between two label maps of the same shape.

    The keys of a row are `COLUMNS`. A value is None where it is not defined, and "note" says why:

    - a label in `ignore` (not annotated in this case), or one that the reference does not hold, has nothing to be
      compared with: all is None but the predicted volume, and the row must not enter a mean;
    - a label of the reference that was not predicted has Dice, IoU, recall and NSD 0; distances and precision are None.

    `spacing` in mm, or a matrix of voxel steps, as in `surface_distances`. Raises ValueError as `surface_distances`.
    """
    voxel_ml = abs(float(np.linalg.det(voxel_steps(spacing, prediction.ndim)))) / 1000
    organs = [label for label in labels if label != 0]
    rows = []
    for label, predicted, expected in label_masks(prediction, reference, organs):
        overlap = Overlap.of(predicted, expected)
        row: Row = dict.fromkeys(COLUMNS)
        row |= {"label": label, "name": labels[label], "note": ""}
        row |= {"nsd_tolerance_mm": nsd_tolerance_mm, "volume_ml": overlap.predicted * voxel_ml}
        if label in ignore:
            row["note"] = "not annotated in the reference"
        elif not overlap.reference:
            row["note"] = "absent from the reference" + (", yet predicted" if overlap.predicted else "")
        else:
            distances = SurfaceDistances.of(predicted, expected, spacing)
            row |= _measures(overlap, distances, nsd_tolerance_mm, voxel_ml)
            row["note"] = "" if overlap.predicted else "not predicted"
        rows.append(row)
    return rows


def _measures(overlap: Overlap, distances: SurfaceDistances, nsd_tolerance_mm: float, voxel_ml: float) -> Row:
    values = {
        "dice": overlap.dice,
        "nsd": distances.dice(nsd_tolerance_mm),
        "hd95_mm": distances.hausdorff(95),
        "hd_mm": distances.hausdorff(),
        "assd_mm": distances.average(),
        "iou": overlap.iou,
        "precision": overlap.precision,
        "recall": overlap.recall,
        "reference_ml": overlap.reference * voxel_ml,
        "volume_error_ml": (overlap.predicted - overlap.reference) * voxel_ml,
        "volume_error_percent": overlap.volume_error_percent,
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
