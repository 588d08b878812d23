"""What a bundle of pictures predicts, as one of the values of ``medseg3d.tasks``, and a transform that writes it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medseg3d.io import LabelTable
from medseg3d.io.results import Result, write_named_result, write_result_json
from medseg3d.tasks import VOID, Categories, Category, Instances, Panoptic, Segment, SemanticMap
from medseg3d.tasks.regions import regions_of

Kind = Literal["semantic", "instances", "panoptic"]
KINDS: tuple[Kind, ...] = ("semantic", "instances", "panoptic")


def as_result(prediction: Any, kind: Kind, categories: Categories) -> Result:
    """The segmentation that post-processing left under "pred".

    Args:
        prediction: for "semantic" the class of each pixel, (1, rows, columns); for "instances" the number of each
            pixel's object, (1, rows, columns) with 0 for none, or what a detector returns for a picture: "boxes"
            (N, 4), "labels" and "scores" (N,), and "masks" (N, 1, rows, columns), inside above 0.5, those without a
            pixel left out; for "panoptic" (2, rows, columns), class and number of the object, 0 for stuff, or what
            ``UPSNet`` returns for a picture: these two as "category" and "instance", and the objects' "scores". Or such
            a value itself.
        kind: one of ``KINDS``.
        categories: what the numbers of classes are; one that is not among them is background or void.

    Raises:
        ValueError: the prediction is none of these, or numbers objects where there are several classes.
    """
    if isinstance(prediction, SemanticMap | Instances | Panoptic):
        return prediction
    if kind == "instances" and isinstance(prediction, Mapping):
        return _detected(prediction, categories)
    if kind == "panoptic" and isinstance(prediction, Mapping):
        return _unified(prediction, categories)
    maps = _maps(prediction, 2 if kind == "panoptic" else 1, kind)
    if kind == "semantic":
        return SemanticMap(maps[0], categories)
    if kind == "panoptic":
        return _panoptic(maps[0], maps[1], categories)
    if len(categories) != 1:
        raise ValueError(
            f"numbered objects are all of one class, but there are {len(categories)}: the post-processing must leave "
            "boxes, labels, scores and masks"
        )
    regions = regions_of(maps[0])
    return Instances(maps[0].shape, regions.values(), classes=[*categories] * len(regions), categories=categories)


class SaveResultd(MapTransform):
    """Writes what `as_result` makes of a prediction as `<picture>_seg.png`, and `<picture>_seg.json` but for classes,
    whose names go into `<picture>_seg.labels.json`.

    The files are those of ``medseg3d predict``; the prediction stays as it was. A detector's list of one picture, as a
    MONAI evaluator hands it on with ``"decollate": false``, is taken too.

    Args:
        keys: predictions.
        output_dir: folder, which is made if it is missing.
        kind: "semantic", "instances" or "panoptic".
        categories: number -> name of the classes; a background at 0 is dropped.
        stuff: the numbers of those that are not counted.
        orig_keys: the picture, whose metadata says from which file it was read.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        kind: Kind,
        categories: Mapping[str | int, str],
        stuff: Sequence[int] = (),
        orig_keys: str = "image",
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.kind = checked_kind(kind)
        self.categories = named(categories, stuff)
        self.table = LabelTable({number: category.name for number, category in self.categories.items()})
        self.orig_keys = orig_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        source = data[self.orig_keys].meta["filename_or_obj"]
        picture = Path(source if isinstance(source, str) else source[0])
        for key in self.key_iterator(dict(data)):
            prediction: Any = data[key]
            prediction = prediction[0] if isinstance(prediction, list) else prediction
            result = as_result(prediction, self.kind, self.categories)
            stem = self.output_dir / f"{picture.stem}_seg"
            if not isinstance(result, SemanticMap):
                write_result_json(f"{stem}.json", result, picture.name)
            write_named_result(f"{stem}.png", result, self.table, picture.name)
        return dict(data)


