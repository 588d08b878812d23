"""Labels on another grid than the network's, the scan's own most of all, from the slabs of a segmented image.

They are the labels that interpolating every class's logits and taking the largest gives, but neither grid ever holds
all classes. A linear interpolation is a weighted mean: where all voxels it draws on have one label, that class is the
largest in each of them, hence in their mean, and the label is copied. Logits are interpolated elsewhere only, along the
borders between labels. The same holds for the wider triangle that keeps a coarser target from aliasing.

Shape legend: F channels of a slab, K classes, N source voxels, V target voxels, S source voxels that one of those draws
on, ... spatial axes of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import numpy as np
import torch
from torch.nn import functional as F

from medseg3d.inference.device import Returning
from medseg3d.inference.grid_map import AxisMap
from medseg3d.inference.slabs import Head, Slab, largest

# Target voxels whose labels are made at a time; the channels of the source voxels on their borders exist meanwhile.
GROUP = 2**20
# Of those, the ones whose logits exist at a time: they stay in the cache.
BLOCK = 2**14
# A GPU is busy only with more at a time.
TIMES_ON_GPU = 8
# Of the logits that are interpolated: -inf, a class that is ruled out, has no mean, and 0 times it is not a number.
LOWEST = -1e4


def labels_onto(slabs: Iterable[Slab], maps: Sequence[AxisMap], softmax: bool = False) -> np.ndarray:
    """Labels on the target grid, background 0 outside the source.

    Linear maps give the argmax of the interpolated logits, ties to the lower class; nearest ones the label of the
    nearest voxel. Logits below -10,000, -inf of a class that is ruled out most of all, are interpolated as -10,000.

    Args:
        slabs: the whole source image, slice after slice; each is read before the next is asked for.
        maps: one for each axis of the target, from :mod:`medseg3d.inference.grid_map`.
        softmax: interpolate the softmax of the logits instead of them, as MONAI's bundles do. Between two voxels the
            labels part at a slightly different place then.

    Returns:
        Labels of the target's shape, uint8 (uint16 above 256 classes). The memory's order is that of the source's axes.

    Raises:
        ValueError: there is one channel only, a logit is not a number, or the slabs are not of the maps' source.
    """
    bands = _bands(maps, normalised=True)
    labels = Returning(np.zeros([band.size for band in bands], np.uint8))
    for part, ready in _parts(slabs, bands):
        if part.classes > 256:
            labels.array = labels.array.astype(np.uint16, copy=False)
        own = [band.only(ready) if axis == part.axis else band for axis, band in enumerate(bands)]
        _fill_labels(labels, part, own, softmax)
    return labels.all().transpose([one.axis for one in maps])


def values_onto(slabs: Iterable[Slab], maps: Sequence[AxisMap]) -> np.ndarray:
    """Slabs of one channel, an uncertainty perhaps, on the target grid: float32, 0 outside the source.

    Raises:
        ValueError: more than one channel, or the slabs are not of the maps' source.
    """
    bands = _bands(maps, normalised=False)
    values = np.zeros([band.size for band in bands], np.float32)
    for part, ready in _parts(slabs, bands):
        if len(part.values) != 1:
            raise ValueError(f"a map of values has one channel, got {len(part.values)}; labels come of labels_onto")
        own = [band.only(ready).moved(part.start) if n == part.axis else band for n, band in enumerate(bands)]
        moved = part.values[0].float()
        for axis, band in enumerate(own):
            moved = band.to(moved.device).mean(moved, axis)
        values[tuple(band.place for band in own)] = moved.numpy(force=True)
    return values.transpose([one.axis for one in maps])


@dataclass(frozen=True)
class _Band:
    """Slices of the target and the few source slices from which each is made.

    Attributes:
        size, source: how many slices the target and the source have.
        start: the number of the target's first slice here; those outside the source are left out.
        first: (n,) the first source slice that each draws on.
        weights: (n, width) of that slice and the next ones.
    """

    size: int
    source: int
    start: int
    first: torch.Tensor
    weights: torch.Tensor

    @property
    def width(self) -> int:
        return self.weights.shape[1]

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + len(self.first))

    def only(self, part: slice) -> _Band:
        """Some of its slices, counted from its own first."""
        return replace(self, start=self.start + part.start, first=self.first[part], weights=self.weights[part])

    def moved(self, start: int) -> _Band:
        """The same with source slices counted from ``start``."""
        return replace(self, first=self.first - start)

    def to(self, device: torch.device) -> _Band:
        return replace(self, first=self.first.to(device), weights=self.weights.to(device))

    def mean(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Weighted means along an axis."""
        shape = [-1 if n == axis else 1 for n in range(values.dim())]
        parts = (values.index_select(axis, self.first + n) * self.weights[:, n].view(shape) for n in range(self.width))
        return reduce(torch.Tensor.add_, parts)


