"""How many, how large and where: figures of what was found in a picture, of each class and of each object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medseg3d.report.records import six_digits, write_csv
from medseg3d.tasks import Instances, Panoptic, SemanticMap, semantic_from_instances, semantic_from_panoptic
from medseg3d.tasks.regions import Region, regions_of

_CENTROID = ("centroid_row", "centroid_column")
_BOX = ("box_start_row", "box_start_column", "box_stop_row", "box_stop_column")
_COLOURS = ("mean_red", "mean_green", "mean_blue")
_OF_A_MASK = (*_CENTROID, *_BOX, "touches_border", "mean", *_COLOURS)
CLASS_COLUMNS = ("case", "class", "name", "pixels", "share", "mean", *_COLOURS)
OBJECT_COLUMNS = ("case", "id", "class", "name", "score", "pixels", *_OF_A_MASK)


def picture_statistics(result: SemanticMap | Instances | Panoptic, image: np.ndarray) -> dict[str, Any]:
    """Figures of a picture, ready for JSON: {"rows", "columns", "classes": [...], "objects": [...]}.

    Of each class, those that were not found too: class (its number), name, pixels (what several objects have in common
    counts once), share of all pixels, objects (how many; None of stuff), and the means below.

    Of each object and each segment of stuff, unless the model gives classes alone:

    - id: its number in the label image or the panoptic PNG; class, name; score, None where the model gives none;
    - pixels: its own, those that another object hides too;
    - centroid_row, centroid_column: mean index of its pixels;
    - box_start_row, box_start_column, box_stop_row, box_stop_column: the tight box of its mask, half-open;
    - touches_border: whether it reaches the edge of the picture, where it may be cut off;
    - mean: of the picture within it, and mean_red, mean_green and mean_blue of a picture in colours.

    Where there is no pixel, what follows from them is None.

    Args:
        result: what was found.
        image: (rows, columns) or (rows, columns, 3), in whatever unit the file has.

    Raises:
        ValueError: the two have not one shape.
    """
    if image.shape[:2] != result.shape:
        raise ValueError(f"picture and segmentation have one shape, got {image.shape[:2]} and {result.shape}")
    figures: dict[str, Any] = {"rows": result.shape[0], "columns": result.shape[1]}
    if isinstance(result, SemanticMap):
        return {**figures, "classes": _classes(result, image)}
    objects = [
        {
            "id": number,
            "class": category,
            "name": result.categories[category].name,
            "score": score,
            **_of(region, image),
        }
        for number, region, category, score in _parts(result)
    ]
    classes = _classes(_semantic(result), image)
    for figure in classes:
        counted = result.categories[figure["class"]].is_thing
        figure["objects"] = sum(one["class"] == figure["class"] for one in objects) if counted else None
    return {**figures, "classes": classes, "objects": objects}


def write_picture_statistics_csv(path: str | Path, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write one line for each object of each picture (name -> what `picture_statistics` returned), or for each class
    where there are classes alone; atomically."""
    objects = any("objects" in result for result in results.values())
    part, columns = ("objects", OBJECT_COLUMNS) if objects else ("classes", CLASS_COLUMNS)
    rows = [{"case": case, **figures} for case, result in results.items() for figures in result[part]]
    return write_csv(path, rows, columns)


def _classes(semantic: SemanticMap, image: np.ndarray) -> list[dict[str, Any]]:
    figures = []
    for number, category in semantic.categories.items():
        inside = semantic.classes == number
        pixels = int(np.count_nonzero(inside))
        share = six_digits(pixels / max(1, inside.size))
        named = {"class": number, "name": category.name, "pixels": pixels, "share": share}
        figures.append({**named, **_means(image[inside])})
    return figures


def _parts(result: Instances | Panoptic) -> Iterator[tuple[int, Region, int, float | None]]:
    """Id, mask, class and score of each object or segment; no scores where all are 1, as without any."""
    if isinstance(result, Instances):
        scored = bool((result.scores != 1).any())
        columns = zip(result.regions, result.classes.tolist(), result.scores.tolist(), strict=True)
        for number, (region, category, score) in enumerate(columns, start=1):
            yield number, region, category, score if scored else None
        return
    found, nothing = regions_of(result.ids), Region((0, 0), np.zeros((0, 0), bool))
    scored = any(segment.score != 1 for segment in result.segments.values())
    for number, segment in sorted(result.segments.items()):
        yield number, found.get(number, nothing), segment.category, segment.score if scored else None


def _semantic(result: Instances | Panoptic) -> SemanticMap:
    void = max(result.categories, default=0) + 1
    return (
        semantic_from_instances(result, void) if isinstance(result, Instances) else semantic_from_panoptic(result, void)
    )


def _of(region: Region, image: np.ndarray) -> dict[str, Any]:
    """What follows from a mask and the picture in its box."""
    if not region.area:
        return {"pixels": 0, **dict.fromkeys(_OF_A_MASK)}
    corner, shape = np.array(region.corner), np.array(region.inside.shape)
    centroid = corner + np.argwhere(region.inside).mean(axis=0)
    stop = corner + shape
    return {
        "pixels": region.area,
        **dict(zip(_CENTROID, centroid.round(2).tolist(), strict=True)),
        **dict(zip(_BOX, [*corner.tolist(), *stop.tolist()], strict=True)),
        "touches_border": bool((corner == 0).any() or (stop == image.shape[:2]).any()),
        **_means(image[region.slices][region.inside]),
    }


def _means(values: np.ndarray) -> dict[str, float | None]:
    """Of pixels (N,) or (N, 3)."""
    names = ("mean", *_COLOURS) if values.ndim == 2 else ("mean",)
    if not len(values):
        return dict.fromkeys(names)
    channels = np.atleast_1d(values.mean(axis=0, dtype=np.float64))
    means = [channels.mean(), *channels] if values.ndim == 2 else channels
    return {name: six_digits(mean) for name, mean in zip(names, means, strict=True)}
