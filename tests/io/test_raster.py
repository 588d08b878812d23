from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medseg3d.io import read_image, read_label_image, write_image, write_label_image

GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6


def write_png(path, rows, size, bits, color_type):
    """A PNG of a kind that Pillow cannot write, from the bytes of its rows."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks))
    return path


def write_deep_png(path, pixels, color_type):
    rows = [row.astype(">u2").tobytes() for row in pixels]
    return write_png(path, rows, (pixels.shape[1], pixels.shape[0]), 16, color_type)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(np.uint8, (5, 7)), (np.uint16, (5, 7)), (np.uint8, (5, 7, 3)), (np.uint16, (1, 1))]
)
def test_images_come_back_as_written(tmp_path, rng, suffix, dtype, shape):
    image = rng.integers(0, np.iinfo(dtype).max, shape, dtype)
    path = write_image(tmp_path / f"image{suffix}", image)
    read = read_image(path)
    np.testing.assert_array_equal(read, image)
    assert read.dtype == dtype and list(tmp_path.iterdir()) == [path]


def test_sixteen_bits_are_not_cut_to_eight(tmp_path, rng):
    """Twelve-bit microscopy in 16-bit files would lose all but four bits."""
    pixels = rng.integers(0, 4096, (5, 7, 4))
    for color_type, channels in ((RGB, 3), (RGBA, 4)):
        path = write_deep_png(tmp_path / "deep.png", pixels[..., :channels], color_type)
        np.testing.assert_array_equal(read_image(path), pixels[..., :3])
    np.testing.assert_array_equal(
        read_image(write_deep_png(tmp_path / "grey.png", pixels[..., 0], GREY)), pixels[..., 0]
    )
    with pytest.raises(ValueError, match="16 bits with transparency; save it without"):
        read_image(write_deep_png(tmp_path / "alpha.png", pixels[..., :2], GREY_ALPHA))


def test_a_palette_is_colours_in_an_image_and_numbers_in_a_label_image(tmp_path):
    numbers = np.array([[0, 1, 2], [2, 1, 200]], np.uint8)
    path = write_label_image(
        tmp_path / "labels.png", numbers, {1: (255, 0, 0), 2: (0, 9, 0), 200: (1, 2, 3), 300: (0, 0, 0)}
    )
    assert Image.open(path).mode == "P"
    np.testing.assert_array_equal(read_label_image(path), numbers)
    np.testing.assert_array_equal(read_image(path)[1], [[0, 9, 0], [255, 0, 0], [1, 2, 3]])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_keep_their_numbers(tmp_path, bits):
    """As an image such a file is spread over 0 to 255."""
    labels = np.arange(8) % 2**bits
    digits = ((labels[:, None] >> np.arange(bits)[::-1]) & 1).ravel()
    path = write_png(tmp_path / "few.png", [np.packbits(digits).tobytes()] * 3, (8, 3), bits, GREY)
    np.testing.assert_array_equal(read_label_image(path), [labels] * 3)
    np.testing.assert_array_equal(read_image(path), [labels * (255 // (2**bits - 1))] * 3)


def test_other_kinds_of_pixels(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    kinds = {
        "1": (grey > 127) * 255,
        "L": grey,
        "LA": grey,
        "RGB": np.stack([grey] * 3, -1),
        "RGBA": np.stack([grey] * 3, -1),
        "CMYK": np.stack([grey] * 3, -1),
        "I": grey,
        "F": grey,
    }
    for mode, expected in kinds.items():
        path = tmp_path / f"{mode}.tif"
        Image.fromarray(grey).convert(mode, dither=Image.Dither.NONE).save(path)
        read = read_image(path)
        np.testing.assert_allclose(read, expected, atol=0 if mode != "CMYK" else 1, err_msg=mode)
    np.testing.assert_array_equal(read_label_image(tmp_path / "1.tif"), grey > 127)
    for mode in ("L", "LA", "RGB", "RGBA", "I", "F"):
        np.testing.assert_array_equal(read_label_image(tmp_path / f"{mode}.tif"), grey, err_msg=mode)
    assert read_image(tmp_path / "F.tif").dtype == np.float32
    Image.fromarray(np.array([[-5, 70000]], np.int32)).save(tmp_path / "signed.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "signed.tif"), [[-5, 70000]])


def test_jpeg_and_bmp(tmp_path):
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "grey.jpg", quality=95)
    assert abs(read_image(tmp_path / "grey.jpg").astype(int) - smooth).max() < 12
    Image.fromarray(np.stack([smooth] * 3, -1)).save(tmp_path / "color.bmp")
    np.testing.assert_array_equal(read_image(tmp_path / "color.bmp")[..., 1], smooth)


def test_pixels_stay_where_the_file_has_them(tmp_path):
    """A camera's note to turn the picture is not followed: annotations lie on the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 9), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (4, 9)


