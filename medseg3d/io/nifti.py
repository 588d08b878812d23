"""NIfTI-1 and NIfTI-2: inflated straight into the array that is returned; headers cloned when writing.

Layout and meaning of the fields: https://nifti.nimh.nih.gov/nifti-1 (nifti1.h) and nifti-2 (nifti2.h).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1Pair, data_type_codes, unit_codes
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from medseg3d.geometry import Geometry
from medseg3d.io.formats import split_name
from medseg3d.io.gz import GREATEST_RATIO, Sum, deflated, is_compressed, opened, read_into, read_to_end
from medseg3d.io.voxels import fortran_order, plain_numbers, rescaled, spatial_shape
from medseg3d.volume import Volume

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by spatial unit code; 0, unknown, is taken as mm
_LONGEST = 540  # bytes of a header, NIfTI-2's
_SHEARED = 0.01  # degrees; a quaternion cannot say more
_DISAGREE = 1.0  # mm between the sform's and the qform's place of a voxel that is worth a note


def read_nifti(path: str | Path) -> Volume:
    """Read .nii, .nii.gz or a .hdr/.img pair, by content: a wrong or missing .gz does no harm.

    Integers stay integers (see `rescaled`), other numbers become float32. The affine is in mm: the sform if its code is
    set, else the qform, else the voxel size alone (with a note). Units of metre and micron are converted with a note;
    unknown units are mm.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is empty, damaged, not NIfTI, not 3D, not one real number a voxel, or has no valid affine.
    """
    path = Path(path)
    notes: list[str] = []
    head_path, data_path = _pair(path)
    for part in dict.fromkeys((head_path, data_path)):
        if not part.stat().st_size:
            raise ValueError(f"{part} is empty (0 bytes): copy or export it again")
        compressed, named = is_compressed(part), part.name.lower().endswith(".gz")
        if compressed != named:
            notes.append(
                f"{part.name} is {'' if compressed else 'not '}compressed, in spite of its name; read as it is"
            )
    header = _read_header(head_path)
    shape = spatial_shape(_dims(header, path), path)
    affine = _affine(header, shape, path, notes)
    array = _voxels(data_path, header, shape)
    return Volume(array, affine, {**_fields(header), "path": str(path), "notes": tuple(notes)})


def read_grid(path: Path) -> tuple[Geometry, np.dtype]:
    """Where the voxels of a single file lie and the type they are stored in; ValueError as in `read_nifti`."""
    header = _read_header(path)
    shape = spatial_shape(_dims(header, path), path)
    return Geometry(shape, _affine(header, shape, path, [])), _dtype(header, path).newbyteorder("=")


def volume_from_nibabel(image: Any) -> Volume:
    """A Volume from a nibabel image, in memory or not yet loaded; ValueError as in `read_nifti`."""
    data, file, notes = image.dataobj, image.get_filename(), list[str]()
    name = Path(file or "the nibabel image")
    shape = spatial_shape(image.shape, name)
    if hasattr(data, "get_unscaled"):  # nibabel itself would scale to float64
        array = rescaled(plain_numbers(np.asarray(data.get_unscaled()), name), float(data.slope), float(data.inter))
    else:
        array = plain_numbers(np.asarray(data), name)
    if not isinstance(image, Nifti1Pair):
        return Volume(array.reshape(shape), image.affine, {"format": "memory", "units": "mm"})
    header = image.header.copy()
    affine = _affine(header, shape, name, notes)
    path = {"path": str(file)} if file else {}
    return Volume(array.reshape(shape), affine, {**_fields(header), **path, "notes": tuple(notes)})


def _fields(header: Nifti1Header) -> dict[str, Any]:
    """What a Volume keeps of a NIfTI header."""
    code = int(header["xyzt_units"])
    return {
        "format": "nifti",
        "units": unit_codes.label.get(code & 7, "unknown"),
        "time_units": unit_codes.label.get(code & 56, "unknown"),
        "sform_code": int(header["sform_code"]),
        "qform_code": int(header["qform_code"]),
        "qform": header.get_qform(coded=True)[0],
        "nifti": header.binaryblock,
    }


def write_nifti(path: Path, volume: Volume, description: str, extension: bytes = b"") -> Sum:
    """Write the array in its own dtype, compressed if the name ends in .gz; returns the sum of the file's bytes.

    The header is that of the NIfTI file the volume came from, if any: codes, units and matrices stay, to the bit where
    the grid is the file's own. `extension` is stored with code 0. Not atomic.
    """
    header = _header_for(volume)
    header.set_data_dtype(volume.array.dtype)
    header["scl_slope"], header["scl_inter"], header["cal_min"], header["cal_max"] = 1, 0, 0, 0
    header["descrip"] = description.encode()
    header["aux_file"] = b""
    header["magic"] = type(header).single_magic
    body = fortran_order(volume.array).ravel(order="F").view(np.uint8)
    parts, total = (memoryview(_head_bytes(header, extension)), body.data), Sum()
    with path.open("wb") as file:
        for piece in deflated(parts) if path.name.endswith(".gz") else parts:
            file.write(piece)
            total = total.with_more(piece)
    return total


def read_extensions(path: Path) -> list[bytes]:
    """The contents of a single NIfTI file's header extensions, whatever their code; only the header is inflated."""
    header = _read_header(path)
    at, end = header.sizeof_hdr + 4, _offset(header, path)
    with opened(path) as file:
        content = file.read(end)
    order, found = "<i4" if header.endianness == "<" else ">i4", []
    while at + 16 <= min(len(content), end):
        size, _code = np.frombuffer(content, order, 2, at).tolist()
        if size < 16:
            break
        found.append(content[at + 8 : at + size])
        at += size
    return found


