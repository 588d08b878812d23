"""The pixel data of a DICOM file as numbers in the modality's unit, whatever codec packed them."""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pydicom

from medseg3d.io.voxels import plain_numbers, rescaled

AIR = -1024  # HU
_UNPHYSICAL = -2000  # HU; at or below it is padding, whatever the tags say
DAMAGE = (  # what pydicom raises over wrong bytes
    AttributeError,
    EOFError,
    KeyError,
    NotImplementedError,
    TypeError,
    ValueError,
    pydicom.errors.BytesLengthException,
    pydicom.errors.InvalidDicomError,
    struct.error,
)


def stored_pixels(source: Callable[[], IO[bytes]]) -> tuple[np.ndarray, bool]:
    """(frames, rows, columns) and whether they are rescaled already, which they are if SimpleITK had to decode them.

    Raises ValueError if nothing here can decode them.
    """
    with source() as file:
        content = file.read()
    syntax = "unknown"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content))
            syntax = dataset.file_meta.TransferSyntaxUID.name
            pixels, done = dataset.pixel_array, False
    except (RuntimeError, NotImplementedError) as error:  # no plugin for this transfer syntax, or it failed
        fallback = _by_gdcm(content)
        if fallback is None:
            raise ValueError(f"its {syntax} pixel data cannot be decoded ({error})".replace("\n", " ")) from error
        pixels, done = fallback, True
    except DAMAGE as error:
        raise ValueError(f"its pixel data are missing or cut off ({error})".replace("\n", " ")) from error
    return pixels.reshape(-1, *pixels.shape[-2:]), done


def modality_values(
    pixels: np.ndarray, done: bool, header: pydicom.Dataset, slope: float, intercept: float
) -> tuple[np.ndarray, int]:
    """Pixels (rows, columns) rescaled and, for CT, with padding set to -1024 HU; and the number of padding pixels."""
    values = plain_numbers(pixels, "the image") if done else rescaled(pixels, slope, intercept)
    if header.get("Modality") != "CT":
        return values, 0
    outside = values <= _UNPHYSICAL
    if header.get("PixelPaddingValue") is not None:
        stored = np.int16 if header.get("PixelRepresentation") else np.uint16  # some write it with the other sign
        ends = [header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")]
        padding = [float(np.array(int(end)).astype(stored)) * slope + intercept for end in ends if end is not None]
        outside |= (values < AIR) & (values >= min(padding)) & (values <= max(padding))
    if outside.any():
        values = np.where(outside, values.dtype.type(AIR), values)
    return values, int(outside.sum())


def _by_gdcm(content: bytes) -> np.ndarray | None:
    """What SimpleITK's GDCM makes of a file, rescaled; None if it cannot either."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.dcm")
        path.write_bytes(content)
        try:
            return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        except RuntimeError:
            return None
