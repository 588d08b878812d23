"""From the places of a series' slices to one grid: even, tilted, with gaps, or none at all. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_EVEN = 0.1  # mm by which a slice may miss its place on an even grid
_EVEN_SHARE = 0.2  # of the spacing by which it may, where that is less
_TILT = 0.1  # degrees between slice normal and stacking direction that are worth a note
_BRIDGED = 10.0  # mm; the widest gap between two slices that interpolation may fill
_SAME = 0.01  # mm; slices nearer than this are at one position


@dataclass(frozen=True)
class Stack:
    """How slices become a grid: slice m of the grid lies at `first` + m * `step` (mm, in the positions' own frame).

    `index` (count,) is the slice shown there, as an index into the sorted slices, between two where it is not whole.
    """

    first: np.ndarray
    step: np.ndarray
    index: np.ndarray
    notes: tuple[str, ...] = ()


def stack_slices(positions: np.ndarray, normal: np.ndarray) -> Stack:
    """The grid through slices with their first voxels at `positions` (n, 3), n >= 2, in order along `normal` (3,).

    The step may be oblique to the normal (a tilted gantry): the grid is sheared then, which is exact. Uneven or missing
    slices are put on an even grid, with a note, if no gap is above 10 mm.

    Raises:
        ValueError: the slices do not lie on one line, or a gap is above 10 mm.
    """
    along = (positions - positions[0]) @ normal
    gaps = np.diff(along)
    assert gaps.min() > _SAME, "duplicates are the caller's"
    line = (positions[-1] - positions[0]) / along[-1]  # mm of way for each mm along the normal
    sideways = np.linalg.norm(positions - positions[0] - along[:, None] * line, axis=1).max()
    if sideways > _EVEN:
        raise ValueError(f"slices are shifted sideways by up to {sideways:.1f} mm: they make no grid")
    notes = []
    tilt = float(np.degrees(np.arccos(min(1.0, 1 / float(np.linalg.norm(line))))))
    if tilt > _TILT:
        notes.append(
            f"gantry tilt of {tilt:.1f} degrees: kept as a sheared grid,"
            " which ITK-based viewers read from .nrrd or .mha but not from NIfTI"
        )

    typical = float(np.median(gaps))
    tolerance = min(_EVEN, _EVEN_SHARE * typical)
    count = round(along[-1] / typical) + 1
    steps = np.maximum(1, np.rint(gaps / typical))
    if np.abs(gaps - steps * along[-1] / steps.sum()).max() <= 2 * tolerance:  # even but for missing slices
        count = int(steps.sum()) + 1
    target = np.linspace(0, along[-1], count)
    index = np.interp(target, along, np.arange(len(along)))
    nearest = np.rint(index).astype(int)
    index = np.where(np.abs(along[nearest] - target) <= tolerance, nearest, index)
    if count != len(along) or (index != nearest).any():
        if gaps.max() > _BRIDGED + tolerance:
            raise ValueError(
                f"slices are {typical:.2f} mm apart but there is a gap of {gaps.max():.1f} mm:"
                f" gaps of up to {_BRIDGED:.0f} mm are filled, this is wider; export the missing slices"
            )
        made = int((index != nearest).sum())
        notes.append(
            f"{made} missing slice{'s' * (made > 1)} filled by linear interpolation (gap of {gaps.max():.1f} mm)"
            if made == count - len(along)
            else f"slices {gaps.min():.1f} to {gaps.max():.1f} mm apart put on an even grid of {count} slices,"
            f" {target[1]:.2f} mm apart, by linear interpolation"
        )
    return Stack(positions[0], line * target[1], index, tuple(notes))


def same_positions(along: np.ndarray) -> list[list[int]]:
    """Indices of the slices at each position, both in ascending order; `along` (n,) in mm along the normal."""
    order = np.argsort(along, kind="stable")
    breaks = np.flatnonzero(np.diff(along[order]) > _SAME) + 1
    return [group.tolist() for group in np.split(order, breaks)]


def fill(images: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Slices (n, rows, columns) at fractional `index` (m,), linear between two, in their own dtype."""
    if np.array_equal(index, np.arange(len(images))):
        return images
    below = np.minimum(np.floor(index).astype(int), len(images) - 1)
    weight = (index - below).astype(np.float32)
    out = images[below]
    for m in np.flatnonzero(weight):
        mixed = (1 - weight[m]) * images[below[m]] + weight[m] * images[below[m] + 1]
        out[m] = np.rint(mixed) if images.dtype.kind in "iu" else mixed
    return out
