"""`plot`: a segmentation of any kind drawn on its image, or on a plane through its scan, with names and a legend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from medseg3d.io.labels import default_color
from medseg3d.report import drawing
from medseg3d.report.drawing import BACKGROUND, MUTED, TEXT, Color, shortened, write
from medseg3d.report.planes import AXIAL, CORONAL, ENDS, SAGITTAL, Cut, Scene, View, cut
from medseg3d.tasks import Categories, Instances, Panoptic, SemanticMap
from medseg3d.volume import Volume

_PLANES = {view.name: view for view in (AXIAL, CORONAL, SAGITTAL)}
_AUTO = (0.2, 99.8)  # percentiles of a grey image that become black and white
_LARGEST = 8.0  # pixels of the picture for one of the image, at most
_EDGE, _GAP, _LEGEND, _ENTRY = 20, 20, 250, 26
_MANY = 60  # objects above which none is named
_CHIP = 13  # size of the letters of a name
_CT_WINDOW = (40.0, 400.0)


@dataclass(frozen=True)
class _Mark:
    """What is drawn for one number of a label map: its colour, and the name written on it."""

    category: int
    color: Color
    caption: str
    box: np.ndarray | None = None


@dataclass(frozen=True)
class _Drawn:
    """A result as a label map of 1, 2, ... and what each number is."""

    label_map: np.ndarray
    marks: Mapping[int, _Mark]
    categories: Categories


def plot(
    image: np.ndarray | Volume,
    result: SemanticMap | Instances | Panoptic,
    *,
    colors: Mapping[int, Color] | None = None,
    window: tuple[float, float] | None = None,
    plane: str = "axial",
    position: float | None = None,
    names: bool | None = None,
    title: str = "",
    size: tuple[int, int] = (1000, 800),
) -> Image.Image:
    """A picture (RGB) of a segmentation on its image, with a legend of the categories.

    Semantic maps and stuff are in the colour of their category, objects each in one of its own, boxes of detections
    around them. Of a scan one plane is drawn, in the radiological convention.

    Args:
        image: (rows, columns) or (rows, columns, 3); or the scan, a CT in HU.
        result: of the same shape.
        colors: category -> (red, green, blue), 0 to 255, for those that shall not have a colour of the fixed palette;
            objects of such a category all have it.
        window: centre and width of the grey scale; by default a CT's soft tissue (40, 400), and what an image holds.
        plane: "axial", "coronal" or "sagittal", of a scan.
        position: where that plane lies, in world mm (RAS+); by default where it shows most.
        names: whether objects and regions are named on the picture; by default where that tells more than the legend
            and they are not too many.
        title: above the picture.
        size: the most pixels that the image takes, (width, height); it keeps its shape.

    Raises:
        ValueError: the shapes differ, the image is empty or of another kind, a window without width, an unknown plane.
    """
    drawn = _drawn(result, colors or {})
    if window is not None and not window[1] > 0:
        raise ValueError(f"the window is (centre, width) with a width above 0, got {window}")
    if tuple(image.shape[: len(result.shape)]) != result.shape:
        raise ValueError(f"image and segmentation have one shape, got {image.shape} and {result.shape}")
    if isinstance(image, Volume):
        picture, part, facts = _plane_picture(image, drawn, _view(plane), position, window or _CT_WINDOW, size)
    else:
        picture, part, facts = _image_picture(np.asarray(image), drawn, window, size)
        _draw_boxes(picture, drawn, part)
    if names is None:
        captions = [drawn.marks[number].caption for number in _numbers(part.label_map)]
        names = len(captions) <= _MANY and len(set(captions)) > 1
    if names:
        _name(picture, part, drawn)
    return _page(picture, drawn, title, facts)


def _drawn(result: SemanticMap | Instances | Panoptic, colors: Mapping[int, Color]) -> _Drawn:
    if isinstance(result, SemanticMap):
        known = [number for number in result.categories if number != 0]
        marks = {
            i: _Mark(number, colors.get(number, default_color(i)), result.categories[number].name)
            for i, number in enumerate(known, start=1)
        }
        return _Drawn(_renumbered(result.classes, known), marks, result.categories)
    if isinstance(result, Instances):
        tight = np.array([region.box for region in result.regions]).reshape(result.boxes.shape)
        detected = bool((result.boxes != tight).any() or (result.scores != 1).any())
        marks = {}
        for i, number in enumerate(result.classes.tolist(), start=1):
            caption = _caption(result.categories[number].name, float(result.scores[i - 1]))
            box = result.boxes[i - 1] if detected else None
            marks[i] = _Mark(number, colors.get(number, default_color(i)), caption, box)
        return _Drawn(result.label_map(), marks, result.categories)
    if isinstance(result, Panoptic):
        marks = {}
        for i, segment in enumerate(result.segments.values(), start=1):
            caption = _caption(result.categories[segment.category].name, segment.score)
            marks[i] = _Mark(segment.category, colors.get(segment.category, default_color(i)), caption)
        return _Drawn(_renumbered(result.ids, list(result.segments)), marks, result.categories)
    raise ValueError(f"plot draws a SemanticMap, Instances or a Panoptic, got {type(result).__name__}")


def _renumbered(label_map: np.ndarray, numbers: list[int]) -> np.ndarray:
    """1, 2, ... for each of ``numbers``, 0 elsewhere."""
    order = np.argsort(numbers)
    in_order = np.array(numbers, np.int64)[order]
    if not len(in_order):
        return np.zeros(label_map.shape, np.int32)
    place = np.searchsorted(in_order, label_map).clip(0, len(in_order) - 1)
    return np.where(in_order[place] == label_map, order[place] + 1, 0).astype(np.int32)


def _numbers(label_map: np.ndarray) -> list[int]:
    """The numbers but 0 that a label map holds."""
    seen = np.zeros(int(label_map.max(initial=0)) + 1, bool)
    for plane in label_map:
        seen[plane] = True
    return (1 + np.flatnonzero(seen[1:])).tolist()


def _caption(name: str, score: float) -> str:
    return name if score == 1 else f"{name} {score:.2f}"


def _image_picture(
    image: np.ndarray, drawn: _Drawn, window: tuple[float, float] | None, size: tuple[int, int]
) -> tuple[Image.Image, Cut, str]:
    if image.ndim not in (2, 3) or not image.size or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"an image is (rows, columns) or (rows, columns, 3), not empty, got the shape {image.shape}")
    rows, columns = image.shape[:2]
    values = np.nan_to_num(np.asarray(image, np.float32))
    part = Cut(values, drawn.label_map, (0, 0, columns, rows))
    scale = min(size[0] / columns, size[1] / rows, _LARGEST)
    picture = drawing.draw_plane(
        part,
        (max(1, round(columns * scale)), max(1, round(rows * scale))),
        {number: mark.color for number, mark in drawn.marks.items()},
        _contrast(image) if window is None else window,
    )
    return picture, part, f"{columns} x {rows} pixels"


def _contrast(image: np.ndarray) -> tuple[float, float]:
    if image.ndim == 3 and image.dtype == np.uint8:
        return 127.5, 255.0
    low, high = np.percentile(image, _AUTO).tolist()
    span = high - low if high > low else 1.0
    return low + span / 2, span


def _view(name: str) -> View:
    if name not in _PLANES:
        raise ValueError(f"a plane is one of {list(_PLANES)}, got {name!r}")
    return _PLANES[name]


def _plane_picture(
    image: Volume,
    drawn: _Drawn,
    view: View,
    position: float | None,
    window: tuple[float, float],
    size: tuple[int, int],
) -> tuple[Image.Image, Cut, str]:
    scene = Scene(image.with_array(drawn.label_map), image, drawn.marks)
    cell = scene.cells[view.normal]
    if position is not None:
        low, high = scene.grid.box[:, view.normal]
        if not low <= position <= high:
            raise ValueError(f"the {view.name} planes of the scan lie at {low:.0f} to {high:.0f} mm, got {position}")
        cell = int(scene.grid.cell(view.normal, np.array([position]))[0])
    ends = scene.plane_box(view, cell)
    across, down = ((float(ends[0, axis]), float(ends[1, axis])) for axis in (view.across, view.down))
    mm = max((across[1] - across[0]) / size[0], (down[1] - down[0]) / size[1])
    pixels = round((across[1] - across[0]) / mm), round((down[1] - down[0]) / mm)
    part = cut(scene, view, cell, across, down)
    colors = {number: mark.color for number, mark in drawn.marks.items()}
    picture = drawing.draw_plane(part, pixels, colors, window)
    place = scene.grid.position(view.normal, cell)
    caption = f"{view.name}  {ENDS[view.normal][place < 0]} {abs(place):.0f} mm"
    drawing.mark_plane(picture, view, caption, mm_per_pixel=mm)
    return picture, part, f"window {window[0]:g} / {window[1]:g} HU"


def _draw_boxes(picture: Image.Image, drawn: _Drawn, part: Cut) -> None:
    draw = ImageDraw.Draw(picture)
    for mark in drawn.marks.values():
        if mark.box is not None:
            (left, top), (right, bottom) = (_point(picture, part, *corner) for corner in mark.box.reshape(2, 2))
            draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=mark.color, width=2)


def _name(picture: Image.Image, part: Cut, drawn: _Drawn) -> None:
    """The names of what is seen, the larger first, each where its region is the widest; none over another."""
    areas = np.bincount(part.label_map.ravel())
    numbers = sorted(_numbers(part.label_map), key=lambda number: -areas[number])
    taken: list[tuple[float, float, float, float]] = []
    draw = ImageDraw.Draw(picture)
    for number in numbers:
        mark = drawn.marks[number]
        if mark.box is None:
            x, y = _point(picture, part, *_widest(part.label_map == number))
        else:
            x, y = _point(picture, part, *mark.box[:2])
        width = drawing.font(_CHIP).getlength(mark.caption) + 10
        left = float(np.clip(x - (width / 2 if mark.box is None else 0), 0, max(0, picture.width - width)))
        top = float(np.clip(y - (_CHIP / 2 + 3 if mark.box is None else _CHIP + 6), 0, picture.height - _CHIP - 6))
        chip = (left, top, left + width, top + _CHIP + 6)
        if chip[2] > picture.width or any(
            chip[0] < t[2] and t[0] < chip[2] and chip[1] < t[3] and t[1] < chip[3] for t in taken
        ):
            continue
        taken.append(chip)
        draw.rounded_rectangle(chip, 4, fill=mark.color)
        dark = np.dot(mark.color, (0.299, 0.587, 0.114)) > 140
        write(picture, (left + 5, (chip[1] + chip[3]) / 2), mark.caption, _CHIP, (0, 0, 0) if dark else TEXT, "lm")


def _widest(mask: np.ndarray) -> tuple[float, float]:
    """x and y, in pixels of the mask, of the point that lies deepest inside."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    deepest = np.argmax(ndimage.distance_transform_edt(np.pad(box, 1))[1:-1, 1:-1])
    y, x = np.unravel_index(deepest, box.shape)
    return float(columns[0] + x + 0.5), float(rows[0] + y + 0.5)