def _bands(maps: Sequence[AxisMap], normalised: bool) -> list[_Band]:
    """One for each axis of the source.

    A row between 0 and 1 in sum mixes in the 0 that lies outside. That lowers all logits alike, so it may be left out
    where only the largest counts.
    """
    if sorted(one.axis for one in maps) != list(range(len(maps))):
        raise ValueError(f"a target axis runs along each source axis, got {[one.axis for one in maps]}")
    bands = []
    for one in sorted(maps, key=lambda one: one.axis):
        inside = np.flatnonzero(one.weights.any(axis=1))
        start, stop = (inside[0], inside[-1] + 1) if len(inside) else (0, 0)
        assert len(inside) == stop - start, "the source is one interval of the target"
        weights = one.weights[start:stop]
        if normalised:
            weights = weights / weights.sum(axis=1, keepdims=True)
        n_target, n_source = one.weights.shape
        used = weights != 0
        first = used.argmax(axis=1)
        last = n_source - 1 - used[:, ::-1].argmax(axis=1)
        width = int((last - first).max(initial=0)) + 1
        first = np.minimum(first, n_source - width)
        taps = np.take_along_axis(weights, first[:, None] + np.arange(width), axis=1)
        taps_NS = torch.from_numpy(taps.astype(np.float32))
        bands.append(_Band(n_target, n_source, int(start), torch.from_numpy(first), taps_NS))
    return bands


def _parts(slabs: Iterable[Slab], bands: Sequence[_Band]) -> Iterator[tuple[Slab, slice]]:
    """Parts of the source in order, and the target slices along the slabs' axis that are made of each."""
    waiting: np.ndarray | None = None
    for part in _overlapping(slabs, bands):
        band = bands[part.axis]
        first = band.first.numpy()
        if waiting is None:
            waiting = np.ones(len(first), bool)
        ready = np.flatnonzero(waiting & (first >= part.start) & (first + band.width <= part.stop))
        if len(ready):
            waiting[ready] = False
            assert ready[-1] - ready[0] == len(ready) - 1, "weights move in one direction"
            yield part, slice(int(ready[0]), int(ready[-1]) + 1)
    if waiting is None or waiting.any():
        raise ValueError("the slabs end before the source grid does: pass all of one image's slabs")


def _overlapping(slabs: Iterable[Slab], bands: Sequence[_Band]) -> Iterator[Slab]:
    """The slabs, and between two of them the slices around their border: all neighbours are together once.

    Only the last slices of a slab are copied, as many as a target slice may draw on but one.
    """
    kept: Slab | None = None
    for slab in slabs:
        expected = [band.source for band in bands]
        expected[slab.axis] = slab.stop - slab.start
        if list(slab.values.shape[1:]) != expected or slab.stop > bands[slab.axis].source:
            raise ValueError(
                f"slabs along axis {slab.axis} must lie within the maps' source, {[band.source for band in bands]}, "
                f"got {list(slab.values.shape[1:])} from slice {slab.start} on"
            )
        reach, dim = bands[slab.axis].width - 1, slab.axis + 1
        around = None
        if kept is not None:
            assert kept.stop == slab.start, "slabs come in order"
            beginning = slab.values.narrow(dim, 0, min(reach, slab.values.shape[dim]))
            around = Slab(slab.axis, kept.start, torch.cat([kept.values, beginning], dim), slab.head)
            yield around
        yield slab
        if reach:
            last = slab if around is None or slab.values.shape[dim] >= reach else around
            count = min(reach, last.values.shape[dim])
            tail = last.values.narrow(dim, last.values.shape[dim] - count, count).clone()
            kept = Slab(slab.axis, last.stop - count, tail, slab.head)


