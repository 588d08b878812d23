"""Voxel grids in space, and the record of every change of grid.

An array (D, H, W) is indexed [i, j, k], and the affine maps (i, j, k) to world millimetres, RAS+. Voxel centres have
whole-number indices, so a grid of n voxels reaches from -0.5 to n - 0.5. A `Frame` remembers how one grid became
another: it carries images, label maps, points and boxes along, and it has an inverse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from medseg3d.interpolation import interpolate, nearest

_LETTERS = "LRPAIS"  # letter 2a is the negative, 2a + 1 the positive direction of world axis a


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in space: `shape` (D, H, W), and `affine` (4, 4) from voxel indices to world mm, RAS+.

    Oblique, left-handed, sheared and not quite orthonormal grids are all valid. Raises ValueError if there are not
    three axes of at least one voxel, or if the affine is not (4, 4), not finite, singular or has zero spacing.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        d, h, w = _whole(self.shape, "the shape of a grid", least=1).tolist()
        affine = np.array(self.affine, dtype=np.float64) + 0.0  # no -0.0, so that equal grids have equal hashes
        if affine.shape != (4, 4):
            raise ValueError(f"an affine is a (4, 4) matrix, got shape {affine.shape}")
        if not np.isfinite(affine).all():
            raise ValueError("the affine has NaN or infinite entries; correct the file's header")
        if not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise ValueError(f"the last row of an affine is 0 0 0 1, got {affine[3]}")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if spacing.min() == 0:
            raise ValueError(
                f"the spacing of each axis must be above 0 mm, got {spacing.tolist()}; correct the file's header"
            )
        if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
            raise ValueError("the affine is singular: its voxel axes lie in one plane; correct the file's header")
        affine.flags.writeable = False
        object.__setattr__(self, "shape", (d, h, w))
        object.__setattr__(self, "affine", affine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    def __repr__(self) -> str:
        spacing, origin = (", ".join(f"{mm:.6g}" for mm in values) for values in (self.spacing, self.affine[:3, 3]))
        return f"Geometry({self.shape} voxels of ({spacing}) mm, {self.orientation} from ({origin}) mm)"

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxel centres along each axis."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return d, h, w

    @property
    def direction(self) -> np.ndarray:
        """(3, 3): column n is the unit vector in the world along voxel axis n."""
        return self.affine[:3, :3] / self.spacing

    @property
    def orientation(self) -> str:
        """The anatomical direction in which each axis increases, such as "RAS" (nibabel's rule)."""
        return "".join(_LETTERS[n] for n in _letters(self.direction))

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm3."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))

    @property
    def shear_degrees(self) -> float:
        """The largest departure of two voxel axes from a right angle; 0 for an orthogonal grid."""
        cosines = self.direction.T @ self.direction - np.eye(3)
        return float(np.degrees(np.arcsin(np.abs(cosines).max())))

    @property
    def obliquity_degrees(self) -> float:
        """The largest angle between a voxel axis and the anatomical axis that names it; 0 for an aligned grid."""
        cosines = np.abs(self.direction[_letters(self.direction) // 2, range(3)])
        return float(np.degrees(np.arccos(min(1.0, cosines.min()))))

    def world(self, points: ArrayLike) -> np.ndarray:
        """Voxel indices (..., 3) -> world mm, RAS+."""
        return _rows(points, 3) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index(self, points: ArrayLike) -> np.ndarray:
        """World mm (..., 3), RAS+ -> voxel indices, neither rounded nor limited to the grid."""
        return (_rows(points, 3) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def same_as(self, other: Geometry, tolerance_mm: float = 1e-3) -> bool:
        """Equal shapes, and no voxel further than `tolerance_mm` from its counterpart."""
        if self.shape != other.shape:
            return False
        corners = np.array(list(np.ndindex(2, 2, 2))) * np.subtract(self.shape, 1)
        distance = np.linalg.norm(self.world(corners) - other.world(corners), axis=1)  # largest at a corner
        return bool(distance.max() <= tolerance_mm)

    def coincides(self, other: Geometry) -> bool:
        """Equal shapes, and no voxel further from its counterpart than a twentieth of the smallest spacing."""
        return self.same_as(other, tolerance_mm=min(self.spacing) / 20)

    def reorient(self, codes: str) -> Reorient:
        """The axes in the order and the directions of `codes`, such as "RAS", by flips and transposes."""
        wanted = np.array([_LETTERS.find(code) for code in codes.upper()])
        if sorted(wanted // 2) != [0, 1, 2]:
            raise ValueError(f"orientation codes are one each of L/R, P/A and I/S, such as RAS, got {codes!r}")
        letters = _letters(self.direction)
        axes = np.array([np.flatnonzero(letters // 2 == axis)[0] for axis in wanted // 2])
        flips = letters[axes] != wanted
        shape = np.array(self.shape)
        first = np.zeros(3)
        first[axes] = np.where(flips, shape[axes] - 1, 0)
        target = self._regridded(shape[axes], np.eye(3)[:, axes] * np.where(flips, -1, 1), first)
        return Reorient(self, target, tuple(axes.tolist()), tuple(flips.tolist()))

    def crop(self, start: ArrayLike, stop: ArrayLike) -> Crop:
        """The voxels [start, stop) along each axis, a box within the grid that holds a voxel; else ValueError."""
        first, last = _whole(start, "the start of a crop"), _whole(stop, "the stop of a crop")
        if not ((first < last) & (last <= self.shape)).all():
            box = f"start {tuple(first.tolist())}, stop {tuple(last.tolist())}, shape {self.shape}"
            raise ValueError(f"a crop needs 0 <= start < stop <= shape on each axis, got {box}; use pad to grow a grid")
        return Crop(self, self._regridded(last - first, np.eye(3), first), tuple(first.tolist()))

    def pad(self, before: ArrayLike, after: ArrayLike) -> Pad:
        """`before` and `after` more voxels (0 or more, three each) at the two ends of the axes."""
        low, high = _whole(before, "padding before"), _whole(after, "padding after")
        return Pad(self, self._regridded(low + self.shape + high, np.eye(3), -low), tuple(low.tolist()))

    def resample(self, spacing: ArrayLike | None = None, shape: ArrayLike | None = None) -> Resample:
        """Voxels of another size over the same field of view, edge to edge: by `spacing` (mm, one or three) or `shape`.

        A spacing is met as nearly as whole voxels allow: each axis gets max(1, round(n * old / new)) of them.
        """
        if (spacing is None) == (shape is None):
            raise ValueError("resample takes either a spacing or a shape")
        if spacing is not None:
            wanted = np.asarray(spacing, dtype=np.float64)
            if wanted.shape not in ((), (3,)) or not ((wanted > 0) & (wanted < np.inf)).all():
                raise ValueError(f"a spacing is one or three numbers above 0 mm, got {spacing}")
            shape = np.maximum(1, np.rint(np.multiply(self.shape, self.spacing) / wanted)).astype(int)
        voxels = _whole(shape, "the shape of a grid", least=1)
        ratio = self.shape / voxels
        return Resample(self, self._regridded(voxels, np.diag(ratio), (ratio - 1) / 2))

    def _regridded(self, shape: np.ndarray, matrix: np.ndarray, first: np.ndarray) -> Geometry:
        """The grid whose voxel p is at this grid's index `matrix` @ p + `first`."""
        affine = np.eye(4)
        affine[:3, :3] = self.affine[:3, :3] @ matrix
        affine[:3, 3] = self.world(first)
        d, h, w = shape.tolist()
        return Geometry((d, h, w), affine)


@dataclass(frozen=True)
class Frame(ABC):
    """The record of a change from the `source` grid to the `target` grid.

    Arrays are (..., D, H, W) and are never changed: a result is a new array or a read-only view of the caller's.
    ValueError if an array is not on the source grid.
    """

    source: Geometry
    target: Geometry

    @abstractmethod
    def image(self, array: np.ndarray, fill: float = 0.0, order: int = 1) -> np.ndarray:
        """The image on the target grid, `fill` where nothing is known. The dtype is kept, but resampling gives float32.

        `order` is the interpolation of resampling: 0 nearest, 1 linear, 3 cubic B-spline.
        """

    @abstractmethod
    def label_map(self, array: np.ndarray, fill: int = 0) -> np.ndarray:
        """The label map on the target grid, dtype kept, with no label but those in `array` and `fill`."""

    @abstractmethod
    def inverse(self) -> Frame:
        """The frame from the target grid back to the source grid."""

    @abstractmethod
    def _moved(self, indices: np.ndarray, centre: float) -> np.ndarray:
        """Indices (..., 3), source -> target; a grid's first edge is at -`centre`: 0.5 for points, 0 for boxes."""

    def points(self, points: ArrayLike) -> np.ndarray:
        """Voxel indices (..., 3), source -> target, float64; points outside the grids are mapped too."""
        return self._moved(_rows(points, 3), 0.5)

    def boxes(self, boxes: ArrayLike) -> np.ndarray:
        """Half-open boxes (..., 6) of voxel indices, d0 h0 w0 d1 h1 w1, source -> target, not clipped to the grid.

        Whole numbers give int64, except that resampling gives float64.
        """
        corners = _rows(boxes, 6)
        if np.asarray(boxes).dtype.kind in "iu":
            corners = corners.astype(np.int64)
        a, b = self._moved(corners[..., :3], 0), self._moved(corners[..., 3:], 0)
        return np.concatenate([np.minimum(a, b), np.maximum(a, b)], axis=-1)

    def _checked(self, array: np.ndarray) -> np.ndarray:
        """A read-only view of an array on the source grid."""
        view = np.asarray(array).view()
        if view.shape[-3:] != self.source.shape:
            raise ValueError(f"the array's last three axes must be the grid's, {self.source.shape}, got {view.shape}")
        view.flags.writeable = False
        return view


class _Rearrangement(Frame):
    """A frame that moves voxels and computes none."""

    def image(self, array: np.ndarray, fill: float = 0.0, order: int = 1) -> np.ndarray:
        return self._rearranged(self._checked(array), fill)

    def label_map(self, array: np.ndarray, fill: int = 0) -> np.ndarray:
        return self._rearranged(self._checked(array), fill)

    @abstractmethod
    def _rearranged(self, array: np.ndarray, fill: float) -> np.ndarray: ...


@dataclass(frozen=True)
class Reorient(_Rearrangement):
    """Target axis n is source axis `axes[n]`, reversed where `flips[n]`."""

    axes: tuple[int, ...]
    flips: tuple[bool, ...]

    def inverse(self) -> Reorient:
        back = np.argsort(self.axes)
        return Reorient(self.target, self.source, tuple(back.tolist()), tuple(self.flips[n] for n in back))

    def _moved(self, indices: np.ndarray, centre: float) -> np.ndarray:
        moved = indices[..., self.axes]
        return np.where(self.flips, np.array(self.target.shape) - 2 * centre - moved, moved)

    def _rearranged(self, array: np.ndarray, fill: float) -> np.ndarray:
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return np.flip(moved, tuple(axis - 3 for axis in range(3) if self.flips[axis]))


@dataclass(frozen=True)
class Crop(_Rearrangement):
    """Target voxel 0 is source voxel `start`."""

    start: tuple[int, ...]

    def inverse(self) -> Pad:
        return Pad(self.target, self.source, before=self.start)

    def _moved(self, indices: np.ndarray, centre: float) -> np.ndarray:
        return indices - np.array(self.start)

    def _rearranged(self, array: np.ndarray, fill: float) -> np.ndarray:
        return array[_window(self.start, self.target.shape)]


@dataclass(frozen=True)
class Pad(_Rearrangement):
    """Source voxel 0 is target voxel `before`."""

    before: tuple[int, ...]

    def inverse(self) -> Crop:
        return Crop(self.target, self.source, start=self.before)

    def _moved(self, indices: np.ndarray, centre: float) -> np.ndarray:
        return indices + np.array(self.before)

    def _rearranged(self, array: np.ndarray, fill: float) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            value = np.asarray(fill).astype(array.dtype)
        if array.dtype.kind in "biu" and value != fill:
            raise ValueError(f"the fill value must be one that {array.dtype} can hold, got {fill}")
        padded = np.full((*array.shape[:-3], *self.target.shape), value)
        padded[_window(self.before, self.source.shape)] = array
        return padded


@dataclass(frozen=True)
class Resample(Frame):
    """Both grids span the same box, edge to edge, along the same directions; `image` needs finite values.

    Order 1 averages where voxels become larger, so that nothing aliases; order 3 interpolates at any size. Beyond its
    edges an image goes on unchanged. Label maps, and order 0, take the voxel that holds the new voxel's centre.
    """

    def inverse(self) -> Resample:
        return Resample(self.target, self.source)

    def image(self, array: np.ndarray, fill: float = 0.0, order: int = 1) -> np.ndarray:
        if order not in (0, 1, 3):
            raise ValueError(f"the order of interpolation is 0 (nearest), 1 (linear) or 3 (cubic), got {order}")
        if order == 0:
            return nearest(self._checked(array), self.target.shape).astype(np.float32, copy=False)
        return interpolate(self._checked(array), self.target.shape, order)

    def label_map(self, array: np.ndarray, fill: int = 0) -> np.ndarray:
        return nearest(self._checked(array), self.target.shape)

    def _moved(self, indices: np.ndarray, centre: float) -> np.ndarray:
        return (indices + centre) * self.target.shape / self.source.shape - centre


@dataclass(frozen=True)
class Chain(Frame):
    """Frames one after another, each of which starts on the grid where the one before it ends."""

    source: Geometry = field(init=False)
    target: Geometry = field(init=False)
    frames: Sequence[Frame]

    def __post_init__(self) -> None:
        frames = tuple(self.frames)
        if not frames:
            raise ValueError("a chain needs at least one frame")
        for first, second in pairwise(frames):
            if not first.target.same_as(second.source):
                raise ValueError(f"each frame must start where the last ended, {first.target}, got {second.source}")
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "source", frames[0].source)
        object.__setattr__(self, "target", frames[-1].target)

    def image(self, array: np.ndarray, fill: float = 0.0, order: int = 1) -> np.ndarray:
        for frame in self.frames:
            array = frame.image(array, fill, order)
        return array

    def label_map(self, array: np.ndarray, fill: int = 0) -> np.ndarray:
        for frame in self.frames:
            array = frame.label_map(array, fill)
        return array

    def inverse(self) -> Chain:
        return Chain(tuple(frame.inverse() for frame in reversed(self.frames)))

    def _moved(self, indices: np.ndarray, centre: float) -> np.ndarray:
        for frame in self.frames:
            indices = frame._moved(indices, centre)
        return indices


def _letters(direction: np.ndarray) -> np.ndarray:
    """For each voxel axis the letter (an index into _LETTERS) of the world direction that it is nearest to, one to one.

    The axes of the nearest rotation (polar decomposition) choose in turn, the one closest to a world axis first.
    """
    u, _, vt = np.linalg.svd(direction)
    rotation = u @ vt
    strength = np.abs(rotation)
    letters = np.zeros(3, dtype=int)
    for axis in np.argsort(-(rotation**2).max(axis=0), kind="stable"):
        world = int(strength[:, axis].argmax())
        strength[world] = -1
        letters[axis] = 2 * world + (rotation[world, axis] > 0)
    return letters


def _window(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple:
    """The index of a box in the last three axes."""
    return (..., *(slice(low, low + size) for low, size in zip(start, shape, strict=True)))


def _rows(values: ArrayLike, length: int) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or rows.shape[-1] != length:
        raise ValueError(f"expected {length} numbers in the last axis, got shape {rows.shape}")
    return rows


def _whole(values: ArrayLike | None, what: str, least: int = 0) -> np.ndarray:
    numbers = np.asarray(values)
    if numbers.shape != (3,) or numbers.dtype.kind not in "iu" or numbers.min() < least:
        raise ValueError(f"{what} must be three whole numbers of at least {least}, got {values!r}")
    return numbers.astype(np.int64)
