"""Masks of single objects, each kept within its tight box: small in memory however large the image or scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import ndimage

_FEW = 1 << 16  # labels up to here are found by their number, larger ones are numbered anew


@dataclass(frozen=True, eq=False)
class Region:
    """A mask as ``inside`` (bool), what its tight box holds, and ``corner``, the index of that box's first pixel."""

    corner: tuple[int, ...]
    inside: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, mask: np.ndarray, corner: Sequence[int] | None = None) -> Region:
        """The region of a mask that begins at ``corner`` (the origin) of an image; not 0 is inside."""
        mask = np.asarray(mask) != 0
        corner = [0] * mask.ndim if corner is None else list(corner)
        box = []
        for axis in range(mask.ndim):
            others = tuple(other for other in range(mask.ndim) if other != axis)
            found = np.flatnonzero(mask.any(axis=others))
            box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
        return cls(tuple(c + s.start for c, s in zip(corner, box, strict=True)), np.ascontiguousarray(mask[tuple(box)]))

    @cached_property
    def area(self) -> int:
        """Pixels, or voxels, inside."""
        return int(np.count_nonzero(self.inside))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the tight box lies in the image."""
        return tuple(slice(c, c + n) for c, n in zip(self.corner, self.inside.shape, strict=True))

    @property
    def box(self) -> np.ndarray:
        """(2 n,): low, then high corner, the last axis first, so x0, y0, x1, y1; zeros if the mask is empty."""
        if not self.area:
            return np.zeros(2 * self.inside.ndim)
        low = np.array(self.corner[::-1], float)
        return np.concatenate([low, low + self.inside.shape[::-1]])

    def mask(self, shape: Sequence[int]) -> np.ndarray:
        """The mask (bool) in an image of ``shape``."""
        mask = np.zeros(tuple(shape), bool)
        mask[self.slices] = self.inside
        return mask

    def common(self, other: Region) -> int:
        """Pixels inside both."""
        here, there = [], []
        for a, b, n, m in zip(self.corner, other.corner, self.inside.shape, other.inside.shape, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if start >= stop:
                return 0
            here.append(slice(start - a, stop - a))
            there.append(slice(start - b, stop - b))
        return int(np.count_nonzero(self.inside[tuple(here)] & other.inside[tuple(there)]))


def regions_of(label_map: np.ndarray) -> dict[int, Region]:
    """The region of each label but 0 of an array of integers (not negative) of any dimension, in ascending order."""
    label_map = np.asarray(label_map)
    if label_map.dtype == bool:
        label_map = label_map.view(np.uint8)
    if not np.issubdtype(label_map.dtype, np.integer):
        raise ValueError(f"a label map holds integers, got {label_map.dtype}; convert it with .astype(np.int32)")
    if label_map.min(initial=0) < 0:
        raise ValueError(f"labels are 0 (no object) or more, got {label_map.min()}")
    numbers: np.ndarray | None = None
    if label_map.max(initial=0) >= _FEW:
        numbers = np.union1d(0, label_map)
        label_map = np.searchsorted(numbers, label_map)
    found = {}
    for label, box in enumerate(_boxes(label_map), start=1):
        if box is not None:
            number = label if numbers is None else int(numbers[label])
            found[number] = Region(tuple(s.start for s in box), label_map[box] == label)
    return found


def _boxes(label_map: np.ndarray) -> list[tuple[slice, ...] | None]:
    if not label_map.size:
        return []
    turned = label_map.flags.f_contiguous and not label_map.flags.c_contiguous  # SciPy is slow across memory
    found = ndimage.find_objects((label_map.T if turned else label_map).astype(np.int32, copy=False))
    return [box[::-1] if turned and box is not None else box for box in found]


def mask_boxes(masks: np.ndarray, inclusive: bool = True) -> np.ndarray:
    """Tight boxes (N, 4), x0, y0, x1, y1, of the masks (N, H, W): up to the last pixel as in torchvision's
    ``masks_to_boxes``, or, if not ``inclusive``, up to its far edge. An empty mask has zeros."""
    boxes = np.array([Region.of(mask).box for mask in masks], float).reshape(len(masks), 4)
    if inclusive:
        boxes[boxes[:, 2] > 0, 2:] -= 1
    return boxes
