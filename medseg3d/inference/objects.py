"""Objects from a semantic map: the instances of a network that only tells foreground from background.

U-Net does so with cells, whose borders it learns to leave free (Ronneberger et al., 2015, section 4): what remains
connected is one cell. Where objects still touch, their shape parts them: a watershed of the distance to the background.

Any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import cc3d
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage


def components(foreground: np.ndarray, least: int = 1) -> np.ndarray:
    """Connected parts numbered from 1, int32; parts of fewer than ``least`` voxels are background.

    Voxels are connected by their faces: the free line between two objects may run diagonally.

    Args:
        foreground: bool, two or three axes.
        least: voxels of the smallest object that is kept.
    """
    found = cc3d.connected_components(foreground, connectivity=4 if foreground.ndim == 2 else 6)
    return _numbered(found, least)


def watershed(
    foreground: np.ndarray,
    spread: float = 2.0,
    least: int = 1,
    spacing: Sequence[float] | None = None,
    neck: float = 1.0,
) -> np.ndarray:
    """Parts of the foreground, each uphill from which is one place deepest inside; numbered from 1, int32.

    ``spread`` is a length: what keeps small objects apart leaves large ones in pieces. ``neck`` is a proportion, and
    parts large and small alike (the relative persistence of a maximum).

    Args:
        foreground: bool, two or three axes.
        spread: distances are smoothed by a Gaussian of so many voxels first: more of it parts less.
        least: voxels of the smallest object that is kept.
        spacing: size of a voxel along each axis; 1 where it is not given.
        neck: parts are one where the way between them is at least so wide, as a share of the width of the narrower
            one; with 1 only where it is no narrower at all.
    """
    if not foreground.any():
        return np.zeros(foreground.shape, np.int32)
    depth = ndimage.distance_transform_edt(foreground, sampling=spacing)
    smooth = np.where(foreground, ndimage.gaussian_filter(depth, spread), -1.0)
    summit = _summits(smooth)
    peaks = foreground & (summit == np.arange(summit.size).reshape(summit.shape))
    # Peaks that are near each other are one: a plateau has many.
    around = ndimage.distance_transform_edt(~peaks) <= max(1.0, spread)
    groups, _ = ndimage.label(around & foreground, np.ones((3,) * foreground.ndim))
    parts = np.where(foreground, groups.ravel()[summit], 0)
    return _numbered(_joined(parts, smooth, neck), least)


def _joined(parts: np.ndarray, depth: np.ndarray, neck: float) -> np.ndarray:
    """Parts between which the deepest pass is at least ``neck`` of the shallower one's greatest depth become one."""
    number = int(parts.max()) + 1
    pairs, passes = [], []
    for axis in range(parts.ndim):
        here, there = (np.moveaxis(parts, axis, 0)[side] for side in (slice(None, -1), slice(1, None)))
        meet = (here != there) & (here > 0) & (there > 0)
        low, high = np.minimum(here, there)[meet], np.maximum(here, there)[meet]
        pairs.append(low.astype(np.int64) * number + high)
        depths = np.moveaxis(depth, axis, 0)
        passes.append(np.minimum(depths[:-1], depths[1:])[meet])
    met, which = np.unique(np.concatenate(pairs), return_inverse=True)
    deepest = np.zeros(len(met))
    np.maximum.at(deepest, which, np.concatenate(passes))
    peak = np.zeros(number)
    np.maximum.at(peak, parts.ravel(), depth.ravel())
    into = np.arange(number)
    # From the deepest pass down: a part that was joined is deeper, so what stayed apart before would stay so.
    for pair in np.argsort(-deepest, kind="stable"):
        first, second = (into[part] for part in divmod(met[pair], number))
        if first != second and deepest[pair] >= neck * min(peak[first], peak[second]):
            kept, joined = (first, second) if peak[first] >= peak[second] else (second, first)
            into[into == joined] = kept
    return into[parts]


