"""Run-length codes of masks as in COCO: runs of 0 and 1 by turns, columns first, the first run of 0 (perhaps empty).

The code covers any number of axes: the first axis runs fastest. The text form is COCO's "counts": each run, from the
fourth on less the run two before, in groups of five bits, lowest first, as characters from "0" on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_MORE = 0x20  # in a character: another follows
_SIGN = 0x10  # in the last character of a run: it is negative
_ZERO = 48  # the character "0"


@dataclass(frozen=True, eq=False)
class RLE:
    """A mask of ``shape`` as ``counts``, the lengths of its runs (int64), which add up to its number of pixels.

    Raises:
        ValueError: the runs do not add up to the shape, or one is below 0.
    """

    shape: tuple[int, ...]
    counts: np.ndarray

    def __post_init__(self) -> None:
        shape, counts = tuple(int(n) for n in self.shape), np.asarray(self.counts, np.int64)
        if counts.ndim != 1 or (counts < 0).any() or counts.sum() != math.prod(shape):
            raise ValueError(
                f"the runs of a run-length code are 0 or more and add up to the pixels of its mask, "
                f"{' x '.join(map(str, shape))} = {math.prod(shape)}; got a sum of {counts.sum()}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def of(cls, mask: np.ndarray) -> RLE:
        """The code of a mask; what is not 0 is inside."""
        flat = np.asarray(mask).astype(bool).ravel(order="F")
        changes = 1 + np.flatnonzero(flat[1:] != flat[:-1])
        first = [0] if flat[:1].any() else []
        return cls(np.shape(mask), np.diff(np.concatenate([[0], first, changes, [flat.size]]).astype(np.int64)))

    def mask(self) -> np.ndarray:
        """The mask, bool."""
        inside = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(inside, self.counts).reshape(self.shape, order="F")

    @cached_property
    def area(self) -> int:
        """How many pixels are inside."""
        return int(self.counts[1::2].sum())

    @property
    def bbox(self) -> tuple[int, ...]:
        """COCO's box of a 2D mask, (x, y, width, height); zeros if it is empty."""
        if len(self.shape) != 2:
            raise ValueError(f"COCO's box is one of two axes, this mask has the shape {self.shape}")
        rows = self.shape[0]
        starts, ends = self._bounds()
        starts, ends = starts[ends > starts], ends[ends > starts] - 1
        if not len(starts):
            return 0, 0, 0, 0
        x0, x1 = int(starts[0] // rows), int(ends[-1] // rows)
        # A run that goes on in the next column reaches both the bottom and the top.
        through = bool((starts // rows != ends // rows).any())
        y0 = 0 if through else int((starts % rows).min())
        y1 = rows - 1 if through else int((ends % rows).max())
        return x0, y0, x1 - x0 + 1, y1 - y0 + 1

    def text(self) -> str:
        """COCO's compressed "counts"."""
        characters = []
        for run in _differences(self.counts):
            more = True
            while more:
                bits, run = run & 0x1F, run >> 5
                more = run != (-1 if bits & _SIGN else 0)
                characters.append(chr(bits + _MORE * more + _ZERO))
        return "".join(characters)

    @classmethod
    def from_text(cls, text: str | bytes, shape: Sequence[int]) -> RLE:
        """From COCO's compressed "counts"; ValueError if they are damaged or of another shape."""
        runs: list[int] = []
        run = shift = 0
        for character in text.encode() if isinstance(text, str) else text:
            bits = character - _ZERO
            if not 0 <= bits < 2 * _MORE:
                raise ValueError(f"not a run-length code: it has the character {chr(character)!r}; read the file anew")
            run |= (bits & 0x1F) << shift
            shift += 5
            if not bits & _MORE:
                run -= (1 << shift) if bits & _SIGN else 0
                runs.append(run + (runs[-2] if len(runs) > 2 else 0))
                run = shift = 0
        if shift:
            raise ValueError("not a run-length code: it ends in the middle of a run; read the file anew")
        return cls(tuple(shape), np.array(runs, np.int64))

    def to_json(self) -> dict[str, Any]:
        """{"size": [height, width], "counts": "..."}."""
        return {"size": list(self.shape), "counts": self.text()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RLE:
        """From `to_json`, or with "counts" as a plain list of runs; ValueError for anything else."""
        try:
            size, counts = data["size"], data["counts"]
        except (KeyError, TypeError) as error:
            raise ValueError(f'a run-length code is {{"size": [height, width], "counts": ...}}, got {data}') from error
        return cls.from_text(counts, size) if isinstance(counts, str | bytes) else cls(tuple(size), np.array(counts))

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First pixel of each run inside, and the first after it."""
        ends = np.cumsum(self.counts)
        return ends[0 : len(ends) - 1 : 2], ends[1::2]


def union(codes: Iterable[RLE]) -> RLE:
    """What is inside at least one of the masks, which have one shape."""
    return _covered(list(codes), at_least=1)


def intersection(codes: Iterable[RLE]) -> RLE:
    """What is inside all the masks, which have one shape."""
    codes = list(codes)
    return _covered(codes, at_least=len(codes))


def iou(rows: Sequence[RLE], columns: Sequence[RLE], crowd: Sequence[bool] | None = None) -> np.ndarray:
    """Intersection over union of each mask in ``rows`` with each in ``columns``: (rows, columns), 0 where both are
    empty. In a column marked in ``crowd`` the union is the mask of the row alone, as in COCO."""
    result = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            common = intersection([row, column]).area
            whole = row.area if crowd is not None and crowd[j] else row.area + column.area - common
            result[i, j] = common / whole if common else 0.0
    return result


def _covered(codes: list[RLE], at_least: int) -> RLE:
    """Where at least so many of the masks are, from their runs alone."""
    shapes = {code.shape for code in codes}
    if len(shapes) != 1:
        raise ValueError(f"the masks to combine have one shape, got {sorted(shapes) or 'no mask'}")
    bounds = [code._bounds() for code in codes]
    places = np.concatenate([np.concatenate(pair) for pair in bounds])
    steps = np.concatenate([np.repeat([1, -1], len(starts)) for starts, _ in bounds])
    places, where = np.unique(places, return_inverse=True)
    inside = np.cumsum(np.bincount(where, weights=steps, minlength=len(places))) >= at_least
    toggles = places[np.flatnonzero(np.diff(inside, prepend=False))]
    size = math.prod(codes[0].shape)
    runs = np.diff(np.concatenate([[0], toggles, [size]]).astype(np.int64))
    return RLE(codes[0].shape, runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs)


def _differences(counts: np.ndarray) -> list[int]:
    changed = counts.copy()
    changed[3:] -= counts[1:-2]
    return changed.tolist()