def _point(picture: Image.Image, part: Cut, x: float, y: float) -> tuple[float, float]:
    """The place on the picture of a point in pixels of its image."""
    left, top, right, bottom = part.edges
    return (x - left) / (right - left) * picture.width, (y - top) / (bottom - top) * picture.height


def _page(picture: Image.Image, drawn: _Drawn, title: str, facts: str) -> Image.Image:
    head = 40 if title else 0
    counts: dict[int, list[_Mark]] = {}
    for number in _numbers(drawn.label_map):
        counts.setdefault(drawn.marks[number].category, []).append(drawn.marks[number])
    height = max(picture.height, (max(1, len(counts)) + 2) * _ENTRY)
    page = Image.new("RGB", (picture.width + 2 * _EDGE + _GAP + _LEGEND, height + 2 * _EDGE + head), BACKGROUND)
    write(page, (_EDGE, _EDGE + 10), shortened(title, 20, page.width - 2 * _EDGE), 20, TEXT, "lm")
    page.paste(picture, (_EDGE, _EDGE + head))
    left, y = picture.width + _EDGE + _GAP, _EDGE + head + _ENTRY / 2
    for category, marks in sorted(counts.items()):
        _entry(page, left, y, drawn.categories[category].name, marks, drawn.categories[category].is_thing)
        y += _ENTRY
    if not counts:
        write(page, (left, y), "nothing found", 16, MUTED, "lm")
        y += _ENTRY
    write(page, (left, y + _ENTRY / 2), facts, 13, MUTED, "lm")
    return page


def _entry(page: Image.Image, left: float, y: float, name: str, marks: list[_Mark], counted: bool) -> None:
    """One line of the legend: up to three colours, the name, and how many there are of a thing."""
    colors = list(dict.fromkeys(mark.color for mark in marks))[:3]
    draw = ImageDraw.Draw(page)
    for n, color in enumerate(colors):
        draw.rectangle((left + 14 * n / len(colors), y - 7, left + 14 * (n + 1) / len(colors), y + 7), fill=color)
    number = str(len(marks)) if counted and len(marks) > 1 else ""
    write(page, (left + 24, y), shortened(name.replace("_", " "), 16, _LEGEND - 80), 16, TEXT, "lm")
    write(page, (page.width - _EDGE, y), number, 16, MUTED, "rm")
