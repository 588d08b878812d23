"""COCO JSON: references and detections of images, in and out.

The format: https://cocodataset.org/#format-data. Masks are run-length codes (compressed or plain) or polygons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg3d.io.atomic import write_text
from medseg3d.tasks import RLE, Category, Instances, Region, polygons

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class ImageEntry:
    """An image as a COCO file names it: the name of its file and its (height, width)."""

    file_name: str
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class CocoFile:
    """What a COCO file holds: ``images`` and ``categories`` by their ids; masks are decoded when asked for."""

    images: Mapping[int, ImageEntry]
    categories: Mapping[int, Category]
    annotations: Mapping[int, Sequence[Entry]]

    def instances(self, image_id: int) -> Instances:
        """The instances of an image; ValueError where an annotation is damaged."""
        return instances_of(self.annotations.get(image_id, ()), self.images[image_id].shape, self.categories)


def read_coco(path: str | Path) -> CocoFile:
    """Read a file of references: "images", "annotations", "categories".

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not JSON, a part is missing, or an annotation names an unknown image.
    """
    document = read_document(path, ("images", "annotations", "categories"))
    return CocoFile(
        read_images(path, document), read_categories(path, document), _by_image(path, document["annotations"], document)
    )


def read_coco_results(path: str | Path, reference: CocoFile) -> CocoFile:
    """Read a file of detections, a list of {"image_id", "category_id", "score", "segmentation" or "bbox"}, of images
    of ``reference``. Errors as `read_coco`."""
    entries = read_document(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is no list of detections; read_coco reads references")
    known = {"images": [{"id": image_id} for image_id in reference.images]}
    return CocoFile(reference.images, reference.categories, _by_image(path, entries, known))


def write_coco(path: str | Path, instances: Mapping[str, Instances], as_polygons: bool = False) -> Path:
    """Write references: the instances of each image file, numbered from 1 in their order, atomically.

    Masks as run-length codes, or ``as_polygons`` along the pixels' edges (crowds and empty masks stay codes); both
    give the same masks back. A score that is not 1 is kept under "score".

    Raises:
        ValueError: a scan instead of an image, or two names for one category.
    """
    images: list[Entry] = []
    annotations: list[Entry] = []
    for image_id, (name, found) in enumerate(instances.items(), start=1):
        for entry in entries_of(found, image_id, as_polygons):
            annotations.append({"id": len(annotations) + 1, **entry})
        height, width = found.shape
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": category_entries(found.categories for found in instances.values()),
    }
    return write_document(path, document)


def write_coco_results(
    path: str | Path, instances: Mapping[int, Instances], geometry: Literal["masks", "boxes"] = "masks"
) -> Path:
    """Write detections as COCO's evaluation takes them, a list over all images, by the id of the image.

    Either masks or boxes: where a detection has both, COCO's program sorts masks into sizes by the area of the box.
    """
    kept = ("image_id", "category_id", {"masks": "segmentation", "boxes": "bbox"}[geometry])
    entries = []
    for image_id, found in instances.items():
        for entry, score in zip(entries_of(found, image_id), found.scores.tolist(), strict=True):
            entries.append({**{key: entry[key] for key in kept}, "score": score})
    return write_document(path, entries)


def entries_of(instances: Instances, image_id: int, as_polygons: bool = False) -> list[dict[str, Any]]:
    """The annotations of one image, without ids of their own; boxes are [x, y, width, height]."""
    if len(instances.shape) != 2:
        raise ValueError(f"COCO's files hold images of two axes, got the shape {instances.shape}; write planes")
    outlines = instances.polygons() if as_polygons else []
    entries = []
    for i, region in enumerate(instances.regions):
        x0, y0, x1, y1 = instances.boxes[i].tolist()
        segmentation: Any
        if as_polygons and outlines[i] and not instances.crowd[i]:
            segmentation = [polygon.ravel().tolist() for polygon in outlines[i]]
        else:
            segmentation = RLE.of(region.mask(instances.shape)).to_json()
        entry = {
            "image_id": image_id,
            "category_id": int(instances.classes[i]),
            "iscrowd": int(instances.crowd[i]),
            "area": float(instances.areas[i]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": segmentation,
        }
        score = float(instances.scores[i])
        entries.append(entry if score == 1 else {**entry, "score": score})
    return entries


def instances_of(entries: Sequence[Entry], shape: tuple[int, int], categories: Mapping[int, Category]) -> Instances:
    """The instances that annotations or detections of one image describe.

    Without "segmentation" the mask is the box, without "bbox" the box is the mask's; a polygon of fewer than three
    corners encloses nothing.
    """
    regions, boxes, areas = [], [], []
    for entry in entries:
        try:
            region, box = _region_and_box(entry, shape)
            int(entry["category_id"])
        except (KeyError, TypeError, ValueError) as error:
            name = f"annotation {entry['id']}" if "id" in entry else "a detection"
            said = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{name} of image {entry.get('image_id')} is damaged: {said}") from error
        regions.append(region)
        boxes.append(box)
        areas.append(float(entry.get("area", region.area)))
    return Instances(
        shape,
        regions,
        classes=[int(entry["category_id"]) for entry in entries],
        scores=[float(entry.get("score", 1)) for entry in entries],
        boxes=boxes,
        areas=areas,
        crowd=[bool(entry.get("iscrowd", 0)) for entry in entries],
        categories=categories,
    )


def category_entries(tables: Any) -> list[dict[str, Any]]:
    """COCO's list of the categories of several images; ValueError where they contradict each other."""
    merged: dict[int, Category] = {}
    for number, category in (item for table in tables for item in table.items()):
        if merged.setdefault(number, category) != category:
            raise ValueError(f"category {number} is {merged[number]} in one image and {category} in another")
    return [{"id": n, "name": c.name, "isthing": int(c.is_thing)} for n, c in sorted(merged.items())]


