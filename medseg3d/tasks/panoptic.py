"""A panoptic segmentation: one segment for every pixel, and one class for every segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medseg3d.tasks.categories import Categories, Category, categories_of
from medseg3d.tasks.semantic import integer_map

VOID = 0  # the id of pixels that belong to no segment


@dataclass(frozen=True)
class Segment:
    """One object of a thing class, or all of a stuff class: the number of its category, how sure it is, and whether it
    is a crowd of things that nobody told apart."""

    category: int
    score: float = 1.0
    crowd: bool = False


@dataclass(frozen=True, eq=False, init=False)
class Panoptic:
    """Segments that share out an image or a scan. A value: it never changes in place.

    ``ids`` is an array of integers, two or three axes: the id of each pixel's segment, 0 where there is none (void).
    ``segments`` maps each id to its `Segment`; a segment may have no pixel. ``categories`` says what their numbers are;
    a plain name is a thing.

    Raises:
        ValueError: an id without a segment, a segment without a category or with the id 0.
    """

    ids: np.ndarray
    segments: Mapping[int, Segment]
    categories: Categories = field(default_factory=dict)

    def __init__(
        self,
        ids: np.ndarray,
        segments: Mapping[int, Segment],
        categories: Mapping[int, str | Category] | None = None,
    ) -> None:
        array, segments = integer_map(ids, "a panoptic segmentation"), dict(segments)
        named = categories_of(categories, sorted({segment.category for segment in segments.values()}))
        if wrong := [number for number in segments if number <= VOID]:
            raise ValueError(f"the id of a segment is 1 or more (0 is void), got {wrong}")
        if unknown := set(np.unique(array).tolist()) - {VOID, *segments}:
            raise ValueError(f"the ids {sorted(unknown)[:10]} of the map have no segment; list a segment for each id")
        if unknown := {segment.category for segment in segments.values()} - set(named):
            raise ValueError(f"the categories {sorted(unknown)} of segments are unknown; there are {list(named)}")
        object.__setattr__(self, "ids", array)
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "categories", named)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ids.shape

    def is_thing(self, number: int) -> bool:
        """Whether the segment with this id is of a thing class."""
        return self.categories[self.segments[number].category].is_thing
