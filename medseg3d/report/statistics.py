"""How large, how dense and where: figures of every label of a segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from medseg3d.geometry import Geometry
from medseg3d.metrics.regions import Box, label_boxes
from medseg3d.report.records import grid_record, require_same_grid, six_digits, write_csv, write_json
from medseg3d.volume import Volume

_PERCENTILES = (5, 25, 50, 75, 95)
_INTENSITIES = ("mean", "median", "std", "p5", "p25", "p75", "p95")
_FIGURES = ("voxels", "volume_ml", "hu", "centroid_ras_mm", "bounding_box", "touches_border", "components")

# Axis code -> the face of the scan where that axis ends, and the one where it begins.
_FACES = {
    "L": ("left", "right"),
    "R": ("right", "left"),
    "A": ("anterior", "posterior"),
    "P": ("posterior", "anterior"),
    "S": ("superior", "inferior"),
    "I": ("inferior", "superior"),
}


def statistics(segmentation: Volume, image: Volume, labels: Mapping[int, str]) -> dict[str, Any]:
    """Figures per label (id -> name; the background 0 is left out), ready for JSON.

    Returns `{"grid": ..., "voxel_volume_mm3": ..., "labels": {name: figures}}`. The figures are

    - label, voxels, volume_ml;
    - hu: mean, median, std, p5, p25, p75, p95 of the image within the label; NaN and infinite voxels are left out;
    - centroid_ras_mm: mean of the voxel centres, in world mm, RAS+;
    - bounding_box: start and stop (voxels, half-open) and size_mm along the array's axes;
    - touches_border: the faces of the scan ("inferior", ...) that the label reaches, where it may be cut off;
    - components: separate pieces; voxels that share a face, an edge or a corner hang together;
    - reason: None, or why all of the above but label are None: an absent organ has no volume, rather than the volume 0.

    Raises ValueError when the two volumes are not on the same grid.
    """
    require_same_grid(segmentation.geometry, image.geometry, ("the segmentation", "the image"))
    boxes = label_boxes(segmentation.array, (label for label in labels if label != 0))
    figures: dict[str, Any] = {}
    for label, name in labels.items():
        if label == 0:
            continue
        key = f"{name} ({label})" if name in figures else name
        figures[key] = {"label": label, **dict.fromkeys(_FIGURES), "reason": None}
        if label in boxes:
            box = boxes[label]
            figures[key] |= _figures(segmentation.array[box] == label, image.array[box], box, image.geometry)
        else:
            figures[key]["reason"] = "no voxel of the segmentation has this label"
    return {
        "grid": grid_record(image.geometry),
        "voxel_volume_mm3": six_digits(image.geometry.voxel_volume),
        "labels": figures,
    }


def write_statistics_json(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write what `statistics` returned as JSON, atomically."""
    return write_json(path, result)


def write_statistics_csv(path: str | Path, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write one line per case and label, atomically, of what `statistics` returned for each case (name -> result)."""
    rows = [_row(case, name, figures) for case, result in results.items() for name, figures in result["labels"].items()]
    return write_csv(path, rows, _COLUMNS)


def _figures(mask: np.ndarray, image: np.ndarray, box: Box, geometry: Geometry) -> dict[str, Any]:
    """Of one label, from its mask and the image within its box."""
    start, stop = np.array([(s.start, s.stop) for s in box]).T
    voxels = int(np.count_nonzero(mask))
    return {
        "voxels": voxels,
        "volume_ml": six_digits(voxels * geometry.voxel_volume / 1000),
        "hu": _intensities(_inside(mask, image)),
        "centroid_ras_mm": _rounded(geometry.world(start + _centre(mask))),
        "bounding_box": {
            "start": start.tolist(),
            "stop": stop.tolist(),
            "size_mm": _rounded((stop - start) * geometry.spacing),
        },
        "touches_border": _faces(start, stop, geometry),
        "components": int(cc3d.connected_components(mask.view(np.uint8), connectivity=26, return_N=True)[1]),
    }


def _inside(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The voxels of an image in a mask, in the order in which they lie in memory."""
    return image.T[mask.T] if mask.flags.f_contiguous else image[mask]


def _intensities(values: np.ndarray) -> dict[str, float | None]:
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not len(values):
        return dict.fromkeys(_INTENSITIES)
    p5, p25, median, p75, p95 = _percentiles(values)
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    return dict(zip(_INTENSITIES, _rounded(np.array([mean, median, std, p5, p25, p75, p95])), strict=True))


def _percentiles(values: np.ndarray) -> np.ndarray:
    """Those of ``_PERCENTILES``, linear between two values; selected in the values' own type, which is much faster."""
    places = np.array(_PERCENTILES) / 100 * (len(values) - 1)
    below, above = np.floor(places).astype(int), np.ceil(places).astype(int)
    ordered = np.partition(values, np.union1d(below, above))
    low, high = ordered[below].astype(np.float64), ordered[above].astype(np.float64)
    return low + (high - low) * (places - below)


def _centre(mask: np.ndarray) -> np.ndarray:
    """Mean index of the True voxels along each axis."""
    counts = (mask.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1)))
    return np.array([np.average(np.arange(len(count)), weights=count) for count in counts])


def _faces(start: np.ndarray, stop: np.ndarray, geometry: Geometry) -> list[str]:
    faces = []
    for code, first, last, size in zip(geometry.orientation, start, stop, geometry.shape, strict=True):
        end, beginning = _FACES[code]
        if first == 0:
            faces.append(beginning)
        if last == size:
            faces.append(end)
    return faces


def _rounded(values: np.ndarray) -> list[float]:
    return [six_digits(value) for value in values.tolist()]


_COLUMNS = (
    *("case", "label", "name", "voxels", "volume_ml"),
    *(f"hu_{name}" for name in _INTENSITIES),
    *(f"centroid_{axis}_mm" for axis in "ras"),
    *(f"box_{end}_{axis}" for end in ("start", "stop") for axis in "ijk"),
    *(f"box_size_{axis}_mm" for axis in "ijk"),
    *("touches_border", "components", "reason"),
)


def _row(case: str, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the CSV: the nested figures side by side."""
    row = {"case": case, "name": name, **{key: figures[key] for key in _COLUMNS if key in figures}}
    if figures["reason"] is None:
        box = figures["bounding_box"]
        row["touches_border"] = " ".join(figures["touches_border"])
        row |= {f"hu_{key}": value for key, value in figures["hu"].items()}
        row |= {f"centroid_{axis}_mm": mm for axis, mm in zip("ras", figures["centroid_ras_mm"], strict=True)}
        row |= {f"box_{end}_{axis}": n for end in ("start", "stop") for axis, n in zip("ijk", box[end], strict=True)}
        row |= {f"box_size_{axis}_mm": mm for axis, mm in zip("ijk", box["size_mm"], strict=True)}
    return row