def _summits(height: np.ndarray) -> np.ndarray:
    """The peak reached from each voxel by always going to the highest neighbour, as an index of the flattened array."""
    index = np.arange(height.size).reshape(height.shape)
    highest, goal = height.copy(), index.copy()
    for step in product((-1, 0, 1), repeat=height.ndim):
        here = tuple(slice(max(0, -d), height.shape[axis] - max(0, d)) for axis, d in enumerate(step))
        there = tuple(slice(max(0, d), height.shape[axis] + min(0, d)) for axis, d in enumerate(step))
        better = (height[there] > highest[here]) | ((height[there] == highest[here]) & (index[there] > goal[here]))
        highest[here] = np.where(better, height[there], highest[here])
        goal[here] = np.where(better, index[there], goal[here])
    summit = goal.ravel()
    while ((further := summit[summit]) != summit).any():
        summit = further
    return summit.reshape(height.shape)


def filled(foreground: np.ndarray, largest: int) -> np.ndarray:
    """The foreground with its holes of at most ``largest`` voxels, bool: what background does not reach from the edge.

    A network that looks for borders leaves free what is pale within an object too.

    Args:
        foreground: bool, two or three axes.
        largest: voxels of the largest hole that is filled; what lies between objects in a ring is larger.
    """
    around = components(np.pad(~foreground, 1, constant_values=True))  # one part with all that touches the edge
    counts = np.bincount(around.ravel())
    small = counts <= largest
    small[[0, around.flat[0]]] = False
    inside = tuple(slice(1, -1) for _ in range(foreground.ndim))
    return foreground | small[around][inside]


def grown(objects: np.ndarray, distance: float, within: np.ndarray | None = None) -> np.ndarray:
    """Objects with what lies at most ``distance`` voxels from them, each voxel to the nearest; int32.

    Undoes the free line that separates objects in the target of training.

    Args:
        objects: numbered objects, 0 for the background.
        distance: in voxels; 1.5 reaches diagonal neighbours.
        within: bool, where objects may grow; everywhere if it is not given.
    """
    far, nearest = ndimage.distance_transform_edt(objects == 0, return_indices=True)
    near = far <= distance if within is None else (far <= distance) & within
    return np.where(near | (objects > 0), objects[tuple(nearest)], 0).astype(np.int32)


def _numbered(objects: np.ndarray, least: int) -> np.ndarray:
    """Numbered from 1 without gaps, those of fewer than ``least`` voxels left out."""
    counts = np.bincount(objects.ravel())
    kept = counts >= max(least, 1)
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[objects]


class ObjectsFromLogitsd(MapTransform):
    """Numbered objects (1, ...) from logits (K, ...), class 0 being the background.

    Args:
        keys: logits.
        threshold: probability of the foreground, all other classes together, above which a voxel is an object's.
        method: "components" or "watershed".
        spread, neck: of the watershed.
        grow: voxels by which objects grow into what is free around them, to undo the line that training left free.
        least: voxels of the smallest object that is kept.
        holes: voxels of the largest hole in the foreground that is filled first.

    Raises:
        ValueError: a method of another name, or a threshold outside 0 to 1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        threshold: float = 0.5,
        method: str = "components",
        spread: float = 2.0,
        grow: float = 0.0,
        least: int = 1,
        holes: int = 0,
        neck: float = 1.0,
    ) -> None:
        super().__init__(keys)
        if method not in ("components", "watershed"):
            raise ValueError(f"method must be 'components' or 'watershed', got {method!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is a probability between 0 and 1, got {threshold}")
        self.threshold, self.method, self.spread, self.neck = threshold, method, spread, neck
        self.grow, self.least, self.holes = grow, least, holes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            logits = torch.as_tensor(result[key]).float()
            foreground = (1 - logits.softmax(0)[0] > self.threshold).cpu().numpy()
            if self.holes:
                foreground = filled(foreground, self.holes)
            if self.method == "components":
                objects = components(foreground, self.least)
            else:
                objects = watershed(foreground, self.spread, self.least, neck=self.neck)
            if self.grow:
                objects = grown(objects, self.grow)
            found = torch.from_numpy(objects)[None]
            source = result[key]
            result[key] = MetaTensor(found).copy_meta_from(source) if isinstance(source, MetaTensor) else found
        return result