def named(categories: Mapping[str | int, str], stuff: Sequence[int] = ()) -> dict[int, Category]:
    """Categories from a bundle's ``channel_def``, a background at 0 left out; those in ``stuff`` are not counted.

    Raises:
        ValueError: stuff that is no class.
    """
    found = {int(number): name for number, name in categories.items()}
    if found.get(0, "").lower() == "background":
        del found[0]
    if unknown := set(stuff) - set(found):
        raise ValueError(f"stuff is among the classes {sorted(found)}, got {sorted(unknown)}")
    return {number: Category(name, number not in stuff) for number, name in sorted(found.items())}


def checked_kind(kind: str) -> Kind:
    """One of ``KINDS``; ValueError for anything else."""
    for known in KINDS:
        if kind == known:
            return known
    raise ValueError(f"what a model makes of pictures is one of {', '.join(KINDS)}, got {kind!r}")


def _maps(prediction: Any, count: int, kind: Kind) -> np.ndarray:
    """(count, rows, columns), integers."""
    array = _array(prediction) if isinstance(prediction, torch.Tensor | np.ndarray) else None
    if array is None or array.ndim != 3 or len(array) != count:
        got = type(prediction).__name__ if array is None else f"the shape {array.shape}"
        raise ValueError(
            f"post-processing for {kind!r} leaves whole numbers ({count}, rows, columns), got {got}: see the "
            "inference config, and post_processed_outputs in metadata.json"
        )
    whole = array if array.dtype.kind in "iub" else np.rint(array)
    if array.dtype.kind not in "iub" and not np.array_equal(whole, array):
        raise ValueError(f"post-processing for {kind!r} leaves whole numbers, got fractions: end it with an argmax")
    return whole.astype(np.int32, copy=False)


def _detected(detection: Mapping[str, Any], categories: Categories) -> Instances:
    parts = ("boxes", "labels", "scores", "masks")
    missing = [name for name in parts if name not in detection]
    if missing:
        raise ValueError(f"a detection has boxes, labels, scores and masks; this one lacks {', '.join(missing)}")
    boxes, labels, scores, masks = (_array(detection[name]) for name in parts)
    if masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(f"masks of a detection are (N, 1, rows, columns), got the shape {masks.shape}")
    inside = masks[:, 0] if masks.dtype == bool else masks[:, 0] > 0.5
    seen = inside.any(axis=(1, 2))
    return Instances.from_masks(
        inside[seen],
        inside.shape[1:],
        classes=labels[seen],
        scores=scores[seen],
        boxes=boxes[seen],
        categories=categories,
    )


def _unified(found: Mapping[str, Any], categories: Categories) -> Panoptic:
    parts = ("category", "instance", "scores")
    if missing := [name for name in parts if name not in found]:
        raise ValueError(f"a panoptic detection has {', '.join(parts)}; this one lacks {', '.join(missing)}")
    classes, objects, scores = (_array(found[name]) for name in parts)
    maps = _maps(np.stack([classes, objects]), 2, "panoptic")
    return _panoptic(maps[0], maps[1], categories, scores.tolist())


def _panoptic(
    classes: np.ndarray, objects: np.ndarray, categories: Categories, scores: Sequence[float] = ()
) -> Panoptic:
    """Segments numbered from 1 in the order of class and object; ``scores`` are of the objects 1, 2, ..."""
    ids = np.full(classes.shape, VOID, np.int32)
    segments: dict[int, Segment] = {}
    inside = np.isin(classes, list(categories))
    count = int(objects.max(initial=0)) + 1
    pairs, found = np.unique(classes[inside].astype(np.int64) * count + objects[inside], return_inverse=True)
    ids[inside] = found + 1
    for number, pair in enumerate(pairs.tolist(), start=1):
        category, thing = divmod(pair, count)
        segments[number] = Segment(category, scores[thing - 1] if thing and scores else 1.0)
    return Panoptic(ids, segments, categories)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
