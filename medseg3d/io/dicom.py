"""DICOM series: which files belong together, what was left out and why, and the volume they make.

Tags and their meaning: DICOM PS3.3, C.7.6.2 (image plane), C.8.2 (CT), C.7.6.16 (multi-frame functional groups).
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from medseg3d.io.formats import dicom_members, is_dicom
from medseg3d.io.stack import fill, same_positions, stack_slices
from medseg3d.io.voxels import LPS_TO_RAS
from medseg3d.volume import Volume

try:
    import pydicom
except ImportError as missing:
    raise ModuleNotFoundError('reading DICOM needs pydicom: pip install "medseg3d[dicom]"') from missing

from medseg3d.io.dicom_pixels import AIR, DAMAGE, modality_values, stored_pixels

_ORTHONORMAL = 1e-2  # departure of the direction cosines from unit length and right angle that rounding explains
_ALIKE = 1e-3  # difference of direction cosines, and share of the pixel spacing, within a series
_REPEATS = ("AcquisitionNumber", "ImageType", "ConvolutionKernel", "TemporalPositionIdentifier", "AcquisitionTime")
_GROUPS = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")  # of a multi-frame image
_TAGS = (  # that are asked of every file
    "SeriesInstanceUID",
    "SeriesDescription",
    "SeriesNumber",
    "Modality",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "SliceThickness",
    *_REPEATS,
)

Sources = dict[str, Callable[[], IO[bytes]]]


@dataclass(frozen=True)
class Slice:
    """One image plane: `position` of its first voxel, `orientation` of and `spacing` between its rows and columns."""

    source: str
    frame: int
    header: pydicom.Dataset = field(repr=False)
    position: np.ndarray = field(repr=False)
    orientation: np.ndarray = field(repr=False)
    spacing: np.ndarray = field(repr=False)
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True)
class Series:
    """Images that belong together; `rejected` says why they make no volume, or is empty."""

    uid: str
    description: str
    modality: str
    images: int
    rejected: str = ""
    slices: tuple[Slice, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"series {self.description!r} ({self.modality}, {self.images} image{'s' * (self.images != 1)})"


def list_series(path: str | Path) -> tuple[Series, ...]:
    """Every series of a DICOM file, folder or zip: usable ones first, CT first, largest first.

    Of a folder with DICOM files directly inside these are taken, of another one those at any depth.

    Images of one SeriesInstanceUID count as several series where their orientation, pixel spacing or matrix differ, or
    where the same positions were taken twice or more.
    """
    with _sources(Path(path)) as sources:
        return _grouped(sources)


def read_dicom(path: str | Path, series: str | None = None) -> Volume:
    """Read one series of a DICOM file, folder or zip: the largest CT series, or the one that is named.

    ``series`` is a SeriesInstanceUID, or the description that messages call it by; of several the largest is read.

    Folders are searched as `list_series` does.

    Values are rescaled (HU for CT), int16 if they are whole and fit; padding around the CT's field of view becomes
    -1024 HU. A tilted gantry gives a sheared grid, uneven or missing slices are interpolated (see `stack_slices`). All
    of it, and what was left out, is in `header["notes"]`.

    Raises:
        ValueError: no series, or none of that name, makes a volume (with the reason for each), or the series has
            duplicates that differ, a gap that is too wide, or pixel data that cannot be decoded.
    """
    path = Path(path)
    with _sources(path) as sources:
        found = _grouped(sources)
        usable = [one for one in found if not one.rejected and series in (None, one.uid, one.description)]
        if not usable:
            reasons = "; ".join(f"{one}: {one.rejected or 'another series'}" for one in found[:5])
            asked = "" if series is None else f" {series!r}"
            raise ValueError(f"{path} holds no DICOM series{asked} that makes a volume{reasons and ': '}{reasons}")
        chosen = usable[0]
        notes = [f"left out {one}: {one.rejected or f'{chosen} is read'}" for one in found if one is not chosen]
        if chosen.modality != "CT":
            notes.append(f"the modality is {chosen.modality}, not CT")
        try:
            array, affine = _assemble(chosen, sources, notes)
        except ValueError as error:
            raise ValueError(f"{path}, {chosen}: {error}") from error
    fields = {"format": "dicom", "units": "mm", "path": str(path), "modality": chosen.modality, "notes": tuple(notes)}
    return Volume(array, affine, fields)


@contextmanager
def _sources(path: Path) -> Iterator[Sources]:
    """How to open each DICOM file, by name. Members of a zip are read in memory, so that no path in it is ever used."""
    if path.is_dir():
        files = _dicom_files(path, "*") or _dicom_files(path, "**/*")
        yield {str(file.relative_to(path)): partial(_opened, file) for file in files}
    elif zipfile.is_zipfile(path):
        with _unzipping(path):
            archive = zipfile.ZipFile(path)
        with archive:
            with _unzipping(path):
                names = sorted(dicom_members(archive))
            yield {name: partial(_member, path, archive, name) for name in names}
    else:
        yield {path.name: partial(_opened, path)}


def _dicom_files(folder: Path, pattern: str) -> list[Path]:
    files = (file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith("."))
    return sorted(filter(is_dicom, files))


def spread_series(folders: Sequence[Path]) -> list[list[Path]]:
    """Those of `folders` that hold one series together, by the files directly inside."""
    sharing: dict[str, list[Path]] = {}
    for folder in folders:
        first = next(iter(_dicom_files(folder, "*")), None)
        uid = "" if first is None else str(_header(partial(_opened, first)).get("SeriesInstanceUID", ""))
        sharing.setdefault(uid, []).append(folder)
    spread = []
    for uid, parts in sharing.items():
        if uid and len(parts) > 1:
            files = [file for part in parts for file in _dicom_files(part, "*")]
            series = _grouped({str(file): partial(_opened, file) for file in files})
            # Phases of one UID, a folder each, are series of their own: they lie at the same places.
            if sum(one.uid == uid and not one.rejected for one in series) == 1:
                spread.append(parts)
    return spread


def _opened(path: Path) -> IO[bytes]:
    return path.open("rb")


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    with _unzipping(path):
        return BytesIO(archive.read(name))


@contextmanager
def _unzipping(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: a password
        raise ValueError(f"{path} cannot be unzipped ({error}): copy or export it again") from error


def _grouped(sources: Sources) -> tuple[Series, ...]:
    groups: list[list[Slice]] = []
    rejected: dict[tuple[str, str], list[pydicom.Dataset]] = {}
    for name, source in sources.items():
        header = _header(source)
        reason = _why_not(header)
        images = [] if reason else _slices(name, header)
        if not images:
            key = str(header.get("SeriesInstanceUID", "")), reason or "no valid position, orientation or pixel spacing"
            rejected.setdefault(key, []).append(header)
        for image in images:
            group = next((group for group in groups if _alike(group[0], image)), None)
            if group is None:
                groups.append([image])
            else:
                group.append(image)
    series = [_series(part) for group in groups for part in _taken_apart(group)]
    series.sort(key=lambda one: (one.modality != "CT", -one.images))
    refused = [replace(_series_of(headers[0], len(headers)), rejected=why) for (_, why), headers in rejected.items()]
    return (*series, *refused)


def _header(source: Callable[[], IO[bytes]]) -> pydicom.Dataset:
    """All but the pixels of a file; nothing if it cannot be read."""
    with source() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that break a rule of no interest here
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            for tag in _TAGS:
                header.get(tag)  # values are decoded when they are asked for
            return header
        except DAMAGE:
            return pydicom.Dataset()


def _why_not(header: pydicom.Dataset) -> str:
    """Why an object is no slice of a volume, or ""."""
    if not len(header):
        return "a damaged file"
    modality, kind = header.get("Modality", "unknown"), [str(word).upper() for word in header.get("ImageType") or ()]
    if "Rows" not in header or modality in ("SEG", "RTDOSE"):
        return f"not an image but {modality}"
    if {"LOCALIZER", "SCOUT", "TOPOGRAM"} & set(kind):
        return "a localizer"
    if header.get("SamplesPerPixel", 1) != 1:
        return "colour images, such as a screenshot or a report"
    if int(header.get("NumberOfFrames") or 1) > 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return "several frames in a file without a position for each"
    return ""


def _slices(name: str, header: pydicom.Dataset) -> list[Slice]:
    """The planes of a file: one, or those of an enhanced multi-frame image; none if they have no place in space."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        groups = [[header] * len(_GROUPS)]
    else:
        shared = (header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
        tags = [f"{group}Sequence" for group in _GROUPS]
        groups = [
            [(frame.get(tag) or shared.get(tag) or [pydicom.Dataset()])[0] for tag in tags]
            for frame in header.PerFrameFunctionalGroupsSequence
        ]
    try:
        return [_slice(name, frame, header, *group) for frame, group in enumerate(groups)]
    except DAMAGE:
        return []


def _slice(
    name: str,
    frame: int,
    header: pydicom.Dataset,
    position: pydicom.Dataset,
    orientation: pydicom.Dataset,
    measures: pydicom.Dataset,
    values: pydicom.Dataset,
) -> Slice:
    """Raises AttributeError, TypeError or ValueError if a tag is absent or has no usable value."""
    image = Slice(
        source=name,
        frame=frame,
        header=header,
        position=np.array(position.ImagePositionPatient, dtype=float).reshape(3),
        orientation=np.array(orientation.ImageOrientationPatient, dtype=float).reshape(6),
        spacing=np.array(measures.PixelSpacing, dtype=float).reshape(2),
        slope=float(values.get("RescaleSlope") or 1),
        intercept=float(values.get("RescaleIntercept") or 0),
    )
    axes = image.orientation.reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=_ORTHONORMAL) or image.spacing.min() <= 0:
        raise ValueError("rows and columns are not at right angles, or have no spacing")
    return image


