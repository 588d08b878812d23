"""What the reports share: how a grid is described and compared, and JSON and CSV files that are whole or absent."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medseg3d.geometry import Geometry
from medseg3d.io import write_atomic, write_text


def grid_record(geometry: Geometry) -> dict[str, Any]:
    """A grid for JSON: shape, spacing_mm, orientation, origin_mm (world RAS+ of the first voxel's centre)."""
    return {
        "shape": list(geometry.shape),
        "spacing_mm": [round(mm, 6) for mm in geometry.spacing],
        "orientation": geometry.orientation,
        "origin_mm": [round(mm, 4) for mm in geometry.affine[:3, 3].tolist()],
    }


def require_same_grid(first: Geometry, second: Geometry, names: tuple[str, str]) -> None:
    """ValueError that describes both grids, the grids of `names`, unless they agree in space to 1/20 voxel."""
    if not first.coincides(second):
        grids = (f"{name} on {g}" for name, g in zip(names, (first, second), strict=True))
        raise ValueError(f"both must lie on one grid, got {' and '.join(grids)}; resample one onto the other first")


def six_digits(value: float) -> float:
    """Rounded to six digits that count: neither a voxel of micrometres nor an image from 0 to 0.001 becomes 0."""
    return float(f"{value:.6g}")


def write_json(path: str | Path, data: Any) -> Path:
    """Write `data` as JSON, atomically; None becomes null. ValueError if it holds NaN or infinity, unknown to JSON."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(path, text)


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> Path:
    """Write one line per row with a header, atomically; fractions with six digits, None as an empty cell."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    return write_atomic(path, write)
