"""How one voxel grid draws on another where the axes of both run along each other: a matrix of weights for each axis.

A grid changes axis by axis wherever it is only turned by right angles, flipped, cropped, padded and resampled, and a
weighted mean over its voxels is then a product of one small matrix per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg3d.geometry import Chain, Crop, Frame, Geometry, Pad, Reorient, Resample
from medseg3d.interpolation import axis_weights, nearest_voxels, weights_at


@dataclass(frozen=True, eq=False)
class AxisMap:
    """What the slices along one axis of the target draw on.

    Attributes:
        axis: the source axis along which it runs, in either direction.
        weights: (n_target, n_source), none negative. A row sums to 1; a row of a slice outside the source is 0.
    """

    axis: int
    weights: np.ndarray

    def rows(self, numbers: np.ndarray) -> AxisMap:
        """The slices with these numbers, -1 for one outside."""
        return AxisMap(self.axis, np.where(numbers[:, None] < 0, 0, self.weights[numbers]))


def along(frame: Frame, order: int = 1) -> tuple[AxisMap, ...]:
    """The weights with which the target grid of a frame draws on its source grid, for each axis of the target.

    Args:
        frame: of reorientations, crops, paddings and resamplings, one after another.
        order: 0 takes the voxel that holds the new voxel's centre, as ``frame.label_map`` does; 1 is linear, as
            ``frame.image`` is: where voxels become larger, the triangle is as wide as they are.

    Raises:
        ValueError: another order, or a frame that does not change the grid axis by axis.
    """
    _check(order)
    maps = tuple(AxisMap(axis, np.eye(n)) for axis, n in enumerate(frame.source.shape))
    return _after(maps, frame, order)


def edge_to_edge(source: Sequence[int], target: Sequence[int], order: int = 1) -> tuple[AxisMap, ...]:
    """The weights of a grid of shape ``target`` that covers what one of shape ``source`` covers; any number of axes."""
    _check(order)
    if len(source) != len(target) or min(*source, *target) < 1:
        raise ValueError(
            f"two grids that cover the same have as many axes, each of 1 voxel or more, got {source} and {target}"
        )
    return tuple(AxisMap(n, _resampling(*sizes, order)) for n, sizes in enumerate(zip(source, target, strict=True)))


def between(source: Geometry, target: Geometry, order: int = 1) -> tuple[AxisMap, ...]:
    """The weights with which one grid in space draws on another, for each axis of the target.

    Slices whose centre lies outside the source's edges are outside. See :func:`along` for ``order``.

    Raises:
        ValueError: another order, or an axis of one grid lies oblique to those of the other: over the target's length
            they part by more than a hundredth of a voxel.
    """
    _check(order)
    matrix = np.linalg.solve(source.affine, target.affine)[:3]
    axes = np.abs(matrix[:, :3]).argmax(axis=0)
    off = np.abs(matrix[:, :3]) * (np.array(target.shape) - 1)
    off[axes, range(3)] = 0
    if sorted(axes) != [0, 1, 2] or off.max() > 0.01:
        raise ValueError(
            "labels go from one grid to another only where the axes of both are parallel, got axes that part by "
            f"{off.max():.3g} voxels: {source} and {target}; resample the labels with nearest neighbours instead"
        )
    return tuple(
        AxisMap(axis, _straight(matrix[axis, n], matrix[axis, 3], target.shape[n], source.shape[axis], order))
        for n, axis in enumerate(axes.tolist())
    )


def through(maps: Sequence[AxisMap], inner: Sequence[AxisMap]) -> tuple[AxisMap, ...]:
    """``maps`` from a grid that itself draws on another one by ``inner``: straight from that one."""
    return tuple(AxisMap(inner[one.axis].axis, one.weights @ inner[one.axis].weights) for one in maps)


def _after(maps: tuple[AxisMap, ...], frame: Frame, order: int) -> tuple[AxisMap, ...]:
    """The maps to a grid, and then along a frame that starts on it."""
    if isinstance(frame, Chain):
        for part in frame.frames:
            maps = _after(maps, part, order)
        return maps
    old, new = frame.source.shape, frame.target.shape
    if isinstance(frame, Reorient):
        directions = [slice(None, None, -1 if flip else 1) for flip in frame.flips]
        return tuple(maps[n].rows(np.arange(old[n])[turn]) for n, turn in zip(frame.axes, directions, strict=True))
    if isinstance(frame, Crop | Pad):
        first = frame.start if isinstance(frame, Crop) else [-before for before in frame.before]
        places = [np.arange(start, start + size) for start, size in zip(first, new, strict=True)]
        return tuple(
            one.rows(np.where((place >= 0) & (place < size), place, -1))
            for one, place, size in zip(maps, places, old, strict=True)
        )
    if isinstance(frame, Resample):
        return tuple(
            AxisMap(one.axis, _resampling(n_in, n_out, order) @ one.weights)
            for one, n_in, n_out in zip(maps, old, new, strict=True)
        )
    raise ValueError(f"labels cannot be carried along a {type(frame).__name__}, which does not act axis by axis")


def _resampling(n_in: int, n_out: int, order: int) -> np.ndarray:
    return axis_weights(n_in, n_out) if order == 1 else np.eye(n_in)[nearest_voxels(n_in, n_out)]


def _straight(step: float, first: float, n_out: int, n_in: int, order: int) -> np.ndarray:
    """Weights of slices whose centres lie ``step`` apart from ``first`` on, in old voxels; outside the edges 0."""
    centres = (first + step * np.arange(n_out)).round(6)  # headers hold rounded numbers: no weights of 1e-7
    if order == 1:
        weights = weights_at(np.clip(centres, -0.5, n_in - 0.5), n_in, round(abs(step), 6))
    else:
        weights = np.eye(n_in)[np.clip(np.floor(centres + 0.5).astype(int), 0, n_in - 1)]
    inside = (centres >= -0.5) & (centres <= n_in - 0.5)
    return weights * inside[:, None]


def _check(order: int) -> None:
    if order not in (0, 1):
        raise ValueError(f"the order of interpolation is 0 (nearest) or 1 (linear), got {order}")
