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
        _line(int(axis), n, source.shape[axis], matrix[axis, number], matrix[axis, 3] + off_centre(matrix, axis, number))
        for number, (axis, n) in enumerate(zip(axes, target.shape, strict=True))
    )