def _alike(a: Slice, b: Slice) -> bool:
    return (
        a.header.get("SeriesInstanceUID") == b.header.get("SeriesInstanceUID")
        and (a.header.Rows, a.header.Columns) == (b.header.Rows, b.header.Columns)
        and np.allclose(a.orientation, b.orientation, rtol=0, atol=_ALIKE)
        and np.allclose(a.spacing, b.spacing, rtol=_ALIKE)
    )


def _taken_apart(group: list[Slice]) -> list[list[Slice]]:
    """The phases, kernels or repeats of a group whose positions mostly occur more than once, if a tag tells them."""
    repeats = [len(place) for place in _places(group)]
    if np.median(repeats) < 2:
        return [group]
    for tag in _REPEATS:
        parts: dict[str, list[Slice]] = {}
        for image in group:
            parts.setdefault(str(image.header.get(tag)), []).append(image)
        if 1 < len(parts) <= max(repeats) and all(len(_places(part)) == len(part) for part in parts.values()):
            return list(parts.values())
    return [group]


def _places(slices: Sequence[Slice]) -> list[list[int]]:
    return same_positions(np.array([image.position @ slices[0].normal for image in slices]))


def _series(group: list[Slice]) -> Series:
    return replace(_series_of(group[0].header, len(group)), slices=tuple(group))


