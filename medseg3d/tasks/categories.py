"""What the numbers of a segmentation stand for: things, which are counted, and stuff, which is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """One class: its name, and whether it is made of countable things (nuclei, cars) or is stuff (stroma, sky)."""

    name: str
    is_thing: bool = True


Categories = Mapping[int, Category]


def categories_of(named: Mapping[int, str | Category] | None, numbers: Iterable[int] = ()) -> dict[int, Category]:
    """``named`` with plain names made things, in ascending order; None gives each of ``numbers`` a name of its own.

    Raises:
        ValueError: a number below 0 or a name that is empty.
    """
    if named is None:
        named = {number: f"class {number}" for number in numbers}
    result = {}
    for number, category in sorted(named.items()):
        category = Category(category) if isinstance(category, str) else category
        if number < 0 or not category.name:
            raise ValueError(f"a category has a number of 0 or more and a name, got {number}: {category}")
        result[int(number)] = category
    return result
