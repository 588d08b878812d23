"""COCO's panoptic format in and out: a PNG for each image whose colour is the id of the segment, red + 256 green +
65536 blue with black for void, and one JSON file that says what the segments are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg3d.io.coco import (
    Entry,
    ImageEntry,
    category_entries,
    read_categories,
    read_document,
    read_images,
    write_document,
)
from medseg3d.io.raster import read_image, write_image
from medseg3d.tasks import VOID, Category, Panoptic, Segment
from medseg3d.tasks.regions import regions_of

_STEPS = np.array([1, 1 << 8, 1 << 16])
_MOST = (1 << 24) - 1  # of the ids that a colour can hold


@dataclass(frozen=True, eq=False)
class PanopticFile:
    """What a panoptic JSON file holds: ``images`` and ``categories`` by their ids; pictures are read when asked for."""

    images: Mapping[int, ImageEntry]
    categories: Mapping[int, Category]
    annotations: Mapping[int, Entry]
    folder: Path

    def panoptic(self, image_id: int) -> Panoptic:
        """The segmentation of an image; ValueError where its picture and its segments do not fit together."""
        entry = self.annotations[image_id]
        path = self.folder / entry["file_name"]
        ids = ids_of_colors(read_image(path))
        if ids.shape != self.images[image_id].shape:
            raise ValueError(f"{path} has the shape {ids.shape}, its image {self.images[image_id].shape}")
        try:
            return Panoptic(ids, _segments(entry["segments_info"]), self.categories)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit the segments in its JSON file: {error}") from error


def read_panoptic(path: str | Path, folder: str | Path | None = None) -> PanopticFile:
    """Read a panoptic JSON file; its pictures are in ``folder``, by default the one of the same name without ".json".

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not JSON or lacks a part.
    """
    path = Path(path)
    document = read_document(path, ("images", "annotations", "categories"))
    images = read_images(path, document)
    annotations = {}
    for entry in document["annotations"]:
        if not {"image_id", "file_name", "segments_info"} <= set(entry) or entry["image_id"] not in images:
            raise ValueError(
                f'{path}: an annotation has the "image_id" of an image listed, "file_name" and "segments_info"; '
                f"one is {str(entry)[:80]}"
            )
        annotations[int(entry["image_id"])] = entry
    return PanopticFile(
        images, read_categories(path, document), annotations, path.with_suffix("") if folder is None else Path(folder)
    )


def write_panoptic(path: str | Path, images: Mapping[str, Panoptic], folder: str | Path | None = None) -> Path:
    """Write the segmentation of each image file: PNGs into ``folder`` (by default named like the JSON file), and last
    the JSON file ``path``; each atomically. Images are numbered from 1 in their order.

    Raises:
        ValueError: a scan instead of an image, an id above 16,777,215, or two names for one category.
    """
    path = Path(path)
    folder = path.with_suffix("") if folder is None else Path(folder)
    listed: list[Entry] = []
    annotations: list[Entry] = []
    pictures: set[str] = set()
    for image_id, (name, panoptic) in enumerate(images.items(), start=1):
        picture = f"{Path(name).stem}.png"
        if picture in pictures:
            raise ValueError(f"two images would write {picture}; give them names that differ before the suffix")
        pictures.add(picture)
        write_panoptic_png(folder / picture, panoptic)
        height, width = panoptic.shape
        listed.append({"id": image_id, "file_name": name, "height": height, "width": width})
        annotations.append({"image_id": image_id, "file_name": picture, "segments_info": segment_entries(panoptic)})
    categories = category_entries(panoptic.categories for panoptic in images.values())
    return write_document(path, {"images": listed, "annotations": annotations, "categories": categories})


def write_panoptic_png(path: str | Path, panoptic: Panoptic) -> Path:
    """Write the ids of the segments as colours, atomically; errors as `write_panoptic`."""
    if panoptic.ids.ndim != 2:
        raise ValueError(f"a panoptic PNG is an image of two axes, got the shape {panoptic.shape}; write planes")
    return write_image(path, colors_of_ids(panoptic.ids))


def ids_of_colors(image: np.ndarray) -> np.ndarray:
    """The id of each pixel (int32) from red, green and blue of 8 bits; ValueError for another image."""
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ValueError(f"a panoptic PNG has red, green and blue of 8 bits, got {image.dtype} {image.shape}")
    return image.astype(np.int32) @ _STEPS.astype(np.int32)


def colors_of_ids(ids: np.ndarray) -> np.ndarray:
    """Red, green and blue (uint8, last axis) of each id of 0 to 16,777,215; ValueError for another."""
    if ids.min(initial=0) < 0 or ids.max(initial=0) > _MOST:
        raise ValueError(f"a colour holds the ids 0 to {_MOST}, got {ids.min()} to {ids.max()}; number them anew")
    return (ids[..., None] // _STEPS % 256).astype(np.uint8)


def segment_entries(panoptic: Panoptic) -> list[dict[str, Any]]:
    """COCO's "segments_info": id, category, area, box [x, y, width, height] and crowd flag of each segment."""
    entries = []
    regions = regions_of(panoptic.ids)
    for number, segment in panoptic.segments.items():
        if number not in regions:
            continue  # COCO's programs refuse a segment without a pixel
        x0, y0, x1, y1 = (int(value) for value in regions[number].box)
        entry = {
            "id": number,
            "category_id": segment.category,
            "iscrowd": int(segment.crowd),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": regions[number].area,
        }
        entries.append(entry if segment.score == 1 else {**entry, "score": segment.score})
    return entries


def _segments(entries: Sequence[Entry]) -> dict[int, Segment]:
    segments = {}
    for entry in entries:
        if int(entry["id"]) == VOID:
            raise ValueError("the id 0 stands for void, a segment has it")
        crowd, score = bool(entry.get("iscrowd", 0)), float(entry.get("score", 1))
        segments[int(entry["id"])] = Segment(int(entry["category_id"]), score, crowd)
    return segments