def read_document(path: str | Path, parts: Sequence[str] = ()) -> Any:
    """A JSON file that has these parts; ValueError if it is damaged or lacks one."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    missing = [part for part in parts if not isinstance(document, dict) or not isinstance(document.get(part), list)]
    if missing:
        raise ValueError(f"{path} lacks the lists {missing}, which COCO's format has")
    return document


def write_document(path: str | Path, document: Any) -> Path:
    """Write JSON, atomically."""
    return write_text(path, json.dumps(document, ensure_ascii=False))


def read_images(path: str | Path, document: Entry) -> dict[int, ImageEntry]:
    """The images that a document lists."""
    try:
        return {
            int(image["id"]): ImageEntry(str(image["file_name"]), (int(image["height"]), int(image["width"])))
            for image in document["images"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: an image has "id", "file_name", "height" and "width"; one lacks {error}') from error


def read_categories(path: str | Path, document: Entry) -> dict[int, Category]:
    """The categories that a document lists; those that do not say otherwise are things."""
    try:
        return {
            int(entry["id"]): Category(str(entry["name"]), bool(entry.get("isthing", 1)))
            for entry in sorted(document["categories"], key=lambda entry: entry["id"])
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: a category has "id" and "name"; one lacks {error}') from error


def _by_image(path: str | Path, entries: Sequence[Entry], document: Entry) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = {int(image["id"]): [] for image in document["images"]}
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("image_id") not in found:
            raise ValueError(f"{path}: an annotation belongs to one of the images listed, one is {str(entry)[:80]}")
        found[entry["image_id"]].append(entry)
    return found


def _region_and_box(entry: Entry, shape: tuple[int, int]) -> tuple[Region, np.ndarray]:
    box = None
    if entry.get("bbox") is not None:
        x, y, width, height = (float(value) for value in entry["bbox"])
        if not np.isfinite([x, y, width, height]).all() or width < 0 or height < 0:
            raise ValueError(f"its box [x, y, width, height] is {entry['bbox']}; sides are 0 or more")
        box = np.array([x, y, x + width, y + height])
    drawn = entry.get("segmentation")
    if drawn is None:
        if box is None:
            raise KeyError("segmentation or bbox")
        return Instances.from_boxes([box], shape).regions[0], box
    if isinstance(drawn, dict):
        code = RLE.from_json(drawn)
        if code.shape != shape:
            raise ValueError(f"its mask has the shape {code.shape}, the image {shape}")
        mask = code.mask()
    else:
        mask = polygons.fill([polygon for polygon in drawn if len(polygon) >= 6], shape)
    region = Region.of(mask)
    return region, region.box if box is None else box
