"""Separable resampling: one matrix of weights for each axis, applied axis by axis.

Both grids of an axis span the same extent, edge to edge; beyond its ends a signal goes on at its last value.
"""

from __future__ import annotations

import numpy as np


def nearest(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(..., D, H, W) -> (..., *shape), dtype kept: each new voxel takes the value of the voxel that holds its centre.

    A centre on the boundary of two voxels belongs to the later one. The array itself is returned if no size changes.
    """
    sizes = list(zip(array.shape[-3:], shape, strict=True))
    if all(old == new for old, new in sizes):
        return array
    # Fastest is one pass over all axes that shrink, then one for each that grows, the last axis first.
    kept: tuple = (..., *np.ix_(*(nearest_voxels(old, min(old, new)) for old, new in sizes)))
    array = array[kept]
    for axis, (old, new) in zip((-1, -2, -3), reversed(sizes), strict=True):
        if new > old:
            array = array.take(nearest_voxels(old, new), axis=axis)
    return array


def interpolate(array: np.ndarray, shape: tuple[int, int, int], order: int = 1) -> np.ndarray:
    """(..., D, H, W), any real dtype, finite -> (..., *shape) float32, with the weights of `axis_weights`.

    An axis whose size does not change is left exactly as it is; a float32 array is returned itself if none does.
    """
    if array.shape[-3:] == shape:
        return array.astype(np.float32, copy=False)
    if array.ndim == 3:
        return _interpolate_volume(array, shape, order)
    result = np.empty((*array.shape[:-3], *shape), np.float32)
    for lead in np.ndindex(array.shape[:-3]):
        result[lead] = _interpolate_volume(array[lead], shape, order)
    return result


def axis_weights(n_in: int, n_out: int, order: int = 1) -> np.ndarray:
    """The (n_out, n_in) float64 matrix that resamples an axis of n_in voxels to n_out; its rows sum to 1.

    Order 1 is linear; where the new voxels are larger, its triangle is as wide as they are, so that nothing aliases.
    Order 3 is interpolation by the cubic B-spline (Unser et al., IEEE Trans. Signal Process. 41:821, 1993) without such
    a filter: scipy.ndimage's spline with mode "nearest".
    """
    assert order in (1, 3), order
    return weights_at((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, n_in, n_in / n_out, order)


def weights_at(centres: np.ndarray, n_in: int, ratio: float, order: int = 1) -> np.ndarray:
    """The weights of `axis_weights` at any `centres` (n_out,), for new voxels `ratio` times as large as the old."""
    width = max(1.0, ratio)
    reach = int(np.ceil(width)) if order == 1 else 16  # the cubic kernel has fallen below 1e-9 there
    centres = centres[:, None]
    voxels = np.floor(centres).astype(int) + np.arange(-reach, reach + 2)
    distance = voxels - centres
    values = np.maximum(0, 1 - np.abs(distance) / width) if order == 1 else _cardinal_spline(distance)
    values[np.abs(values) < 1e-12] = 0  # rounding error; it would widen the band
    weights = np.zeros((len(centres), n_in))
    np.add.at(weights, (np.arange(len(centres))[:, None], np.clip(voxels, 0, n_in - 1)), values)
    return weights / weights.sum(axis=1, keepdims=True)


def nearest_voxels(n_in: int, n_out: int) -> np.ndarray:
    """The old voxel that holds the centre of each new one."""
    return (2 * np.arange(n_out) + 1) * n_in // (2 * n_out)


def _interpolate_volume(volume: np.ndarray, shape: tuple[int, int, int], order: int, slabs: int = 2) -> np.ndarray:
    """One pass along the axis of the memory's slowest step, and one that takes both others a few slabs at a time."""
    layout = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))  # the memory's own order of axes
    result = volume.transpose(layout)
    sizes = [(volume.shape[axis], shape[axis]) for axis in layout]
    growth = [new / old for old, new in sizes]
    bands = {axis: _bands(axis_weights(*sizes[axis], order)) for axis in range(3) if growth[axis] != 1}
    within = sorted(bands.keys() - {0}, key=lambda axis: growth[axis])  # what shrinks most leaves least for the others
    passes = sorted([0, 1], key=lambda n: (growth[0], growth[1] * growth[2])[n])
    for n in passes:
        if n == 0 and 0 in bands:
            result = _apply(result, bands[0], 0, slabs)
        elif n == 1 and within:
            source, result = result, np.empty((len(result), sizes[1][1], sizes[2][1]), np.float32)
            for slab in range(0, len(source), slabs):  # what lies between two axes stays in the cache
                block = source[slab : slab + slabs]
                for axis in within:
                    block = _apply(block, bands[axis], axis, slabs)
                result[slab : slab + slabs] = block
    return result.transpose(np.argsort(layout))


def _bands(weights: np.ndarray, rows: int = 16) -> list[tuple[slice, slice, np.ndarray]]:
    """`rows` new voxels at a time: which they are, the span of old ones that they need, and the weights between."""
    bands = []
    for row in range(0, len(weights), rows):
        band = weights[row : row + rows]
        used = np.flatnonzero(band.any(axis=0))
        span = slice(used[0], used[-1] + 1)
        bands.append((slice(row, row + rows), span, band[:, span].astype(np.float32)))
    return bands


def _apply(volume: np.ndarray, bands: list[tuple[slice, slice, np.ndarray]], axis: int, slabs: int) -> np.ndarray:
    """Weights along one axis of a 3D array of any dtype: float32. The whole volume never exists in that type."""
    shape = list(volume.shape)
    shape[axis] = bands[-1][0].start + len(bands[-1][2])
    result = np.empty(shape, np.float32)
    last = axis == 2  # the weights multiply from the right, so that voxels stay where they lie in memory
    source, target = (array if last else np.moveaxis(array, axis, 1) for array in (volume, result))
    for slab in range(0, len(source), slabs):
        block = source[slab : slab + slabs].astype(np.float32, order="C", copy=False)
        part = target[slab : slab + slabs]
        for place, span, band in bands:
            if last:
                np.matmul(block[..., span], band.T, out=part[..., place])
            else:
                np.matmul(band, block[:, span], out=part[:, place])
    return result


def _cardinal_spline(t: np.ndarray) -> np.ndarray:
    """The cubic spline that is 1 at 0 and 0 at every other whole number: B-splines weighted by their inverse filter."""
    knots = np.floor(t)[..., None] + np.arange(-1, 3)
    u = np.abs(t[..., None] - knots)
    b_spline = np.where(u < 1, 2 / 3 - u**2 + u**3 / 2, np.maximum(0, 2 - u) ** 3 / 6)
    return np.sum(np.sqrt(3) * (np.sqrt(3) - 2) ** np.abs(knots) * b_spline, axis=-1)
