"""Who takes part: a bundle, in its own strategy or in another one; and what is the same for all.

Without PyTorch, as is all that the first process does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from medseg3d.catalogue import BundleInfo, find_bundle
from medseg3d.io.labels import plain_name
from medseg3d.report.run import bundle_sha256
from medseg3d.volume import Volume


@dataclass(frozen=True)
class Contender:
    """A model in one strategy.

    Attributes:
        model: name of a model that ships, or the folder or zip of a bundle.
        strategy: "sub-volumes", "slices" or "downsampled"; None for the bundle's own.
        name: what tables and figures call it; by default the bundle's name, and the strategy if one is given.
    """

    model: str | Path
    strategy: str | None = None
    name: str = ""

    @cached_property
    def bundle(self) -> BundleInfo:
        """ValueError if there is no such bundle, or one of pictures."""
        found = find_bundle(self.model)
        if found.pictures is not None:
            raise ValueError(f"{found.name} segments pictures, and scans are compared: leave it out")
        return found

    @cached_property
    def sha256(self) -> str:
        """Of all files that decide the bundle's results, its weights among them."""
        return bundle_sha256(self.bundle.path)

    @property
    def title(self) -> str:
        own = self.bundle.name
        return self.name or (own if self.strategy is None else f"{own} {self.strategy}")

    @property
    def slug(self) -> str:
        """The title as the name of a folder."""
        return re.sub(r"[^\w.-]+", "_", self.title)


@dataclass(frozen=True)
class Conditions:
    """What is the same for all: labels of the references, and how models run and are measured."""

    labels: Mapping[int, str]
    device: str = "auto"
    precision: str = "auto"
    nsd_tolerance_mm: float = 2.0
    trust: bool = False


def contenders_of(
    models: Iterable[str | Path | Contender], strategies: Sequence[str | None] = ()
) -> tuple[Contender, ...]:
    """Each model in each of the strategies; in its own where none is given.

    Raises:
        ValueError: there is none, a bundle is not there or of pictures, or two would have one name.
    """
    found = [
        model if isinstance(model, Contender) else Contender(model, strategy)
        for model in models
        for strategy in ([None] if isinstance(model, Contender) else strategies or [None])
    ]
    if not found:
        raise ValueError("a comparison is of one model or more, got none")
    twice = [title for title, count in Counter(contender.slug for contender in found).items() if count > 1]
    if twice:
        raise ValueError(
            f"two models are called {twice[0]}: give each a name of its own, Contender(model, name=...), or rename the "
            "bundle's folder"
        )
    return tuple(found)


def numbers_of(own: Mapping[int, str], reference: Mapping[int, str]) -> dict[int, int]:
    """A model's label number -> the reference's, for the names that both have."""
    numbers = {plain_name(name): number for number, name in reference.items() if number != 0}
    return {number: numbers[plain_name(name)] for number, name in own.items() if number and plain_name(name) in numbers}


def renumbered(segmentation: Volume, numbers: Mapping[int, int]) -> Volume:
    """A label map with other numbers; labels without one become background."""
    table = np.zeros(max(int(segmentation.array.max(initial=0)), *numbers, 0) + 1, np.uint16)
    for own, other in numbers.items():
        table[own] = other
    return segmentation.with_array(table[segmentation.array])
