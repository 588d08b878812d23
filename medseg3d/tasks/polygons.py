"""Polygons and masks: filled exactly as COCO's tools fill them, and traced so that filling gives the mask back.

A polygon is an (N, 2) array of corners (x, y) in pixels: pixel (row i, column j) covers y from i to i + 1 and x from j
to j + 1. Filling is even-odd within one polygon; several polygons add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

_FINER = 5  # COCO's tools walk along the edges in fifths of a pixel


def fill(polygons: Iterable[np.ndarray | Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """The mask (bool, of ``shape`` = rows, columns) inside at least one polygon; what lies beyond the image is cut.

    A polygon may also be COCO's flat list x0, y0, x1, y1, ...

    Raises:
        ValueError: a polygon with fewer than three corners, an odd flat list, or a value that is not finite.
    """
    mask = np.zeros(shape, bool)
    for polygon in polygons:
        mask |= _fill_one(as_polygon(polygon), shape)
    return mask


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """The polygons of a 2D mask along its pixels' edges: one (N, 2) for each piece (joined by edges), clockwise on the
    screen. A hole is part of its piece's polygon, reached by a line that runs there and back. `fill` gives the mask.
    """
    mask = np.asarray(mask).astype(bool)
    if mask.ndim != 2:
        raise ValueError(f"polygons are traced around a mask of two axes, got the shape {mask.shape}")
    pieces = ndimage.label(mask)[0]
    rings: dict[int, list[np.ndarray]] = {}
    for piece, loop in _loops(mask, pieces):
        # The outer loop has the piece on its right like the others, but encloses a positive area.
        rings.setdefault(piece, []).insert(0 if _signed_area(loop) > 0 else len(rings.get(piece, [])), loop)
    return [_bridged(*rings[piece]) for piece in sorted(rings)]


def as_polygon(corners: np.ndarray | Sequence[float]) -> np.ndarray:
    """Corners (N, 2), float64, from such an array or from a flat list; errors as `fill`."""
    array = np.asarray(corners, dtype=float)
    if array.ndim == 1 and array.size % 2 == 0:
        array = array.reshape(-1, 2)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) < 3 or not np.isfinite(array).all():
        raise ValueError(
            f"a polygon is three or more corners x, y in pixels, got {np.size(corners)} numbers "
            f"of the shape {np.shape(corners)}; leave out what has no area"
        )
    return array


def _fill_one(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = shape
    u, v = _walk(np.trunc(_FINER * polygon + 0.5))
    # A step from one fine column to the next crosses the middle of a pixel's column in one of five.
    at = np.flatnonzero(u[1:] != u[:-1])
    column = (np.where(u[at + 1] < u[at], u[at + 1], u[at + 1] - 1) + 0.5) / _FINER - 0.5
    row = (np.minimum(v[at], v[at + 1]) + 0.5) / _FINER - 0.5
    kept = (column == np.floor(column)) & (column >= 0) & (column <= columns - 1)
    row = np.ceil(row[kept].clip(0, rows))
    toggles = np.bincount((column[kept] * rows + row).astype(np.int64), minlength=rows * columns)
    return (np.cumsum(toggles)[: rows * columns] % 2 == 1).reshape(shape, order="F")


def _walk(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points along the edges of a closed polygon: one per unit of the longer side of each edge, ends included."""
    start, end = corners, np.roll(corners, -1, axis=0)
    sides = np.abs(end - start)
    steps = sides.max(axis=1)
    steep = sides[:, 0] < sides[:, 1]
    # Each edge is walked from its lower end, so that it is the same line in both directions.
    major = np.where(steep, 1, 0)
    each = np.arange(len(corners))
    flip = start[each, major] > end[each, major]
    low = np.where(flip[:, None], end, start)
    slope = np.where(flip[:, None], start - end, end - start) / np.maximum(steps, 1)[:, None]

    counts = steps.astype(np.int64) + 1
    edge = np.repeat(each, counts)
    t = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    t = np.where(flip[edge], steps[edge] - t, t)
    points = low[edge] + slope[edge] * t[:, None]
    minor = np.stack([steep[edge], ~steep[edge]], axis=1)
    points = np.where(minor, np.trunc(points + 0.5), np.rint(points))
    return points[:, 0], points[:, 1]


# Directions along pixel edges are right, down, left, up: 0 to 3; one more is a turn to the right.
_STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
_STARTS = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])  # of a pixel's top, right, bottom and left edge


def _loops(mask: np.ndarray, pieces: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each closed line between inside and outside: the number of the piece on its right, and its corners (N, 2)."""
    p = np.pad(mask, 1)
    neighbours = (p[:-2, 1:-1], p[1:-1, 2:], p[2:, 1:-1], p[1:-1, :-2])  # above, on the right, below, on the left
    pixels = [np.argwhere(mask & ~neighbour) for neighbour in neighbours]
    direction = np.repeat(np.arange(4), [len(p) for p in pixels])
    pixel = np.concatenate(pixels)
    start = pixel[:, ::-1] + _STARTS[direction]

    width = mask.shape[1] + 1
    leaving = np.full((width * (mask.shape[0] + 1), 4), -1)
    leaving[start @ [1, width], direction] = np.arange(len(start))
    end = (start + _STEPS[direction]) @ [1, width]
    # Where two pieces touch at a corner, the turn to the right stays with its own.
    turns = [leaving[end, (direction + turn) % 4] for turn in (1, 0, 3)]
    following = np.select([turns[0] >= 0, turns[1] >= 0], turns[:2], turns[2]).tolist()
    corner = np.ones(len(start), bool)
    corner[following] = direction[following] != direction
    piece = pieces[tuple(pixel.T)]

    seen = np.zeros(len(start), bool)
    for first in range(len(start)):
        if seen[first]:
            continue
        loop, edge = [first], following[first]
        while edge != first:
            loop.append(edge)
            edge = following[edge]
        seen[loop] = True
        edges = np.array(loop)
        yield int(piece[first]), start[edges[corner[edges]]].astype(float)


def _signed_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def _bridged(ring: np.ndarray, *holes: np.ndarray) -> np.ndarray:
    """One polygon from an outer ring and the holes in it, each joined where its corners are the closest."""
    for hole in holes:
        distances, nearest = KDTree(ring).query(hole)
        there = int(np.argmin(distances))
        here = int(nearest[there])
        around = np.roll(hole, -there, axis=0)
        ring = np.concatenate([ring[: here + 1], around, around[:1], ring[here:]])
    return ring