def _fill_labels(labels: Returning, part: Slab, bands: Sequence[_Band], softmax: bool) -> None:
    """Write the labels of the target slices of ``bands``, which draw on this part of the source."""
    own = part.labels()
    if part.classes > 255:
        own = own.int()
    mixed = torch.iinfo(own.dtype).max  # no class has this number
    lowest, highest = (_over_neighbours(own, bands, choose) for choose in (torch.minimum, torch.maximum))
    cells = torch.where(lowest == highest, lowest, mixed)
    axis = part.axis
    slices = max(1, _at_once(GROUP, own) // prod(max(1, len(band.first)) for n, band in enumerate(bands) if n != axis))
    for start in range(0, len(bands[axis].first), slices):
        group = [*bands]
        group[axis] = bands[axis].only(slice(start, start + slices))
        begin, end = int(group[axis].first.min()), int(group[axis].first.max()) + 1
        group[axis] = group[axis].moved(begin)
        some = cells.narrow(axis, begin - part.start, end - begin)
        values = part.values.narrow(1 + axis, begin - part.start, end - begin + group[axis].width - 1)
        rows = _Rows(values, some == mixed, [band.to(own.device) for band in group])
        found = _labels(some, mixed, rows, part.head, softmax)
        labels.put(tuple(band.place for band in group), found)


def _at_once(voxels: int, near: torch.Tensor) -> int:
    return voxels if near.device.type == "cpu" else voxels * TIMES_ON_GPU


def _labels(cells: torch.Tensor, mixed: int, source: _Rows, head: Head | None, softmax: bool) -> torch.Tensor:
    """Labels of the target slices of ``source.bands``, whose first source slices are counted from those given.

    Args:
        cells: the label that all source voxels have on which a target voxel draws with this one as its first, or the
            number ``mixed``.
        source: the channels of the voxels of mixed cells.
    """
    labels, bands = cells, source.bands
    for axis in sorted(range(len(bands)), key=lambda axis: len(bands[axis].first) / cells.shape[axis]):
        labels = labels.index_select(axis, bands[axis].first)
    places_V = (labels == mixed).flatten().nonzero()[:, 0]
    if softmax or not (head is None or head.linear):
        source.take_logits(head, softmax)
        head = None
    if head is None:
        source.rows_NF.clamp_min_(LOWEST)
    for some_V in places_V.split(_at_once(BLOCK, labels)) if len(places_V) else ():
        means_FV = source.means(_unravelled(some_V, labels.shape)).T
        logits_KV = means_FV if head is None else head(means_FV)
        labels.view(-1)[some_V] = largest(logits_KV)[0].to(labels.dtype)
    return labels


def _unravelled(places_V: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """Indices along each axis, as by torch.unravel_index, which imports SymPy to check what it is given."""
    indices = []
    for size in reversed(shape):
        indices.append(places_V % size)
        places_V = places_V // size
    return indices[::-1]


def _over_neighbours(labels: torch.Tensor, bands: Sequence[_Band], choose: Callable) -> torch.Tensor:
    """For each source voxel the choice among all those that a target voxel may draw on with this one as its first."""
    for axis, band in enumerate(bands):
        count = labels.shape[axis] - band.width + 1
        labels = reduce(choose, (labels.narrow(axis, shift, count) for shift in range(band.width)))
    return labels


class _Rows:
    """The channels of those source voxels on which mixed cells draw, a row of memory for each.

    Args:
        values: (F, ...).
        mixed: (...) whether a target voxel that draws on this voxel as its first needs the channels.
    """

    def __init__(self, values: torch.Tensor, mixed: torch.Tensor, bands: Sequence[_Band]) -> None:
        needed = mixed
        offsets_S = torch.zeros(1, dtype=torch.int64, device=values.device)
        for axis, band in enumerate(bands):
            count = needed.shape[axis]
            wider = needed.new_zeros(values.shape[1 : 2 + axis] + needed.shape[1 + axis :])
            for shift in range(band.width):
                wider.narrow(axis, shift, count).logical_or_(needed)
            needed = wider
            steps = torch.arange(band.width, device=values.device) * prod(values.shape[2 + axis :])
            offsets_S = (offsets_S[:, None] + steps).flatten()
        self.bands = bands
        self.offsets_S = offsets_S
        self.strides = needed.stride()
        self.number_N = needed.flatten().cumsum(0, dtype=torch.int32) - 1
        self.rows_NF = _rows_at(values, needed)

    def take_logits(self, head: Head | None, softmax: bool) -> None:
        """Logits, or their softmax, in the place of the channels of which ``head`` makes them."""
        logits_NK = self.rows_NF if head is None else head(self.rows_NF.T).T
        self.rows_NF = logits_NK.softmax(1) if softmax else logits_NK.contiguous()

    def means(self, places: Sequence[torch.Tensor]) -> torch.Tensor:
        """Weighted means (V, F) at target voxels, given by their number on each axis."""
        first_V = torch.zeros_like(places[0])
        weights_VS = torch.ones(len(first_V), 1, device=first_V.device)
        for band, place, stride in zip(self.bands, places, self.strides, strict=True):  # index_select is the fastest
            first_V += band.first.index_select(0, place) * stride
            weights_VS = (weights_VS[:, :, None] * band.weights.index_select(0, place)[:, None]).flatten(1)
        places_VS = first_V[:, None] + self.offsets_S
        numbers_VS = self.number_N.index_select(0, places_VS.flatten()).view_as(places_VS)
        return F.embedding_bag(numbers_VS, self.rows_NF, per_sample_weights=weights_VS, mode="sum")


def _rows_at(values: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """(F, ...) -> (N, F) float32, contiguous: the channels of the ``needed`` voxels (...)."""
    if values.stride(0) == 1 or values.device.type != "cpu":
        return values.movedim(0, -1)[needed].float()
    # Channel by channel: those of one voxel often lie a multiple of 4096 bytes apart and cannot all be in the cache.
    places_N = needed.flatten().nonzero()[:, 0]
    rows_FN = torch.empty(len(values), len(places_N))
    for row_N, channel in zip(rows_FN, values, strict=True):
        row_N.copy_(channel.flatten().index_select(0, places_N))
    return rows_FN.T.contiguous()