def _pair(path: Path) -> tuple[Path, Path]:
    """The files that hold the header and the voxels: the same one, unless the name is that of a .hdr/.img pair."""
    stem, suffix = split_name(path)
    if not suffix.startswith((".hdr", ".img")):
        return path, path
    found = []
    for wanted in (".hdr", ".img"):
        options = [path.with_name(stem + wanted + gz) for gz in ("", ".gz")]
        existing = [option for option in options if option.exists()]
        if not existing:
            raise ValueError(f"{path} is half of a .hdr/.img pair and {options[0].name} is not beside it: copy both")
        found.append(existing[0])
    return found[0], found[1]


def _read_header(path: Path) -> Nifti1Header:
    with opened(path) as file:
        return _parse(file.read(_LONGEST), path)


def _parse(content: bytes, path: Path) -> Nifti1Header:
    """The header, of either version and byte order; ValueError if there is none."""
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    for kind, size in ((Nifti1Header, 348), (Nifti2Header, 540)):
        if size in sizes and len(content) >= size:
            header = kind(content[:size], check=False)
            if header["magic"].item()[:3] in (b"n+1", b"ni1", b"n+2", b"ni2"):
                return header
            raise ValueError(f"{path} is Analyze 7.5 or damaged NIfTI, without a place in space; convert it to NIfTI")
    raise ValueError(
        f"{path} is not a NIfTI file: that begins with a header of 348 or 540 bytes, this with {content[:12]!r};"
        " give the original image, with the suffix of its own format"
    )


def _dims(header: Nifti1Header, path: Path) -> list[int]:
    count = int(header["dim"][0])
    dims = header["dim"][1 : 1 + max(count, 0)].tolist()
    if not 1 <= count <= 7 or min(dims) < 1:
        raise ValueError(f"{path} has a damaged header: dimensions {header['dim'].tolist()}; export it again")
    return dims


def _affine(header: Nifti1Header, shape: tuple[int, int, int], path: Path, notes: list[str]) -> np.ndarray:
    """Voxel index to mm, RAS+, checked; the header's spacing is made positive."""
    pixdim = header["pixdim"][1:4]
    if not (np.isfinite(pixdim) & (pixdim != 0)).all():
        raise ValueError(f"{path} has a spacing of {pixdim.tolist()}; each must be above 0 mm: correct its header")
    header["pixdim"][1:4] = np.abs(pixdim)  # old writers put a flip there; NIfTI gives it no meaning
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # as the standard has it for 0
    try:
        sform, qform = header.get_sform(coded=True)[0], _qform(header, notes)
        affine = sform if sform is not None else qform
        if affine is None:
            affine = header.get_base_affine()
            notes.append(
                "the file does not say how the patient lies (sform and qform codes are 0);"
                f" taken as {Geometry(shape, affine).orientation}, so left and right cannot be trusted"
            )
        factor = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
        if factor != 1:
            notes.append(f"lengths converted from {unit_codes.label[int(header['xyzt_units']) & 7]} to mm")
            affine = np.diag([factor, factor, factor, 1.0]) @ affine
        geometry = Geometry(shape, affine)
    except (ValueError, HeaderDataError) as error:
        raise ValueError(f"{path}: {error}") from error
    if sform is not None and qform is not None:
        corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
        apart = np.linalg.norm(corners @ (sform - qform)[:3, :3].T + (sform - qform)[:3, 3], axis=1).max() * factor
        if apart > _DISAGREE:
            notes.append(f"sform and qform place voxels up to {apart:.1f} mm apart; the sform is used")
    return geometry.affine


