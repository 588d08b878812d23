"""Volumes in, volumes out, whatever the format; each format's library is imported when a file needs it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg3d.geometry import Geometry
from medseg3d.io.atomic import write_atomic, write_text
from medseg3d.io.formats import RASTER_SUFFIXES, READABLE, WRITABLE, kind_of, split_name
from medseg3d.io.labels import LabelTable, sidecar_path, sidecar_text, unnamed_labels
from medseg3d.io.voxels import LPS_TO_RAS, fortran_order, plain_numbers, spatial_shape
from medseg3d.volume import Volume


def read_volume(path: str | Path) -> Volume:
    """Read a scan: NIfTI, NRRD or MetaImage file, DICOM file or folder, or a zip of DICOM files.

    Returns a Volume with the file's own voxel order, an affine in mm (RAS+), integers as integers and all else as
    float32; what was corrected or assumed on the way is in `header["notes"]`.

    Raises:
        FileNotFoundError, PermissionError: as usual.
        ValueError: the file is of an unknown format, damaged, or not one 3D volume of real numbers.
        ModuleNotFoundError: DICOM without the `dicom` extra; the message names the command that installs it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))
    kind = "dicom" if path.is_dir() else kind_of(path)
    if kind == "nifti":
        from medseg3d.io.nifti import read_nifti

        return read_nifti(path)
    if kind == "itk":
        from medseg3d.io.itk import read_itk

        return read_itk(path)
    if kind is None and split_name(path)[1] in RASTER_SUFFIXES:
        raise ValueError(f"{path} is a picture, not a scan; a model of pictures segments it, or read_image reads it")
    if kind is None:
        raise ValueError(f"{path} is of no format that medseg3d reads; it reads {READABLE}")
    from medseg3d.io.dicom import read_dicom

    return read_dicom(path)


def read_geometry(path: str | Path) -> Geometry:
    """Where the voxels of a scan lie, as `read_volume` has it; of NIfTI, NRRD and MetaImage the header alone is read.

    Raises what `read_volume` raises, but does not notice damage beyond the header.
    """
    path = Path(path)
    kind = kind_of(path) if path.is_file() else None
    if kind == "nifti" and split_name(path)[1] in (".nii", ".nii.gz"):
        from medseg3d.io.nifti import read_grid

        return read_grid(path)[0]
    if kind == "itk":
        from medseg3d.io.itk import read_itk_grid

        return read_itk_grid(path)
    return read_volume(path).geometry


def as_volume(image: Any) -> Volume:
    """A Volume from a path, a nibabel or SimpleITK image, an (array, affine) pair, a MetaTensor or a Volume.

    An array, or tensor, is (D, H, W), its affine (4, 4) maps voxel indices to mm, RAS+. A MetaTensor is that, or
    (1, D, H, W).

    Raises:
        TypeError: for anything else.
        ValueError: where `read_volume` does.
    """
    if isinstance(image, Volume):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_volume(Path(image))
    if type(image).__module__.startswith("SimpleITK"):
        from medseg3d.io.itk import volume_from_sitk

        return volume_from_sitk(image)
    if hasattr(image, "dataobj") and hasattr(image, "affine"):
        from medseg3d.io.nifti import volume_from_nibabel

        return volume_from_nibabel(image)
    if hasattr(image, "affine") and hasattr(image, "detach"):
        return _from_metatensor(image)
    if isinstance(image, (tuple, list)) and len(image) == 2:
        return _in_memory(_array_of(image[0]), image[1], "the array")
    raise TypeError(
        f"cannot make a volume of {type(image).__name__}; give a path, a nibabel or SimpleITK image,"
        " a pair (array, affine), a MetaTensor or a Volume"
    )


def write_label_map(volume: Volume, path: str | Path, table: LabelTable | Mapping[int, str]) -> Path:
    """Write a segmentation on its own grid, as uint8, or uint16 where a label is above 255, and its label table.

    The suffix chooses the format (.nii.gz, .nii, .nrrd, .mha). The table goes into the header of NIfTI and NRRD and,
    with the source's file name, into `<stem>.labels.json`. The file gets its name only once it was read again and its
    shape, affine, type, names and voxels were found to be right (the voxels of NIfTI by a checksum of the file).

    Raises:
        ValueError: not integers, a label that is negative or not in the table, or an unknown suffix.
        OSError: it cannot be written, or reads back differently; no file is left then.
    """
    path, table = Path(path), table if isinstance(table, LabelTable) else LabelTable(table)
    if volume.array.dtype.kind not in "iub":
        raise ValueError(f"a label map holds whole numbers, got {volume.array.dtype}: convert it, e.g. with argmax")
    array = fortran_order(volume.array)
    unknown = unnamed_labels(array, table.names)
    if unknown:
        raise ValueError(f"labels {sorted(unknown)} are in the segmentation but not in the table: name them")
    dtype = np.uint8 if max(table.names, default=0) <= 255 else np.uint16
    _write(volume.with_array(array.astype(dtype, copy=False)), path, "medseg3d label map", table)
    text = sidecar_text(table, path, volume.header.get("path"))
    try:
        write_text(sidecar_path(path), text)
    except OSError:
        path.unlink()
        raise
    return path


