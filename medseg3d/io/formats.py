"""Which file is what: by its name, except DICOM, which often has no suffix or an odd one and is known by content."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

Kind = Literal["nifti", "itk", "dicom", "zip", "picture"]

KINDS: dict[str, Kind | None] = {  # the longer of two suffixes comes first
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".hdr.gz": "nifti",
    ".hdr": "nifti",
    ".img.gz": "nifti",
    ".img": "nifti",
    ".seg.nrrd": "itk",
    ".nrrd": "itk",
    ".nhdr": "itk",
    ".mha": "itk",
    ".mhd": "itk",
    ".zip": None,  # only if there is DICOM in it
    ".dcm": None,
}
READABLE = ".nii, .nii.gz, .hdr/.img, .nrrd, .mha, .mhd, a DICOM folder or a .zip of one"
WRITABLE = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha")
RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def split_name(path: str | Path) -> tuple[str, str]:
    """("ct", ".nii.gz") from any path to ct.nii.gz; an unknown suffix stays with the stem and is returned as ""."""
    name = Path(path).name
    for suffix in (*KINDS, *RASTER_SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)], suffix
    return name, ""


def kind_of(path: Path) -> Kind | None:
    """The reader that a scan needs, or None where medseg3d has none. Raises OSError if it cannot be opened."""
    if is_dicom(path):
        return "dicom"
    known = KINDS.get(split_name(path)[1])
    if known is not None or not zipfile.is_zipfile(path):
        return known
    try:
        with zipfile.ZipFile(path) as archive:
            return "zip" if any(dicom_members(archive)) else None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # damaged, or locked with a password
        return None


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM."""
    with path.open("rb") as file:
        return _starts_as_dicom(file)


def dicom_members(archive: zipfile.ZipFile) -> Iterator[str]:
    """The names of the DICOM files in a zip."""
    for name in archive.namelist():
        with archive.open(name) as member:
            if _starts_as_dicom(member):
                yield name


def _starts_as_dicom(file: IO[bytes]) -> bool:
    """128 free bytes, then "DICM" (PS3.10, 7.1)."""
    return file.read(132)[128:] == b"DICM"