@pytest.mark.parametrize("most", [1, 255, 256, 65535])
def test_labels_come_back_in_as_few_bits_as_they_need(tmp_path, most):
    labels = np.array([[0, most]], np.int64)
    read = read_label_image(write_label_image(tmp_path / "labels.png", labels))
    np.testing.assert_array_equal(read, labels)
    assert read.dtype == (np.uint8 if most < 256 else np.uint16)


def test_refusals(tmp_path):
    grey = np.zeros((4, 5), np.uint8)
    with pytest.raises(ValueError, match="0 to 65535, got 0 to 65536"):
        write_label_image(tmp_path / "a.png", np.array([[0, 65536]]))
    with pytest.raises(ValueError, match="got -1 to 0"):
        write_label_image(tmp_path / "a.png", np.array([[0, -1]]))
    for wrong in (grey * 0.5, grey[0], np.zeros((4, 5, 2), np.uint16)):
        with pytest.raises(ValueError, match=r"labels are integers|two axes"):
            write_label_image(tmp_path / "a.png", wrong)
        with pytest.raises(ValueError, match="an image to write"):
            write_image(tmp_path / "a.png", wrong)
    for channels in (1, 2, 4, 5):
        with pytest.raises(ValueError, match=rf"an image to write .* got uint8 \(4, 5, {channels}\)"):
            write_image(tmp_path / "a.png", np.zeros((4, 5, channels), np.uint8))
    for write in (write_image, write_label_image):
        with pytest.raises(ValueError, match="at least one pixel"):
            write(tmp_path / "a.png", grey[:0])
        with pytest.raises(ValueError, match=r"\.png or \.tif"):
            write(tmp_path / "a.jpg", grey)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")
    text = tmp_path / "text.png"
    text.write_text("hello")
    whole = write_image(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (50, 50), np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:900])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    Image.new("L", (3, 3)).save(tmp_path / "anim.gif")
    pages = tmp_path / "pages.tif"
    Image.new("L", (3, 3)).save(pages, save_all=True, append_images=[Image.new("L", (3, 3))] * 2)
    for path in (text, cut, empty, tmp_path / "anim.gif"):
        with pytest.raises(ValueError, match=f"cannot read .*{path.name} as PNG"):
            read_image(path)
    with pytest.raises(ValueError, match="3 pages"):
        read_image(pages)
    Image.new("RGB", (3, 3), (1, 2, 3)).save(tmp_path / "color.png")
    with pytest.raises(ValueError, match=r"has colours.*read_panoptic"):
        read_label_image(tmp_path / "color.png")
    Image.new("L", (3, 3)).save(tmp_path / "labels.jpg")
    with pytest.raises(ValueError, match="JPEG"):
        read_label_image(tmp_path / "labels.jpg")
    for value in (0.5, -1.0, np.nan):
        Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / "fraction.tif")
        with pytest.raises(ValueError, match="fractions or negative"):
            read_label_image(tmp_path / "fraction.tif")


def test_nuclei_of_a_real_data_set(shared):
    folder = shared("data", "dsb2018-nuclei")
    paths = sorted(folder.glob("*_labels.png"))
    assert len(paths) == 28
    labels = read_label_image(paths[0])
    image = read_image(str(paths[0]).replace("_labels", "_image"))
    assert labels.dtype == np.uint16 and labels.shape == image.shape[:2] and labels.max() == 27
