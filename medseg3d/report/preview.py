"""One picture of a segmentation: three planes through it, more axial ones, and a legend with volumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from medseg3d.io import write_atomic
from medseg3d.report import drawing
from medseg3d.report.drawing import BACKGROUND, FAINT, MUTED, TEXT, Color, Size, shortened, write
from medseg3d.report.planes import AXIAL, CORONAL, ENDS, SAGITTAL, Range, Scene, View, cut
from medseg3d.report.records import require_same_grid
from medseg3d.volume import Volume

SIZE = (1600, 900)
FOOTER = "Research use only. Not for clinical decisions."

_EDGE = 32  # free space around the page
_GAP = 12  # between pictures
_TOP, _BOTTOM = 92, 852  # of the pictures
_LEGEND = 316  # its width
_WIDTH = SIZE[0] - 2 * _EDGE - _LEGEND - 32  # of the pictures
_ROW = (380, 520)  # height of the row of the three planes, least and most
_ASPECT = (0.6, 1.6)  # width over height of a plane, least and most
_STRIP = (3, 5)  # planes in the row below, least and most
_ENTRY = (24, 36)  # height of a legend entry, least and most


def preview(
    segmentation: Volume,
    image: Volume,
    labels: Mapping[int, str],
    colors: Mapping[int, Color],
    title: str = "",
    subtitle: str = "",
    window: tuple[float, float] = (40.0, 400.0),
    footer: str = FOOTER,
) -> Image.Image:
    """A picture (RGB, 1600 x 900) of a label map on its CT, in the radiological convention (right on the left).

    Args:
        segmentation: integer label map.
        image: the CT in HU, on the same grid.
        labels: label -> name, in the legend's order; other labels are not shown.
        colors: label -> (red, green, blue), 0 to 255, for each of `labels`.
        title, subtitle: for instance the case and the model.
        window: centre and width in HU of the grey scale; (40, 400) suits soft tissue.
        footer: small print at the bottom.

    Raises:
        ValueError: the two grids differ, or the window has no width.
    """
    require_same_grid(segmentation.geometry, image.geometry, ("the segmentation", "the image"))
    if window[1] <= 0:
        raise ValueError(f"the window is (centre, width) in HU with a width above 0, got {window}")
    labels = {label: name for label, name in labels.items() if label != 0}
    scene = Scene(segmentation, image, labels)
    page = Image.new("RGB", SIZE, BACKGROUND)
    _header(page, title, subtitle, _facts(scene, len(labels), window))
    _Pictures(page, scene, {label: colors[label] for label in labels}, window).draw()
    voxel_ml = image.geometry.voxel_volume / 1000
    _legend(page, labels, colors, {label: profile.voxels * voxel_ml for label, profile in scene.found.items()})
    write(page, (_EDGE, SIZE[1] - 24), footer, 14, MUTED, "lm")
    return page


def write_preview(path: str | Path, picture: Image.Image) -> Path:
    """Write a picture as PNG, atomically."""
    return write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))


class _Pictures:
    """The planes of a scene, put on a page."""

    def __init__(
        self, page: Image.Image, scene: Scene, colors: Mapping[int, Color], window: tuple[float, float]
    ) -> None:
        self.page, self.scene, self.colors, self.window = page, scene, colors, window

    def draw(self) -> None:
        """The three planes in a row as high as their shapes allow, and further axial planes in the rest."""
        views = (AXIAL, CORONAL, SAGITTAL)
        cells = [self.scene.cells[view.normal] for view in views]
        extents = [self._extent(view, cell) for view, cell in zip(views, cells, strict=True)]
        aspects = np.clip([across / down for across, down in extents], *_ASPECT)
        free = _WIDTH - 2 * _GAP
        height = int(np.clip(free / aspects.sum(), *_ROW))
        sizes = [(int(width), height) for width in aspects / aspects.sum() * free]
        scales = [_scale(extent, size) for extent, size in zip(extents, sizes, strict=True)]
        scales[1:] = [max(scales[1:])] * 2  # coronal and sagittal at one scale, so that heights compare
        left = _EDGE
        for view, cell, size, scale in zip(views, cells, sizes, scales, strict=True):
            drawing.paste_rounded(self.page, self._main_plane(view, cell, size, scale), (left, _TOP))
            left += size[0] + _GAP
        self._strip(_TOP + height + _GAP, float(aspects[0]))

    def _strip(self, top: int, aspect: float) -> None:
        """Axial planes from head to foot below `top`, at one scale."""
        height = _BOTTOM - top
        number = int(np.clip(round((_WIDTH + _GAP) / (height * aspect + _GAP)), *_STRIP))
        size = ((_WIDTH - (number - 1) * _GAP) // number, height)
        cells = self.scene.further_cells(AXIAL.normal, number)
        scale = max((_scale(self._extent(AXIAL, cell), size) for cell in cells), default=1.0)
        for n, cell in enumerate(cells):
            picture = self._plane(AXIAL, cell, size, scale)
            drawing.mark_plane(picture, AXIAL, self._place(AXIAL, cell))
            drawing.paste_rounded(self.page, picture, (_EDGE + n * (size[0] + _GAP), top))

    def _main_plane(self, view: View, cell: int, size: Size, scale: float) -> Image.Image:
        picture = self._plane(view, cell, size, scale)
        crossings = []
        for axis, (_, high) in zip((view.across, view.down), self._ranges(view, cell, size, scale), strict=True):
            crossings.append((high - self.scene.grid.position(axis, self.scene.cells[axis])) / scale)
        drawing.mark_crossings(picture, *crossings)
        return drawing.mark_plane(picture, view, f"{view.name}  {self._place(view, cell)}", mm_per_pixel=scale)

    def _plane(self, view: View, cell: int, size: Size, scale: float) -> Image.Image:
        across, down = self._ranges(view, cell, size, scale)
        return drawing.draw_plane(cut(self.scene, view, cell, across, down), size, self.colors, self.window)

    def _extent(self, view: View, cell: int) -> tuple[float, float]:
        """Width and height in mm of what a plane must show."""
        across, down = np.diff(self.scene.plane_box(view, cell), axis=0)[0, [view.across, view.down]].tolist()
        return across, down

    def _ranges(self, view: View, cell: int, size: Size, scale: float) -> list[Range]:
        """World ranges across and down that fill a picture, around the plane's box and, if possible, in the volume."""
        box = self.scene.plane_box(view, cell)
        result = []
        for axis, pixels in zip((view.across, view.down), size, strict=True):
            half = pixels * scale / 2
            low, high = self.scene.grid.box[:, axis] + np.array([half, -half])
            middle = float(np.clip(box[:, axis].mean(), low, high) if low < high else (low + high) / 2)
            result.append((middle - half, middle + half))
        return result

    def _place(self, view: View, cell: int) -> str:
        position = self.scene.grid.position(view.normal, cell)
        return f"{ENDS[view.normal][position < 0]} {abs(position):.0f} mm"