def _series_of(header: pydicom.Dataset, images: int) -> Series:
    description = str(header.get("SeriesDescription") or header.get("SeriesNumber") or "unnamed")
    return Series(str(header.get("SeriesInstanceUID", "")), description, str(header.get("Modality", "unknown")), images)


def _assemble(series: Series, sources: Sources, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The array (D, H, W) of a series and its affine, RAS+; what was done to the slices is added to `notes`."""
    kept, images, padding = [], [], 0
    decode = _decoder(sources)
    for place in _places(series.slices):
        first, *others = (series.slices[n] for n in place)
        values, padded = decode(first)
        for other in others:
            if not np.array_equal(values, decode(other)[0]):
                raise ValueError(
                    f"{first.source} and {other.source} differ but lie at one place: take one of them away"
                )
        kept.append(first)
        images.append(values)
        padding += padded
    copies = series.images - len(kept)
    if copies:
        notes.append(f"{copies} duplicate slice{'s' * (copies > 1)} dropped")
    array = np.stack(images)
    if padding:
        notes.append(f"padding outside the field of view ({padding / array.size:.1%} of the voxels) set to {AIR} HU")
    if array.dtype.kind in "iu" and array.min() >= -32768 and array.max() <= 32767:
        array = array.astype(np.int16, copy=False)
    if len(kept) == 1:
        thickness = float(kept[0].header.get("SliceThickness") or 1)
        notes.append(f"one slice only, taken as {thickness:g} mm thick")
        start, step = kept[0].position, thickness * kept[0].normal
    else:
        stack = stack_slices(np.array([image.position for image in kept]), kept[0].normal)
        array, start, step = fill(array, stack.index), stack.first, stack.step
        notes.extend(stack.notes)
    along_row, along_column = kept[0].orientation[:3], kept[0].orientation[3:]
    between_rows, between_columns = kept[0].spacing
    affine = np.eye(4)
    affine[:3] = np.column_stack((along_row * between_columns, along_column * between_rows, step, start))
    return array.T, LPS_TO_RAS @ affine


def _decoder(sources: Sources) -> Callable[[Slice], tuple[np.ndarray, int]]:
    """Slice -> its values and how many of them were padding; the frames of one file are decoded once."""
    frames = lru_cache(maxsize=1)(lambda name: stored_pixels(sources[name]))

    def decode(image: Slice) -> tuple[np.ndarray, int]:
        try:
            pixels, done = frames(image.source)
        except ValueError as error:
            raise ValueError(f"{image.source}: {error}") from error
        return modality_values(pixels[image.frame], done, image.header, image.slope, image.intercept)

    return decode
