"""Instances: objects with a mask, a box, a class and a score each; they may overlap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg3d.tasks import polygons
from medseg3d.tasks.categories import Categories, Category, categories_of
from medseg3d.tasks.regions import Region, regions_of
from medseg3d.tasks.rle import RLE


@dataclass(frozen=True, eq=False, init=False)
class Instances:
    """N objects in an image, or in a scan, of ``shape``. A value: it never changes in place.

    Boxes are float64 (N, 4): x0, y0, x1, y1 in pixels, x along the last axis, the far edges x1 and y1 not inside (so a
    width is x1 - x0). In a scan they are (N, 6): x0, y0, z0, x1, y1, z1, again from the last axis to the first.

    Attributes:
        shape: of the image: two or three axes.
        regions: the masks, each within its tight box.
        classes: (N,) the number of each object's category.
        scores: (N,) confidence, 1 for a reference.
        boxes: those of a detector, or the tight boxes of the masks.
        areas: (N,) what a file says of the areas, or the pixels of the masks.
        crowd: (N,) bool: not one object but a crowd of them, as in COCO.
        categories: what the class numbers stand for; those without a name get one.

    Raises:
        ValueError: the numbers of masks, boxes, classes and scores differ, or a mask lies outside the image.
    """

    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    classes: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    categories: Categories = field(default_factory=dict)

    def __init__(
        self,
        shape: Sequence[int],
        regions: Iterable[Region],
        classes: Any = None,
        scores: Any = None,
        boxes: Any = None,
        areas: Any = None,
        crowd: Any = None,
        categories: Mapping[int, str | Category] | None = None,
    ) -> None:
        shape, regions = tuple(int(n) for n in shape), tuple(regions)
        if len(shape) not in (2, 3):
            raise ValueError(f"instances lie in an image of two or three axes, got the shape {shape}")
        for region in regions:
            if any(s.stop > n or s.start < 0 for s, n in zip(region.slices, shape, strict=True)):
                raise ValueError(f"a mask reaches from {region.corner} beyond the image of the shape {shape}")
        n = len(regions)
        if boxes is None:
            boxes = [region.box for region in regions]
        numbers = _column(classes, 1, n, np.int64, "classes")
        values = {
            "shape": shape,
            "regions": regions,
            "classes": numbers,
            "scores": _column(scores, 1.0, n, np.float64, "scores"),
            "boxes": _table(boxes, n, 2 * len(shape)),
            "areas": _column(areas, [region.area for region in regions], n, np.float64, "areas"),
            "crowd": _column(crowd, False, n, np.bool_, "crowd flags"),
            "categories": categories_of(categories, np.unique(numbers).tolist()),
        }
        if unknown := set(numbers.tolist()) - set(values["categories"]):
            raise ValueError(f"the classes {sorted(unknown)} have no category; there are {list(values['categories'])}")
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    @classmethod
    def from_masks(
        cls, masks: np.ndarray | Sequence[np.ndarray], shape: Sequence[int] | None = None, **rest: Any
    ) -> Instances:
        """From masks (N, *shape), not 0 inside; ``rest`` as in `Instances`. ``shape`` is needed for a list of none.

        Raises:
            ValueError: another number of axes, or probabilities in the place of masks.
        """
        for mask in masks:
            if np.asarray(mask).dtype.kind == "f" and not np.isin(mask, (0, 1)).all():
                raise ValueError(
                    "masks are True or other than 0 inside, got fractions such as probabilities: choose a threshold "
                    "first; of Mask R-CNN's output found['masks'][:, 0] > 0.5"
                )
        if shape is None:
            if np.ndim(masks) not in (3, 4):
                raise ValueError(f"masks are (N, H, W) or (N, D, H, W), got the shape {np.shape(masks)}")
            shape = np.shape(masks)[1:]
        return cls(shape, [Region.of(mask) for mask in masks], **rest)

    @classmethod
    def from_boxes(cls, boxes: Any, shape: Sequence[int], **rest: Any) -> Instances:
        """From boxes (N, 2 n) alone: the masks are the pixels whose centres they hold, cut at the image's edge.

        Raises:
            ValueError: boxes of another shape, not finite, or with the far corner before the near one.
        """
        table = _table(boxes, len(boxes), 2 * len(shape))
        if (wrong := (table[:, len(shape) :] < table[:, : len(shape)]).any(axis=1)).any():
            index = int(wrong.argmax())
            raise ValueError(
                f"boxes are a low corner and a high corner, box {index} is {table[index].tolist()}; boxes "
                "(x, y, width, height) become (x, y, x + width, y + height)"
            )
        regions = []
        for box in table:
            low, high = box[: len(shape)][::-1], box[len(shape) :][::-1]
            start = np.ceil(low - 0.5).clip(0, shape).astype(int)
            stop = np.maximum(np.ceil(high - 0.5).clip(0, shape).astype(int), start)
            regions.append(Region.of(np.ones(stop - start, bool), start.tolist()))
        areas = np.prod(np.maximum(table[:, len(shape) :] - table[:, : len(shape)], 0), axis=1)
        return cls(shape, regions, boxes=table, **{"areas": areas, **rest})

    @classmethod
    def from_label_map(cls, label_map: np.ndarray, **rest: Any) -> Instances:
        """From an array of integers that numbers the objects, 0 for none; in ascending order of their numbers."""
        return cls(np.shape(label_map), regions_of(label_map).values(), **rest)

    @classmethod
    def from_rles(cls, codes: Sequence[RLE], shape: Sequence[int] | None = None, **rest: Any) -> Instances:
        """From run-length codes, all of one shape; ``shape`` is needed for a list of none."""
        shapes = {code.shape for code in codes} | ({tuple(shape)} if shape is not None else set())
        if len(shapes) != 1:
            raise ValueError(f"run-length codes of one image have its shape, got {sorted(shapes) or 'no code'}")
        return cls(next(iter(shapes)), [Region.of(code.mask()) for code in codes], **rest)

    @classmethod
    def from_polygons(
        cls, outlines: Iterable[Iterable[np.ndarray | Sequence[float]]], shape: tuple[int, int], **rest: Any
    ) -> Instances:
        """From the polygons of each object, as `polygons.fill` takes them; ``shape`` is (rows, columns)."""
        return cls(shape, [Region.of(polygons.fill(pieces, shape)) for pieces in outlines], **rest)

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, chosen: Any) -> Instances:
        """The instances of a slice, an array of indices or a bool array."""
        index = np.atleast_1d(np.arange(len(self))[chosen])
        columns = {name: getattr(self, name)[index] for name in ("classes", "scores", "boxes", "areas", "crowd")}
        return Instances(self.shape, [self.regions[i] for i in index], **columns, categories=self.categories)

    def with_categories(self, categories: Mapping[int, str | Category]) -> Instances:
        """The same with other names."""
        columns = {name: getattr(self, name) for name in ("classes", "scores", "boxes", "areas", "crowd")}
        return Instances(self.shape, self.regions, **columns, categories=categories)

    def by_score(self) -> Instances:
        """The highest score first; equal ones keep their order. ValueError where a score is NaN."""
        if np.isnan(self.scores).any():
            raise ValueError(f"scores rank the instances, got NaN as score {int(np.isnan(self.scores).argmax())}")
        return self[np.argsort(-self.scores, kind="stable")]

    @property
    def masks(self) -> np.ndarray:
        """All masks at full size, bool (N, *shape)."""
        masks = np.zeros((len(self), *self.shape), bool)
        for mask, region in zip(masks, self.regions, strict=True):
            mask[region.slices] = region.inside
        return masks

    def rles(self) -> list[RLE]:
        """The masks as run-length codes."""
        return [RLE.of(region.mask(self.shape)) for region in self.regions]

    def polygons(self) -> list[list[np.ndarray]]:
        """The masks as polygons (N, 2) along their pixels' edges, one for each piece; see `polygons.trace`."""
        return [[polygon + region.corner[::-1] for polygon in polygons.trace(region.inside)] for region in self.regions]

    def label_map(self) -> np.ndarray:
        """int32 of ``shape``: object i is i + 1, no object 0. Where objects overlap the highest score is seen, and
        crowds lie below all others."""
        numbers = np.zeros(self.shape, np.int32)
        for i in self.front_to_back()[::-1]:
            numbers[self.regions[i].slices][self.regions[i].inside] = i + 1
        return numbers

    def front_to_back(self) -> list[int]:
        """The order in which overlapping objects hide each other: by score, crowds last."""
        return np.lexsort((-self.scores, self.crowd)).tolist()


def _column(values: Any, default: Any, n: int, dtype: type, what: str) -> np.ndarray:
    column: np.ndarray = np.array(default if values is None else values, dtype)
    if values is None and column.ndim == 0:
        column = np.full(n, column)
    if column.shape != (n,):
        raise ValueError(f"{n} masks have {n} {what}, got the shape {column.shape}")
    return column


def _table(boxes: Any, n: int, width: int) -> np.ndarray:
    table = np.array(boxes, np.float64)
    table = table.reshape(0, width) if table.size == 0 and n == 0 else table
    if table.shape != (n, width):
        raise ValueError(f"{n} boxes are an array ({n}, {width}), low corner and high corner, got {table.shape}")
    if (wrong := ~np.isfinite(table).all(axis=1)).any():
        index = int(wrong.argmax())
        raise ValueError(f"boxes are finite numbers, box {index} is {table[index].tolist()}")
    return table
