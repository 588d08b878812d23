"""NRRD and MetaImage (MHA, MHD) by SimpleITK, turned from its k, j, i order and LPS to ours."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medseg3d.geometry import Geometry
from medseg3d.io.formats import split_name
from medseg3d.io.gz import require_whole
from medseg3d.io.labels import LabelTable, parse_color
from medseg3d.io.voxels import LPS_TO_RAS, plain_numbers, spatial_shape
from medseg3d.volume import Volume


def read_itk(path: str | Path) -> Volume:
    """Read .nrrd, .nhdr, .mha or .mhd. Integers are kept, other numbers become float32.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is empty, damaged, not 3D, or not one real number a voxel.
    """
    path = Path(path)
    image = _read(path)
    volume = volume_from_sitk(image, path)
    notes: tuple[str, ...] = ()
    if split_name(path)[1] in (".nrrd", ".nhdr") and not image.HasMetaDataKey("NRRD_space"):
        notes = (f"the file does not say how the patient lies (no space field); taken as {volume.orientation}",)
    kind = "mha" if split_name(path)[1].startswith(".mh") else "nrrd"
    return Volume(volume.array, volume.affine, {"format": kind, "units": "mm", "path": str(path), "notes": notes})


def volume_from_sitk(image: sitk.Image, name: object = "the SimpleITK image") -> Volume:
    """A Volume from a SimpleITK image in memory; ValueError as in `read_itk`."""
    shape = spatial_shape(image.GetSize(), name)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{name} has {image.GetNumberOfComponentsPerPixel()} numbers a voxel ({image.GetPixelIDTypeAsString()});"
            " medseg3d takes one: convert it to a scalar image"
        )
    array = plain_numbers(sitk.GetArrayFromImage(image).T.reshape(shape, order="F"), name)
    return Volume(array, _affine(image), {"format": "memory", "units": "mm"})


def read_itk_grid(path: Path) -> Geometry:
    """Where the voxels lie, by the header alone; ValueError as in `read_itk`."""
    header = _header(path)
    return Geometry(spatial_shape(header.GetSize(), path), _affine(header))


def write_itk(path: Path, volume: Volume, table: LabelTable | None = None) -> None:
    """Write .nrrd or .mha, compressed, in the array's own dtype. Not atomic.

    In NRRD the labels travel as the Segment0_Name, Segment0_Color, ... fields that 3D Slicer uses.
    """
    affine = LPS_TO_RAS @ volume.affine
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
    image.SetSpacing(volume.spacing)
    image.SetDirection((affine[:3, :3] / volume.spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    if table is not None and path.name.endswith(".nrrd"):
        for key, value in _segments(table, volume.shape).items():
            image.SetMetaData(key, value)
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        full = shutil.disk_usage(path.parent).free < volume.array.nbytes
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error).strip().splitlines()[-1]) from error


def read_segments(path: Path) -> LabelTable | None:
    """The label table in the segment fields of an NRRD file's header, if it has any."""
    header = _header(path)
    names, colors, keys = {}, {}, set(header.GetMetaDataKeys())
    for key in sorted(keys):
        segment = key.removesuffix("_LabelValue")
        if segment != key and f"{segment}_Name" in keys:
            label = int(header.GetMetaData(key))
            names[label] = header.GetMetaData(f"{segment}_Name")
            if f"{segment}_Color" in keys:
                colors[label] = parse_color(header.GetMetaData(f"{segment}_Color").split())
    return LabelTable(names, colors) if names else None


def _header(path: Path) -> sitk.ImageFileReader:
    header = sitk.ImageFileReader()
    header.SetFileName(str(path))
    header.SetImageIO(_reader_of(path))
    try:
        header.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path) from error
    return header


def _read(path: Path) -> sitk.Image:
    with path.open("rb") as file:  # SimpleITK does not say which of these it was
        if not file.read(1):
            raise ValueError(f"{path} is empty (0 bytes): copy or export it again")
    try:
        image = sitk.ReadImage(str(path), imageIO=_reader_of(path))
    except RuntimeError as error:
        raise _unreadable(path) from error
    _require_whole(path)
    return image


def _require_whole(path: Path) -> None:
    """ValueError if compressed voxels are damaged: ITK goes on with what it could inflate, and compares no checksum.

    Voxels in several files or of another compression are not looked at.
    """
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in file:
            key, _, value = line.decode("latin-1").partition("=" if b"=" in line.partition(b":")[0] else ":")
            fields[key.strip().lower().replace(" ", "")] = value.strip().removeprefix("=")
            if not line.strip() or "elementdatafile" in fields:  # the end of an NRRD's header, and of a MetaImage's
                break
        deflated = fields.get("compresseddata", "").lower() == "true" or fields.get("encoding") in ("gzip", "gz")
        if not deflated or any(fields.get(skip, "0") != "0" for skip in ("lineskip", "byteskip")):
            return
        name = fields.get("elementdatafile", fields.get("datafile", "LOCAL"))
        if name.upper() == "LOCAL":
            require_whole(file, path)
        elif (own := path.with_name(name)).is_file():
            with own.open("rb") as voxels:
                require_whole(voxels, own)


def _reader_of(path: Path) -> str:
    """ITK's reader of the format; left to itself it does not know .MHA."""
    return "MetaImageIO" if split_name(path)[1].startswith(".mh") else "NrrdImageIO"


def _unreadable(path: Path) -> ValueError:
    return ValueError(
        f"{path} cannot be read as {split_name(path)[1]}: it is cut off, damaged or of another format;"
        " copy or export it again"
    )


def _affine(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    """Voxel index to mm, RAS+."""
    axes = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (axes, axes))[:3, :3] * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return LPS_TO_RAS @ affine


def _segments(table: LabelTable, shape: tuple[int, int, int]) -> dict[str, str]:
    fields = {}
    extent = " ".join(f"0 {n - 1}" for n in shape)
    for number, (label, name) in enumerate(table.names.items()):
        color = " ".join(f"{channel / 255:.6f}" for channel in table.colors[label])
        values = {"ID": f"label_{label}", "Name": name, "Color": color, "LabelValue": str(label), "Layer": "0"}
        for field, value in {**values, "Extent": extent}.items():
            fields[f"Segment{number}_{field}"] = value
    return fields