def _scale(extent: tuple[float, float], size: Size) -> float:
    """mm per pixel at which `extent` (mm) fits into a picture of `size`."""
    return max(extent[0] / size[0], extent[1] / size[1])


def _facts(scene: Scene, number: int, window: tuple[float, float]) -> str:
    spacing = " x ".join(f"{mm:.3g}" for mm in scene.image.spacing)
    found = f"{len(scene.found)} of {number} structures found"
    return "   ·   ".join((found, f"voxels {spacing} mm", f"window {window[0]:g} / {window[1]:g} HU"))


def _header(page: Image.Image, title: str, subtitle: str, facts: str) -> None:
    right = SIZE[0] - _EDGE
    free = right - _EDGE - drawing.font(15).getlength(facts) - 40
    write(page, (_EDGE, 46), shortened(title, 30, right - _EDGE), 30, TEXT, "ls")
    write(page, (_EDGE, 72), shortened(subtitle, 16, free), 16, MUTED, "ls")
    write(page, (right, 72), facts, 15, MUTED, "rs")


def _legend(
    page: Image.Image, labels: Mapping[int, str], colors: Mapping[int, Color], volumes: Mapping[int, float]
) -> None:
    """Name, colour and volume (ml) of each label; of too many, the largest."""
    draw = ImageDraw.Draw(page)
    left, right = SIZE[0] - _EDGE - _LEGEND, SIZE[0] - _EDGE
    most = (_BOTTOM - _TOP) // _ENTRY[0]
    shown, rest = list(labels), ""
    if len(labels) > most:
        shown = sorted(volumes, key=lambda label: -volumes[label])[: most - 1]
        rest = f"+ {len(volumes) - len(shown)} smaller,  {len(labels) - len(volumes)} not found"
    step = int(np.clip((_BOTTOM - _TOP) / max(1, len(shown) + bool(rest)), *_ENTRY))
    for n, label in enumerate(shown):
        y = _TOP + (n + 0.5) * step
        found = label in volumes
        swatch = (left, y - 7, left + 14, y + 7)
        draw.rounded_rectangle(
            swatch, 4, fill=tuple(colors[label]) if found else None, outline=None if found else FAINT
        )
        volume = _millilitres(volumes[label]) if found else "not found"
        name = shortened(labels[label].replace("_", " "), 17, _LEGEND - 40 - drawing.font(16).getlength(volume))
        write(page, (left + 26, y), name, 17, TEXT if found else FAINT, "lm")
        write(page, (right, y), volume, 16, MUTED if found else FAINT, "rm")
    write(page, (left + 26, _TOP + (len(shown) + 0.5) * step), rest, 16, MUTED, "lm")


def _millilitres(volume: float) -> str:
    """1234 ml, 123 ml, 12.3 ml, 1.23 ml, 0.12 ml, < 0.01 ml."""
    if volume < 0.01:
        return "< 0.01 ml"
    return f"{volume:.{int(np.clip(2 - np.floor(np.log10(volume)), 0, 2))}f} ml"
