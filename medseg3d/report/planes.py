"""Planes through a volume along the patient's own axes, chosen to show the labels, for pictures.

World coordinates are RAS+ mm. In every picture both axes run towards the negative end of their world axis, which is
the radiological convention: the patient's right is on the left, the front on top (axial) or on the left (sagittal), the
head on top. Sampling in the world, flipped, oblique and sheared volumes need no case of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medseg3d.geometry import Geometry
from medseg3d.metrics.regions import label_boxes
from medseg3d.volume import Volume

Box = np.ndarray  # (2, 3): the low and the high corner in world mm
Range = tuple[float, float]  # from, to in mm along a world axis

_AIR = -1024.0  # what lies outside the volume
_BODY = -300.0  # HU above which a voxel belongs to the patient rather than to the air
_MARGIN = 1.25  # how much more than the labels a picture shows,
_LEAST_MM = 160.0  # and how much at least
_SKIN_MM = 8.0  # free space left around the patient
_COARSE = 80  # points per axis that suffice to find the patient
_SAMPLES = 200_000  # voxels of a label that suffice to choose planes,
_POINTS = 2_000  # and those that are kept
_SLIVER = 0.1  # of the largest labelled area of a plane: planes below are not worth showing
_GAIN = 0.25  # of a label's best view, for which another plane is worth its place


@dataclass(frozen=True)
class View:
    """One of the three planes: `normal` to a world axis, with two world axes in the picture."""

    name: str
    normal: int
    across: int
    down: int


AXIAL = View("axial", normal=2, across=0, down=1)
CORONAL = View("coronal", normal=1, across=0, down=2)
SAGITTAL = View("sagittal", normal=0, across=1, down=2)

# World axis -> the letters at its positive and its negative end.
ENDS = (("R", "L"), ("A", "P"), ("S", "I"))


@dataclass(frozen=True)
class WorldGrid:
    """Cells along the three world axes, over `box` and `step` (3,) mm wide, numbered from the positive end.

    Of an axis-aligned volume the cells are exactly its voxels.
    """

    box: Box
    step: np.ndarray

    @classmethod
    def around(cls, geometry: Geometry) -> WorldGrid:
        """The grid over the world box around a volume's voxel edges, as fine as its voxels."""
        corners = geometry.world(np.array(list(np.ndindex(2, 2, 2))) * geometry.shape - 0.5)
        # A world axis takes the spacing of the voxel axis that runs along it.
        nearest = np.abs(geometry.direction).argmax(axis=1)
        return cls(np.stack([corners.min(0), corners.max(0)]), np.array(geometry.spacing)[nearest])

    def cells(self, axis: int) -> int:
        """How many cells cover the axis."""
        return max(1, round(float(self.box[1, axis] - self.box[0, axis]) / self.step[axis]))

    def position(self, axis: int, cell: float) -> float:
        """World coordinate in mm of the centre of `cell`."""
        return float(self.box[1, axis] - (cell + 0.5) * self.step[axis])

    def cell(self, axis: int, positions: np.ndarray) -> np.ndarray:
        """The cell in which each world coordinate lies."""
        cells = np.floor((self.box[1, axis] - positions) / self.step[axis]).astype(int)
        return cells.clip(0, self.cells(axis) - 1)


@dataclass(frozen=True)
class Profile:
    """Where one label lies: how many voxels, their spread over the cells of each world axis, a box and some points."""

    voxels: int
    counts: tuple[np.ndarray, ...]
    box: Box
    points: np.ndarray


