"""Is this a CT that a CT model can read? Damage is refused, doubts are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from medseg3d.volume import Volume

_FEWEST = 4  # voxels along an axis
_NARROW = 100  # HU; the noise of a CT alone spans more
_NO_AIR = -200  # HU; fat, lung and air lie below
_PADDING = -1500  # HU; nothing in a body, nor the air around it, is below
_DENSEST = 32_000  # HU; above any metal on the extended scale
_CLIPPED = 0.005  # share of voxels at the maximum that noise and metal never reach
_SPACING = (0.1, 20.0)  # mm
_FIELD = 40.0  # mm; no CT of a patient is smaller along all three axes
_BLOCK = 2**18  # voxels that are compared at a time


def check_voxels(volume: Volume) -> tuple[float, float]:
    """Refuse what cannot be segmented, of whatever modality; return the lowest and the highest intensity.

    Raises:
        ValueError: NaN or infinite voxels, one intensity everywhere, or an axis of fewer than 4 voxels.
    """
    array = volume.array
    if min(volume.shape) < _FEWEST:
        what = "a single slice" if min(volume.shape) == 1 else f"of shape {volume.shape}"
        path = Path(volume.header.get("path", ""))
        of_series = volume.header.get("format") == "dicom" and path.is_file() and path.suffix.lower() != ".zip"
        whole = f"the folder of its series, {path.parent}" if of_series else "the whole scan"
        raise ValueError(f"the volume is {what}; each axis needs at least {_FEWEST} voxels: give {whole}")
    low, high = float(array.min()), float(array.max())
    if not np.isfinite((low, high)).all():  # one voxel that is NaN makes both so
        bad = array.size - _count(array, np.isfinite)
        raise ValueError(
            f"{bad} of {array.size} voxels are NaN or infinite; all must be finite:"
            " replace them first, for example with numpy.nan_to_num(array, nan=-1024, neginf=-1024)"
        )
    if low == high:
        raise ValueError(f"every voxel is {low:g}: there is nothing to segment; export the scan again")
    return low, high


def check_ct(volume: Volume, allow_non_hu: bool = False) -> tuple[str, ...]:
    """Refuse what cannot be segmented as CT; return what a user should be told, one sentence each.

    `allow_non_hu` turns the refusal of intensities that are not Hounsfield units into a sentence.

    Raises:
        ValueError: where `check_voxels` does, and on intensities that cannot be Hounsfield units (nothing below 0, or
            all within a span of 100).
    """
    low, high = check_voxels(volume)
    told = []
    reason = _not_hounsfield(low, high)
    if reason and not allow_non_hu:
        raise ValueError(
            f"intensities of {low:g} to {high:g} are not Hounsfield units: {reason};"
            " give the original CT, or override with --allow-non-hu (allow_non_hu=True), at the cost of a wrong result"
        )
    if reason:
        told.append(f"intensities of {low:g} to {high:g} are not Hounsfield units ({reason}): the result will be wrong")
    return (*told, *_doubts(volume, low, high))


def _not_hounsfield(low: float, high: float) -> str:
    if high - low < _NARROW:
        return "they look normalised"
    if low >= 0 and high <= 255:
        return "they look like grey levels for display, 0 to 255"
    if low >= 0:
        return "air is about -1000 and fat -100, but nothing is below 0; an offset such as -1024 may be missing"
    return ""


def _doubts(volume: Volume, low: float, high: float) -> list[str]:
    doubts = []
    modality = volume.header.get("modality")
    if modality not in (None, "CT"):
        doubts.append(f"the modality is {modality}, but the model was made for CT")
    if 0 > low > _NO_AIR:
        doubts.append(f"no voxel is below {low:g} HU, neither air nor fat: if this is no tight crop, it was clipped")
    if low < _PADDING:
        share = _count(volume.array, lambda block: block < _PADDING) / volume.array.size
        doubts.append(
            f"{share:.1%} of the voxels are below {_PADDING} HU (least {low:g}), which is padding, not tissue"
        )
    top = _count(volume.array, lambda block: block == high) / volume.array.size
    if top > _CLIPPED:
        doubts.append(f"{top:.1%} of the voxels are at the maximum of {high:g}: the intensities were clipped there")
    if high > _DENSEST:
        doubts.append(f"the highest intensity is {high:g}, more than any metal: check the scale")
    if min(volume.spacing) < _SPACING[0] or max(volume.spacing) > _SPACING[1]:
        spacing = " x ".join(f"{mm:g}" for mm in volume.spacing)
        doubts.append(f"a spacing of {spacing} mm is unusual for CT: check the units in the header")
    field = [mm * voxels for mm, voxels in zip(volume.spacing, volume.shape, strict=True)]
    if max(field) < _FIELD:
        size = " x ".join(f"{mm:.3g}" for mm in field)
        doubts.append(f"the whole scan is {size} mm, too small for a patient: check the units in the header")
    return doubts


def _count(array: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> int:
    """Voxels for which it holds; block by block, since memory for a mask of them all costs more than the comparison."""
    flat = array.ravel(order="K")
    return sum(int(np.count_nonzero(holds(flat[n : n + _BLOCK]))) for n in range(0, flat.size, _BLOCK))
