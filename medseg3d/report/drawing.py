"""Pictures of single planes: CT in grey, organs in translucent colour with a crisp outline, marks on top."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

from medseg3d.report.planes import ENDS, Cut, View

Color = tuple[int, int, int]
Size = tuple[int, int]  # width, height in pixels
Edges = tuple[float, float, float, float]  # left, top, right, bottom

BACKGROUND: Color = (13, 17, 23)
TEXT: Color = (230, 237, 243)
MUTED: Color = (139, 148, 158)
FAINT: Color = (72, 79, 88)
MISSED: Color = (198, 255, 0)  # of errors: no organ of the fixed palette has these
WRONG: Color = (255, 0, 200)

_FINER = 2  # planes are drawn this much larger and reduced, which smooths their outlines
_OUTLINE = 4  # width of an outline before that reduction
_FILL = 0.4  # opacity of an organ's colour
_ERROR = 0.75  # and of an error's
_ROUNDING = 6  # radius of a panel's corners
_TICK = 8  # length of the marks at a picture's edges
_BAR = 110  # pixels of a scale bar, at most
_BEYOND_ASCII = "…·°"  # of the font's characters
_BARS_MM = (500, 200, 100, 50, 20, 10, 5, 2, 1)


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font, so that a picture looks the same on every machine."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "Pillow has been built without FreeType"
    return loaded.font_variant(layout_engine=ImageFont.Layout.BASIC)


def draw_plane(cut: Cut, size: Size, colors: Mapping[int, Color], window: tuple[float, float]) -> Image.Image:
    """The picture (RGB) of a plane, grey or with red, green and blue along a third axis: `window` is (centre, width)
    of what is shown, in HU for a CT; labels without a colour are not drawn."""
    finer = (size[0] * _FINER, size[1] * _FINER)
    labels = smooth_labels(np.where(np.isin(cut.label_map, list(colors)), cut.label_map, 0), cut.edges, finer)
    opacity = np.where(outlines(labels), 1.0, np.where(labels > 0, _FILL, 0.0))
    return _painted(_windowed(cut, finer, window), _palette(labels, colors)[labels], opacity)


def draw_errors(
    cut: Cut, reference: np.ndarray, size: Size, colors: Mapping[int, Color], window: tuple[float, float]
) -> Image.Image:
    """The picture of a plane whose labels are a prediction: its outlines, and where it is wrong.

    What only ``reference`` (a label map like that of the plane) has is filled in `MISSED`, and what is predicted there
    otherwise in `WRONG`; the rest as in `draw_plane`.
    """
    finer = (size[0] * _FINER, size[1] * _FINER)
    sides = (np.where(np.isin(side, list(colors)), side, 0) for side in (cut.label_map, reference))
    predicted, expected = (smooth_labels(side, cut.edges, finer) for side in sides)
    differ = predicted != expected
    paint = _palette(predicted, colors)[predicted]
    edge = outlines(predicted, _OUTLINE - 1)
    paint[differ & (predicted == 0)] = MISSED
    paint[differ & (predicted > 0) & ~edge] = WRONG
    return _painted(_windowed(cut, finer, window), paint, np.where(edge, 1.0, np.where(differ, _ERROR, 0.0)))


def _windowed(cut: Cut, size: Size, window: tuple[float, float]) -> np.ndarray:
    """The image (height, width, 1 or 3) of a plane, 0 to 1 within the window."""
    center, span = window
    # The window comes first: the cubic interpolation would overshoot at the step from air to skin.
    channels = np.moveaxis(np.atleast_3d((cut.image - (center - span / 2)) / span).clip(0, 1), -1, 0)
    return np.stack([_resized(channel, cut.edges, size).clip(0, 1) for channel in channels], axis=-1)


def _palette(labels: np.ndarray, colors: Mapping[int, Color]) -> np.ndarray:
    palette = np.zeros((int(labels.max()) + 1, 3), np.float32)
    for label in np.unique(labels[labels > 0]).tolist():
        palette[label] = colors[label]
    return palette


def _painted(image: np.ndarray, paint: np.ndarray, opacity: np.ndarray) -> Image.Image:
    """Colours (0 to 255) on an image (0 to 1), reduced to the size that was asked for."""
    opacity = opacity[..., None].astype(np.float32)
    rgb = image * 255 * (1 - opacity) + paint * opacity
    return Image.fromarray((rgb + 0.5).astype(np.uint8)).reduce(_FINER)


def smooth_labels(label_map: np.ndarray, edges: Edges, size: Size) -> np.ndarray:
    """`label_map` (rows, columns) within `edges`, resized to `size` with smooth borders.

    Each point takes the label whose interpolated mask is the highest there.
    """
    width, height = size
    left, top, right, bottom = edges
    result = np.zeros((height, width), label_map.dtype)
    highest = _resized(_softened(label_map == 0), edges, size)
    for label in np.unique(label_map[label_map > 0]):
        rows, columns = (np.flatnonzero((label_map == label).any(axis=axis)) for axis in (1, 0))
        # Only the pixels that the label may reach: its voxels and one around, for the cubic interpolation.
        x0, x1 = _pixels(columns[0] - 1, columns[-1] + 2, left, right, width)
        y0, y1 = _pixels(rows[0] - 1, rows[-1] + 2, top, bottom, height)
        if x0 >= x1 or y0 >= y1:
            continue
        across, down = (right - left) / width, (bottom - top) / height
        part = (left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down)
        mask = _resized(_softened(label_map == label), part, (x1 - x0, y1 - y0))
        region = np.s_[y0:y1, x0:x1]
        wins = mask > highest[region]
        result[region][wins] = label
        highest[region][wins] = mask[wins]
    return result


def outlines(labels: np.ndarray, width: int = _OUTLINE) -> np.ndarray:
    """True along the inner border of every label."""
    size = 2 * width - 1
    return (labels > 0) & (ndimage.maximum_filter(labels, size) != ndimage.minimum_filter(labels, size))


def mark_plane(picture: Image.Image, view: View, caption: str, mm_per_pixel: float | None = None) -> Image.Image:
    """Add the caption, the letters of the directions and, with `mm_per_pixel`, a scale bar."""
    width, height = picture.size
    (left, right), (top, bottom) = ENDS[view.across], ENDS[view.down]
    write(picture, (12, 9), caption, 14, TEXT, "la", shadow=True)
    write(picture, (14, height / 2), left, 16, TEXT, "lm", shadow=True)
    write(picture, (width - 14, height / 2), right, 16, TEXT, "rm", shadow=True)
    write(picture, (width / 2, 14), top, 16, TEXT, "mt", shadow=True)
    write(picture, (width / 2, height - 14), bottom, 16, TEXT, "mb", shadow=True)
    if mm_per_pixel is not None:
        _scale_bar(picture, mm_per_pixel)
    return picture


def mark_crossings(picture: Image.Image, x: float, y: float) -> None:
    """Ticks at the edges where two other planes cross this one, at column `x` and row `y`."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for line in ((x, 0, x, _TICK), (x, height - _TICK, x, height), (0, y, _TICK, y), (width - _TICK, y, width, y)):
        draw.line(line, fill=MUTED)


