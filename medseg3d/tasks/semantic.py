"""A semantic map: one class for every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medseg3d.tasks.categories import Categories, Category, categories_of


@dataclass(frozen=True, eq=False, init=False)
class SemanticMap:
    """The class of every pixel of an image or voxel of a scan. A value: it never changes in place.

    ``classes`` is an array of integers, two or three axes. ``categories`` says what the numbers are; a plain name is a
    thing. A pixel whose number is not among them is background, or void: it belongs to no class (0 without a name of
    its own, 255 where nobody knows). Without ``categories`` every number but 0 is a thing.

    Raises:
        ValueError: the array is not of integers, or categories are not as `categories_of` takes them.
    """

    classes: np.ndarray
    categories: Categories = field(default_factory=dict)

    def __init__(self, classes: np.ndarray, categories: Mapping[int, str | Category] | None = None) -> None:
        array = integer_map(classes, "a semantic map")
        if categories is None:
            numbers = np.unique(array)
            named = categories_of(None, numbers[numbers > 0].tolist())
        else:
            named = categories_of(categories)
        object.__setattr__(self, "classes", array)
        object.__setattr__(self, "categories", named)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.classes.shape


def integer_map(array: np.ndarray, what: str) -> np.ndarray:
    """A read-only view of an array of integers, two or three axes; a bool mask becomes 0 and 1."""
    array = np.asarray(array)
    array = array.view(np.uint8) if array.dtype == bool else array
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (2, 3):
        raise ValueError(
            f"{what} is an array of integers with two or three axes, got {array.dtype} of the shape {array.shape}"
        )
    view = array.view()
    view.flags.writeable = False
    return view
