"""Segmentations of pictures out: label images, objects as COCO JSON, and COCO's panoptic PNG with its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medseg3d.io.atomic import write_text
from medseg3d.io.coco import category_entries, read_document, write_coco, write_document
from medseg3d.io.formats import split_name
from medseg3d.io.labels import LabelTable, sidecar_path, sidecar_text
from medseg3d.io.panoptic import segment_entries, write_panoptic_png
from medseg3d.io.raster import write_image, write_label_image
from medseg3d.tasks import Instances, Panoptic, SemanticMap

Result = SemanticMap | Instances | Panoptic

_PARTS = ("images", "annotations", "categories")
_MOST = 65535


def write_result(path: str | Path, result: Result, colors: Mapping[int, tuple[int, int, int]] | None = None) -> Path:
    """Write what is seen at each pixel as PNG or TIFF, atomically.

    Of a semantic map the numbers of the classes, with ``colors`` in the palette; of instances their numbers from 1,
    the higher score above the lower, always in 16 bits; of a panoptic segmentation COCO's colours.

    Raises:
        ValueError: another suffix, more than 65,535 objects, or a scan instead of a picture.
    """
    if isinstance(result, Panoptic):
        return write_panoptic_png(path, result)
    if isinstance(result, SemanticMap):
        return write_label_image(path, result.classes, colors)
    if len(result) > _MOST:
        raise ValueError(
            f"a label image numbers up to {_MOST} objects, got {len(result)}: write JSON, or cut the picture in parts"
        )
    return write_image(path, result.label_map().astype(np.uint16))


def write_named_result(path: str | Path, result: Result, table: LabelTable, source: str) -> Path:
    """`write_result` in the colours of ``table``; its names go into `<stem>.labels.json` beside a semantic map.

    Args:
        source: the picture's file name.
    """
    path = write_result(path, result, table.colors)
    if isinstance(result, SemanticMap):
        try:
            write_text(sidecar_path(path), sidecar_text(table, path, source))
        except OSError:
            path.unlink()
            raise
    return path


def write_result_json(path: str | Path, result: Instances | Panoptic, file_name: str, drawn: str = "") -> Path:
    """Write the objects or segments of the picture ``file_name`` as COCO JSON, atomically.

    A panoptic segmentation names its PNG, ``drawn``; by default ``path`` with another suffix.
    """
    if isinstance(result, Instances):
        return write_coco(path, {file_name: result})
    height, width = result.shape
    drawn = drawn or f"{split_name(path)[0].removesuffix('.json')}.png"
    document = {
        "images": [{"id": 1, "file_name": file_name, "height": height, "width": width}],
        "annotations": [{"image_id": 1, "file_name": drawn, "segments_info": segment_entries(result)}],
        "categories": category_entries([result.categories]),
    }
    return write_document(path, document)


def join_results(path: str | Path, parts: Iterable[str | Path]) -> Path:
    """Write one COCO file of the pictures of several, numbered anew from 1 in their order, atomically.

    Raises:
        ValueError: a part is no COCO file, or two parts name a category differently.
    """
    joined: dict[str, list[dict[str, Any]]] = {part: [] for part in _PARTS}
    categories: dict[int, dict[str, Any]] = {}
    for part in parts:
        document = read_document(part, _PARTS)
        number = {image["id"]: len(joined["images"]) + n for n, image in enumerate(document["images"], start=1)}
        joined["images"] += [{**image, "id": number[image["id"]]} for image in document["images"]]
        for entry in document["annotations"]:
            own = {"id": len(joined["annotations"]) + 1} if "id" in entry else {}
            joined["annotations"].append({**entry, **own, "image_id": number[entry["image_id"]]})
        for category in document["categories"]:
            if categories.setdefault(category["id"], category) != category:
                raise ValueError(f"{part} names category {category['id']} otherwise than the files before it")
    joined["categories"] = [categories[number] for number in sorted(categories)]
    return write_document(path, joined)