def write(
    picture: Image.Image,
    place: tuple[float, float],
    text: str,
    size: int,
    color: Color,
    anchor: str,
    shadow: bool = False,
) -> None:
    """Text at a place, `anchor` as in Pillow; a soft `shadow` keeps it readable on any picture."""
    style: dict[str, Any] = {"text": _writable(text), "font": font(size), "anchor": anchor}
    if shadow:
        shade = Image.new("L", picture.size)
        ImageDraw.Draw(shade).text(place, fill=255, stroke_width=3, **style)
        picture.paste((0, 0, 0), mask=shade.filter(ImageFilter.GaussianBlur(2)))
    ImageDraw.Draw(picture).text(place, fill=color, **style)


def shortened(text: str, size: int, width: float) -> str:
    """`text`, with an ellipsis in its middle if it is wider than `width` pixels; the end may say left or right."""
    kept, short = len(text), text
    while font(size).getlength(short) > width and kept:
        kept -= 1
        short = text[: kept - kept // 3].rstrip() + "…" + text[len(text) - kept // 3 :].lstrip()
    return short


def paste_rounded(page: Image.Image, picture: Image.Image, place: tuple[int, int]) -> None:
    """Put a picture on the page with rounded corners."""
    mask = Image.new("L", (picture.width * 4, picture.height * 4))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), _ROUNDING * 4, fill=255)
    page.paste(picture, place, mask.reduce(4))


def _writable(text: str) -> str:
    """Text in the characters that the font has: accents dropped, others as a question mark."""
    composed = unicodedata.normalize("NFC", text)
    plain = (c if c in _BEYOND_ASCII else unicodedata.normalize("NFKD", c)[0] for c in composed)
    return "".join(c if c in _BEYOND_ASCII or (c.isascii() and c.isprintable()) else "?" for c in plain)


def _scale_bar(picture: Image.Image, mm_per_pixel: float) -> None:
    length_mm = next((mm for mm in _BARS_MM if mm / mm_per_pixel <= _BAR), _BARS_MM[-1])
    right, y = picture.width - 14, picture.height - 16
    left = round(right - length_mm / mm_per_pixel)
    write(picture, ((left + right) / 2, y - 6), f"{length_mm} mm", 13, TEXT, "ms", shadow=True)
    draw = ImageDraw.Draw(picture)
    draw.line((left - 1, y, right + 1, y), fill=(0, 0, 0), width=4)
    draw.line((left, y, right, y), fill=TEXT, width=2)


def _resized(array: np.ndarray, edges: Edges, size: Size) -> np.ndarray:
    """Values (rows, columns) within `edges`, cubically interpolated to `size`; averaged where that is smaller."""
    picture = Image.fromarray(np.ascontiguousarray(array, dtype=np.float32))
    return np.array(picture.resize(size, Image.Resampling.BICUBIC, box=edges))


def _softened(mask: np.ndarray) -> np.ndarray:
    """A mask whose half-height contour has no steps, yet keeps every voxel, single ones too."""
    mask = mask.astype(np.float32)
    return (mask + ndimage.gaussian_filter(mask, 0.8)) / 2


def _pixels(first: float, last: float, low: float, high: float, size: int) -> tuple[int, int]:
    """The pixels, of `size` over [low, high), that cover the cells [first, last)."""
    start, stop = (np.array([first, last]) - low) / (high - low) * size
    return max(0, int(np.floor(start))), min(size, int(np.ceil(stop)))
