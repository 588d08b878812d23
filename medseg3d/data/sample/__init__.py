"""The sample CT that ships with medseg3d: an average head and neck, no person's. README.md beside it says more."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def sample_ct() -> Path:
    """The CT, a NIfTI file: int16, HU, LPS."""
    return _FOLDER / "headneck_template_ct.nii.gz"


def sample_labels() -> Path:
    """Its label map, a NIfTI file: uint8 on the same grid, labels 1 to 7 as in the manifest `openkbp_headneck`."""
    return _FOLDER / "headneck_template_seg.nii.gz"