def write_volume(volume: Volume, path: str | Path) -> Path:
    """Write an image on its own grid: integers in their own type, other numbers as float32.

    The format is chosen, and errors are raised, as by `write_label_map`.
    """
    path = Path(path)
    array = fortran_order(plain_numbers(volume.array, "the volume"))
    _write(volume.with_array(array), path, "medseg3d image", None)
    return path


def read_label_table(path: str | Path) -> LabelTable | None:
    """Names and colours that travel with a segmentation, in its header or in `<stem>.labels.json`; None without either.

    A .json file is read as a label table itself. Raises ValueError if a table is damaged.
    """
    path = Path(path)
    suffix = split_name(path)[1]
    if suffix in (".nii", ".nii.gz"):
        from medseg3d.io.nifti import read_extensions

        for content in read_extensions(path):
            if b"<LabelTable" in content:
                return LabelTable.from_xml(content)
    elif suffix.endswith(".nrrd"):
        from medseg3d.io.itk import read_segments

        segments = read_segments(path)
        if segments is not None:
            return segments
    sidecar = path if path.suffix == ".json" else sidecar_path(path)
    return LabelTable.read_json(sidecar) if sidecar.exists() else None


def _write(volume: Volume, path: Path, description: str, table: LabelTable | None) -> None:
    suffix = split_name(path)[1]
    if suffix not in WRITABLE:
        raise ValueError(f"cannot write {path.name}: the suffix must be one of {', '.join(WRITABLE)}")
    write: Callable[[Path], Any]
    if suffix in (".nii", ".nii.gz"):
        from medseg3d.io.nifti import write_nifti

        extension = table.to_xml() if table is not None else b""
        write = partial(write_nifti, volume=volume, description=description, extension=extension)
    else:
        from medseg3d.io.itk import write_itk

        write = partial(write_itk, volume=volume, table=table)
    write_atomic(path, write, partial(_check, volume=volume, name=path, table=table))


def _check(written: Path, total: Any, volume: Volume, name: Path, table: LabelTable | None) -> None:
    """A file read again must be what was to be written; `total` is the sum of a NIfTI file's bytes."""
    try:
        geometry, dtype, voxels_are_right = _reread(written, total, volume)
    except ValueError as error:
        raise OSError(f"{name} was written but cannot be read again; it was removed: check that disk") from error
    wrong = []
    rounding = 4 * float(np.spacing(np.float32(np.abs(volume.affine).max())))  # of NIfTI's header, far from the origin
    if not geometry.same_as(volume.geometry, tolerance_mm=max(1e-3, rounding)):
        wrong.append(f"{geometry} for {volume.geometry}")
    elif dtype != volume.dtype or not voxels_are_right:
        wrong.append("other voxels")
    if table is not None and split_name(name)[1] != ".mha" and read_label_table(written) != table:
        wrong.append("other label names or colours")
    if wrong:
        raise OSError(f"{name} was written but reads back as {' and '.join(wrong)}; it was removed: check that disk")


def _reread(written: Path, total: Any, volume: Volume) -> tuple[Geometry, np.dtype, bool]:
    """The grid and the type of a file, and whether its voxels are the volume's.

    To inflate and compare the voxels of NIfTI would double the time of writing. That the file's bytes are those that
    left the compressor tells the same of the disk, and the checksum in the gzip data tells every reader of the rest.
    """
    if total is not None:
        from medseg3d.io.gz import Sum
        from medseg3d.io.nifti import read_grid

        return *read_grid(written), Sum.of_file(written) == total
    again = read_volume(written)
    return again.geometry, again.dtype, again.shape == volume.shape and _equal(again.array, volume.array)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _in_memory(array: np.ndarray, affine: Any, name: str) -> Volume:
    shape = spatial_shape(array.shape, name)
    return Volume(plain_numbers(array.reshape(shape), name), np.asarray(affine), {"format": "memory", "units": "mm"})


def _array_of(array: Any) -> np.ndarray:
    """An array, or a tensor of any device and type: NumPy knows no bfloat16."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)


def _from_metatensor(image: Any) -> Volume:
    array, affine = _array_of(image), np.asarray(image.affine.detach().cpu(), dtype=np.float64)
    if array.ndim == 4:
        if array.shape[0] != 1:
            raise ValueError(f"the MetaTensor has {array.shape[0]} channels; medseg3d takes one: select it")
        array = array[0]
    if getattr(image, "meta", {}).get("space") == "LPS":
        affine = LPS_TO_RAS @ affine
    return _in_memory(array, affine, "the MetaTensor")