def profiles(segmentation: Volume, grid: WorldGrid, labels: Iterable[int]) -> dict[int, Profile]:
    """A `Profile` of each of `labels` that the segmentation holds; of a large one from an even sample of its voxels."""
    result = {}
    for label, box in label_boxes(segmentation.array, labels).items():
        part = segmentation.array[box] == label
        flat = np.flatnonzero(part)
        indices = np.stack(np.unravel_index(flat[:: 1 + len(flat) // _SAMPLES], part.shape), axis=-1)
        points = segmentation.geometry.world(indices + [s.start for s in box])
        counts = (np.bincount(grid.cell(n, points[:, n]), minlength=grid.cells(n)) for n in range(3))
        ends = np.stack([points.min(0) - grid.step / 2, points.max(0) + grid.step / 2])
        result[label] = Profile(len(flat), tuple(counts), ends, points[:: 1 + len(points) // _POINTS])
    return result


class Scene:
    """A label map on an image on one grid: where its labels lie, which world box is worth showing, which planes.

    `box` holds the labels with some surroundings, not beyond the patient's body; `cells` are those of the sagittal, the
    coronal and the axial plane that show most of the labels.
    """

    def __init__(self, segmentation: Volume, image: Volume, labels: Iterable[int]) -> None:
        self.segmentation, self.image = segmentation, image
        self.grid = WorldGrid.around(image.geometry)
        self.found = profiles(segmentation, self.grid, labels)
        self._points = np.concatenate([_body_points(image), *(profile.points for profile in self.found.values())])
        self.box = self._box()
        middle = [int(self.grid.cell(n, self.box[:, n].mean())) for n in range(3)]
        self.cells = [next(iter(best_cells(self.found, n, 1)), middle[n]) for n in range(3)]

    def _box(self) -> Box:
        if not self.found:
            return self._without_air(self.grid.box)
        corners = np.concatenate([profile.box for profile in self.found.values()])
        labels = np.stack([corners.min(0), corners.max(0)])
        half = np.maximum((labels[1] - labels[0]) * _MARGIN, _LEAST_MM) / 2
        around = labels.mean(0) + np.stack([-half, half])
        return _union(labels, self._without_air(_intersection(around, self.grid.box)))

    def _without_air(self, box: Box) -> Box:
        """`box` without its free space around the patient, as seen between its heights."""
        reach = np.array([0, 0, self.grid.step[2] + np.ptp(self.grid.box[:, 2]) / _COARSE])
        points = self._points
        points = points[((points >= box[0] - reach) & (points <= box[1] + reach)).all(axis=1)]
        if not len(points):
            return box
        return _intersection(box, np.stack([points.min(0) - _SKIN_MM, points.max(0) + _SKIN_MM]))

    def plane_box(self, view: View, cell: int) -> Box:
        """The part of `box` worth showing on one plane: of an axial plane only what the body fills at its height."""
        if view.normal != AXIAL.normal:
            return self.box
        box = self.box.copy()
        box[:, view.normal] = self.grid.position(view.normal, cell)
        return self._without_air(box)

    def showing(self, segmentation: Volume) -> Scene:
        """The same planes of the same image through another label map on its grid."""
        other = copy.copy(self)
        other.segmentation = segmentation
        return other

    def further_cells(self, axis: int, number: int) -> list[int]:
        """Up to `number` cells of `axis`, in order: planes that show what the main one does not, and others between."""
        main = self.cells[axis]
        chosen = best_cells(self.found, axis, number, seen=[main])
        if self.found:
            areas = np.sum([profile.counts[axis] for profile in self.found.values()], axis=0)
            among = np.flatnonzero(areas > areas.max() * _SLIVER)
        else:
            last, first = self.grid.cell(axis, self.box[:, axis])
            among = np.arange(first, last + 1)
        return sorted(spread_cells([main, *chosen], number + 1, among.tolist())[1:])


def best_cells(found: Mapping[int, Profile], axis: int, number: int, seen: Sequence[int] = ()) -> list[int]:
    """Up to `number` cells of `axis` whose planes show most of the labels, beyond what the cells in `seen` show.

    A plane shows a label as well as the square root of its area there, relative to the label's largest area. Cells are
    taken greedily, the best first; the list ends early where a further plane would show hardly more.
    """
    if not found:
        return []
    areas = np.stack([profile.counts[axis] for profile in found.values()])
    shown = np.sqrt(areas / areas.max(axis=1, keepdims=True))
    so_far = shown[:, list(seen)].max(axis=1, initial=0.0)
    cells: list[int] = []
    for _ in range(number):
        gain = np.maximum(shown - so_far[:, None], 0).sum(axis=0)
        if gain.max() < _GAIN:
            break
        cells.append(int(gain.argmax()))
        so_far = np.maximum(so_far, shown[:, cells[-1]])
    return cells


def spread_cells(cells: Sequence[int], number: int, among: Sequence[int]) -> list[int]:
    """`cells` followed by more of `among`, each as far from the others as can be, up to `number` in all."""
    result = list(cells)
    while len(result) < number:
        farthest = max(among, key=lambda cell: min(abs(cell - other) for other in result))
        if farthest in result:
            break
        result.append(farthest)
    return result


@dataclass(frozen=True)
class Cut:
    """A plane at the volume's own resolution: image and label map (rows, columns), and the edges (left, top, right,
    bottom) of the wished field of view in their pixels."""

    image: np.ndarray
    label_map: np.ndarray
    edges: tuple[float, float, float, float]


def cut(scene: Scene, view: View, cell: int, across: Range, down: Range) -> Cut:
    """The plane of `view` through `cell` over the world ranges `across` and `down`, which may leave the volume.

    The image is interpolated linearly, the label map by nearest voxel; an axis-aligned volume gives its own voxels.
    """
    grid = scene.grid
    points: list[np.ndarray] = [np.zeros(1)] * 3
    points[view.normal] = np.array([grid.position(view.normal, cell)])
    edges = []
    for axis, (low, high) in ((view.across, across), (view.down, down)):
        first, last = ((grid.box[1, axis] - end) / grid.step[axis] for end in (high, low))
        start = int(np.floor(first)) - 2  # two cells more on each side, for the later cubic interpolation
        points[axis] = np.array([grid.position(axis, n) for n in range(start, int(np.ceil(last)) + 2)])
        edges.append((first - start, last - start))
    lattice = np.stack(np.meshgrid(*points, indexing="ij"), axis=-1).squeeze(axis=view.normal).swapaxes(0, 1)
    (left, right), (top, bottom) = edges
    return Cut(*_sample(scene.image, scene.segmentation, lattice), (left, top, right, bottom))


def _sample(image: Volume, segmentation: Volume, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and label map at world points (rows, columns, 3)."""
    index = image.geometry.index(points)
    last = np.array(image.shape) - 1
    outside = ((index < -0.5 - 1e-6) | (index > last + 0.5 + 1e-6)).any(axis=-1)
    index = np.moveaxis(index.clip(0, last), -1, 0)
    values = ndimage.map_coordinates(image.array, index, output=np.float32, order=1, mode="nearest")
    labels = segmentation.array[tuple(np.rint(index).astype(int))]
    return np.where(outside, np.float32(_AIR), np.nan_to_num(values, nan=_AIR)), np.where(outside, 0, labels)


def _body_points(image: Volume) -> np.ndarray:
    """World points (N, 3) spread coarsely over the largest thing denser than air: the patient, not the table."""
    stride = [-(-n // _COARSE) for n in image.shape]
    dense = image.array[:: stride[0], :: stride[1], :: stride[2]] > _BODY
    pieces, _ = ndimage.label(dense)
    largest = 1 + np.bincount(pieces.ravel(), minlength=2)[1:].argmax()
    return image.geometry.world(np.argwhere(pieces == largest) * stride)


def _union(a: Box, b: Box) -> Box:
    return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])


def _intersection(a: Box, b: Box) -> Box:
    return np.stack([np.maximum(a[0], b[0]), np.minimum(a[1], b[1])])
