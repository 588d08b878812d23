"""Two-dimensional pictures: PNG, JPEG, TIFF and BMP in, PNG and TIFF out; images, and label images with one number for
each pixel.

Arrays are (rows, columns) or (rows, columns, 3) as the file stores its pixels: a camera's note on how to turn the
picture is not followed, so that masks lie on the file's own pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from medseg3d.io.atomic import write_atomic

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_MOST_8, _MOST_16 = 0xFF, 0xFFFF
_SPREAD = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey of fewer than 8 bits by


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of a picture: (rows, columns) if it is grey, else (rows, columns, 3), red, green, blue.

    uint8, uint16 for 16 bits, float32 or int32 where a TIFF holds such. A palette is resolved into its colours, black
    and white becomes 0 and 255, transparency is left out.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no PNG, JPEG, TIFF or BMP, is damaged, or has several pages.
    """
    return _pixels(path, *_decoded(path))


def pixels_of(picture: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image as :func:`read_image` has them."""
    if picture.mode == "1":
        return np.array(picture).astype(np.uint8) * 255
    if picture.mode == "LA":
        return np.array(picture.getchannel(0))
    if picture.mode in ("L", "F") or picture.mode.startswith("I"):
        pixels = np.array(picture)
        of_16_bits = picture.mode != "I" or (pixels.min(initial=0) >= 0 and pixels.max(initial=0) <= _MOST_16)
        return pixels.astype(np.uint16) if picture.mode.startswith("I") and of_16_bits else pixels
    return np.array(picture.convert("RGB"))


def read_label_image(path: str | Path) -> np.ndarray:
    """The number of each pixel, (rows, columns), unsigned or int32: the value of a grey picture of any depth, the place
    in the palette, or 0 and 1. A picture in colours is read if all of them are grey.

    Raises:
        OSError: the file cannot be opened.
        ValueError: as `read_image`, and for colours, fractions, negative numbers and JPEG, which changes numbers.
    """
    picture, layout = _decoded(path)
    if picture.format in ("JPEG", "MPO"):
        raise ValueError(f"{path} is a JPEG, which does not keep labels as they were; save them as PNG or TIFF")
    if picture.mode in ("P", "PA"):
        return np.array(picture.getchannel(0))
    labels = _pixels(path, picture, layout)
    if labels.ndim == 3:
        if (labels != labels[..., :1]).any():
            raise ValueError(
                f"{path} has colours, a label image has one number a pixel; read_panoptic reads COCO's panoptic PNG"
            )
        labels = labels[..., 0]
    if picture.mode == "1" or layout in _SPREAD:
        return labels // _SPREAD.get(layout, 255)
    whole = np.nan_to_num(labels).astype(np.int32) if labels.dtype == np.float32 else labels
    if (whole != labels).any() or whole.min(initial=0) < 0:
        raise ValueError(f"{path} holds fractions or negative numbers; labels are whole numbers of 0 or more")
    return whole


def write_image(path: str | Path, image: np.ndarray) -> Path:
    """Write (rows, columns), uint8 or uint16, or (rows, columns, 3), uint8, as PNG or TIFF, atomically.

    Raises:
        ValueError: another suffix, shape or type, or no pixel.
    """
    image = np.asarray(image)
    grey = image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
    colors = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not (grey or colors):
        raise ValueError(f"an image to write is grey, uint8 or uint16, or RGB, uint8; got {image.dtype} {image.shape}")
    return _write(path, Image.fromarray(_with_pixels(image)), image)


def write_label_image(
    path: str | Path, label_map: np.ndarray, colors: Mapping[int, tuple[int, int, int]] | None = None
) -> Path:
    """Write labels of 0 to 65535, (rows, columns), as PNG or TIFF, in 8 bits if they fit; atomically, and read again.

    ``colors`` (label -> red, green, blue) go into a palette, so that viewers show them, where 8 bits suffice; the
    numbers stay what they are.

    Raises:
        ValueError: another suffix or shape, no integers, labels out of range.
    """
    labels = np.asarray(label_map)
    if labels.dtype != bool and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are integers, got {labels.dtype}; convert them with .astype(np.uint16)")
    if labels.ndim != 2:
        raise ValueError(f"a label image has two axes, got the shape {labels.shape}; write a scan as NIfTI")
    labels = _with_pixels(labels)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > _MOST_16:
        raise ValueError(
            f"a label image holds 0 to 65535, got {low} to {high}; number the labels anew or write a panoptic PNG"
        )
    picture = Image.fromarray(labels.astype(np.uint8 if high <= _MOST_8 else np.uint16))
    if colors and picture.mode == "L":
        palette = np.zeros((256, 3), np.uint8)
        for label, color in colors.items():
            if 0 <= label <= 255:
                palette[label] = color
        picture.putpalette(palette.tobytes())
    return _write(path, picture, labels)


def _decoded(path: str | Path) -> tuple[Image.Image, str]:
    """The picture, and Pillow's name for the layout of its pixels in the file."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            pages = getattr(picture, "n_frames", 1) if picture.format in ("TIFF", "PNG") else 1
            if pages > 1:
                raise ValueError(f"it has {pages} pages; save each as a file, or a stack as NIfTI or NRRD")
            layouts = [tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in picture.tile]
            picture.load()
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(path, error) from error
    except (ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return picture, str(layouts[0]) if layouts else ""


def _pixels(path: str | Path, picture: Image.Image, layout: str) -> np.ndarray:
    if layout.startswith(("RGB", "LA")) and ";16" in layout:  # of which Pillow would keep the upper 8 bits
        return _deep_colors(path)
    return pixels_of(picture)


def _deep_colors(path: str | Path) -> np.ndarray:
    import SimpleITK as sitk

    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[..., :3]
    except RuntimeError as error:
        raise _unreadable(path, ValueError("grey of 16 bits with transparency; save it without")) from error


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"cannot read {path} as PNG, JPEG, TIFF or BMP: {error}")


def _with_pixels(array: np.ndarray) -> np.ndarray:
    if not array.size:
        raise ValueError(f"a picture has at least one pixel, got the shape {array.shape}")
    return np.ascontiguousarray(array)


def _write(path: str | Path, picture: Image.Image, pixels: np.ndarray) -> Path:
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".tif", ".tiff"):
        raise ValueError(f"pictures are written as .png or .tif, which keep every value; got {Path(path).name}")

    def save(temporary: Path) -> None:
        picture.save(temporary, format="PNG" if suffix == ".png" else "TIFF")

    def check(temporary: Path, _: None) -> None:
        with Image.open(temporary) as written:
            if not np.array_equal(np.array(written), pixels):
                raise OSError(f"{path} does not hold what was written; try another disk")

    return write_atomic(path, save, check)