def _qform(header: Nifti1Header, notes: list[str]) -> np.ndarray | None:
    """The matrix of the quaternion, if there is one; one that is no rotation is given up where there is an sform."""
    try:
        return header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError) as error:
        if header["sform_code"] <= 0:
            raise ValueError(f"its qform is damaged ({error}) and there is no sform: export it again") from error
        header["qform_code"] = 0
        notes.append("the qform is damaged; the sform is used")
        return None


def _dtype(header: Nifti1Header, path: Path) -> np.dtype:
    dtype: Any = data_type_codes.dtype.get(int(header["datatype"]))
    if dtype is None or dtype.itemsize == 0:
        raise ValueError(f"{path} has a damaged header: unknown data type {int(header['datatype'])}; export it again")
    return dtype.newbyteorder(header.endianness)


def _offset(header: Nifti1Header, path: Path) -> int:
    """Where the voxels begin, in bytes."""
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**62:
        raise ValueError(f"{path} has a damaged header: voxels begin at byte {offset:g}; export it again")
    single = header["magic"].item() == type(header).single_magic
    return max(int(offset), header.sizeof_hdr + 4) if single else int(offset)  # some writers leave it 0


def _voxels(path: Path, header: Nifti1Header, shape: tuple[int, int, int]) -> np.ndarray:
    dtype, start, count = _dtype(header, path), _offset(header, path), int(np.prod(shape, dtype=np.int64))
    most = path.stat().st_size * (GREATEST_RATIO if is_compressed(path) else 1) - start
    if most >= count * dtype.itemsize:  # else a damaged header would cost memory
        array = np.empty(count, dtype)
        with opened(path) as file:
            file.seek(start)
            most = read_into(file, array.view(np.uint8).data)
            read_to_end(file)
    if most < count * dtype.itemsize:
        raise ValueError(
            f"{path} is cut off: shape {shape} of {dtype.name} needs {count * dtype.itemsize} bytes of voxels,"
            f" it has at most {max(0, most)}; copy or export it again"
        )
    stored = plain_numbers(array.reshape(shape, order="F"), path)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        return stored
    return rescaled(stored, slope, intercept)


def _header_for(volume: Volume) -> Nifti1Header:
    """The source file's own header where it has one for this grid, else a new one with the source's codes."""
    geometry, fields = volume.geometry, volume.header
    if "nifti" in fields:
        header = _parse(fields["nifti"], Path(str(fields.get("path", "volume")))).as_byteswapped("<")
        if _holds(header, geometry):
            header.set_data_shape(geometry.shape)
            return header
    header = Nifti1Header()
    header.set_data_shape(geometry.shape)
    header.set_xyzt_units("mm", fields.get("time_units", "unknown"))
    header.set_sform(geometry.affine, fields.get("sform_code") or 1)
    header.set_qform(geometry.affine, 0 if geometry.shear_degrees > _SHEARED else fields.get("qform_code", 1))
    return header


def _holds(header: Nifti1Header, geometry: Geometry) -> bool:
    """Whether a header already describes this grid."""
    shape = spatial_shape(_dims(header, Path()), "")
    return Geometry(shape, _affine(header, shape, Path(), [])).same_as(geometry)


def _head_bytes(header: Nifti1Header, extension: bytes) -> bytes:
    """Header, extender and extension (code 0, padded with spaces to a multiple of 16 bytes) up to the first voxel."""
    block = b""
    if extension:
        size = -(-(len(extension) + 8) // 16) * 16
        block = np.array([size, 0], "<i4").tobytes() + extension.ljust(size - 8)
    header["vox_offset"] = header.sizeof_hdr + 4 + len(block)
    return header.binaryblock + bytes([bool(extension), 0, 0, 0]) + block
