"""The box of the body: windows are laid over it alone where a strategy is asked to leave out the air around.

Shape legend: image_C... is (channels, *spatial axes), any number of spatial axes; values_C... is (channels or classes,
*spatial axes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage

from medseg3d.geometry import Geometry
from medseg3d.inference.slabs import Head, Slab

Box = tuple[slice, ...]

BODY_HU = -500.0  # between tissue and air
BODY_MARGIN_MM = 20.0  # kept around: networks learned bodies with some air around them
TABLE_MM = 10.0  # shells of tables are thinner, arms and necks are not

# A softmax makes 2e-9 of it, and interpolated next to what a network says it still is a number like any other.
_NEVER = -20.0
# Pieces of less than this share of the largest are not the body: tubes, and what is left of a table.
_SHARE = 0.01
# Voxels of a full slab that exist at a time.
_TOGETHER = 2**20


class BodyBox:
    """Finds the box around a body: called with an image (C, *spatial), it gives a slice for each spatial axis.

    The box is that of all that is above a value in any channel, grown by a margin. What is thin does not count, or a
    table below a patient would be in it; nor do pieces that are small beside the largest. Of several large pieces all
    count, for a second leg or an arm may be apart: a box that is too large costs time, one that is too small a part of
    the body. Where nothing is found the box is the whole image.

    Args:
        above: what separates body and air, in the units of the image that is given: -500 for HU.
        margin: voxels kept around, one number or one an axis.
        thin: what does not hold a block of so many voxels, one number or one an axis, may be left out; 1 counts every
            voxel.

    Raises:
        ValueError: a margin below 0 or ``thin`` below 1.
    """

    def __init__(self, above: float, margin: int | Sequence[int] = 8, thin: int | Sequence[int] = 3) -> None:
        self.above = above
        self.margin = margin
        self.thin = thin
        if np.min(margin) < 0 or np.min(thin) < 1:
            raise ValueError(f"margin is 0 or more and thin 1 or more voxels, got {margin} and {thin}")

    def __call__(self, image_C: torch.Tensor) -> Box:
        return self.around((image_C > self.above).any(dim=0))

    def around(self, mask: torch.Tensor) -> Box:
        """The box of the body in a mask (*spatial) of what is above the value."""
        size = tuple(mask.shape)
        margin, thin = (_each(value, size) for value in (self.margin, self.thin))
        counts = _counts(_thick(mask, thin), thin).numpy(force=True)  # blocks are few enough to be joined fast
        pieces, count = ndimage.label(counts, np.ones((3,) * mask.dim()))
        if not count:
            return _whole(size)
        sizes = np.bincount(pieces.ravel(), counts.ravel())[1:]
        all_boxes = ndimage.find_objects(pieces)
        boxes = [all_boxes[n] for n in np.flatnonzero(sizes >= _SHARE * sizes.max())]
        found = []
        for axis, (length, width, room) in enumerate(zip(size, thin, margin, strict=True)):
            # What is around full blocks may hold the surface: one on each side is added, unless each voxel is a block.
            rim = room + (width if width > 1 else 0)
            start = min(box[axis].start for box in boxes) * width - rim
            stop = max(box[axis].stop for box in boxes) * width + rim
            found.append(slice(max(start, 0), min(stop, length)))
        return tuple(found)


def body_on_grid(array: np.ndarray, scan: Geometry, grid: Geometry) -> Box:
    """The box of the body of a CT on another grid, such as a network's.

    Args:
        array: (D, H, W) in HU, on the grid ``scan``.
        grid: where the box is wanted; its axes may run in any direction.
    """
    spacing = np.asarray(scan.spacing)
    margin, thin = (np.ceil(mm / spacing).astype(int) for mm in (BODY_MARGIN_MM, TABLE_MM))
    box = BodyBox(BODY_HU, margin.tolist(), thin.tolist()).around(torch.from_numpy(array > BODY_HU))
    corners = np.stack(np.meshgrid(*([part.start - 0.5, part.stop - 0.5] for part in box)), -1).reshape(-1, 3)
    on_grid = grid.index(scan.world(corners))
    starts = np.floor(on_grid.min(axis=0) + 0.5 + 1e-6).astype(int).clip(0, np.array(grid.shape) - 1)
    stops = np.ceil(on_grid.max(axis=0) + 0.5 - 1e-6).astype(int).clip(starts + 1, grid.shape)
    return tuple(slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def checked_box(box: Any, size: Sequence[int], roi_size: Sequence[int]) -> Box:
    """The box, as large as a window at least where the image has room, so that nothing is padded without need.

    Raises:
        ValueError: it is no box within an image of this size.
    """
    parts = tuple(box)
    if len(parts) != len(size):
        raise ValueError(f"crop must give a slice for each of {len(size)} spatial axes, got {box}")
    grown = []
    for part, length, roi in zip(parts, size, roi_size, strict=True):
        start, stop, step = part.indices(length)
        if step != 1 or start >= stop:
            raise ValueError(f"crop must give slices that hold voxels of an image of size {tuple(size)}, got {box}")
        missing = max(min(roi, length) - (stop - start), 0)
        start = min(max(start - missing // 2, 0), length - (stop - start) - missing)
        grown.append(slice(start, max(stop, start + min(roi, length))))
    return tuple(grown)


def told(box: Box, size: Sequence[int]) -> str:
    """What is left out, in words."""
    places = ", ".join(f"{part.start}:{part.stop}" for part in box)
    grid = "x".join(map(str, size))
    return f"windows lie over [{places}] of {grid} voxels; {share_outside(box, size):.1%} of them are left out"


def crop_record(box: Box, size: Sequence[int]) -> dict[str, Any]:
    """The same for a report: the box and its grid in voxels, and the share of them that is left out."""
    start, stop = zip(*((part.start, part.stop) for part in box), strict=True)
    left_out = round(share_outside(box, size), 4)
    return {"grid": list(size), "start": list(start), "stop": list(stop), "left_out": left_out}


def share_outside(box: Box, size: Sequence[int]) -> float:
    """Share of an image's voxels that lie outside a box."""
    return 1 - prod(part.stop - part.start for part in box) / prod(size)


def with_background(values_BC: torch.Tensor, box: Box, size: Sequence[int]) -> torch.Tensor:
    """Logits (B, C, *box) of a box in an image of the given size, with :func:`background` around.

    Raises:
        ValueError: the values have another resolution than the image.
    """
    expected = [part.stop - part.start for part in box]
    if list(values_BC.shape[2:]) != expected:
        raise ValueError(
            f"crop needs outputs at the image's resolution, but of {tuple(expected)} voxels the network makes "
            f"{tuple(values_BC.shape[2:])}: leave crop out"
        )
    outside_C = background(values_BC.shape[1]).to(values_BC)
    result = outside_C.view(1, -1, *[1] * len(size)).repeat(len(values_BC), 1, *size)
    result[(slice(None), slice(None), *box)] = values_BC
    return result


def background(channels: int) -> torch.Tensor:
    """Logits (channels,) outside a box: 0 for class 0, the background, and -20 for the others; -20 for one alone."""
    logits_K = torch.full((channels,), _NEVER)
    if channels > 1:
        logits_K[0] = 0
    return logits_K


def slabs_with_background(slabs: Iterator[Slab], box: Box, size: Sequence[int]) -> Iterator[Slab]:
    """Slabs of a box as slabs of the whole image (*size), with the logits of :func:`background` around.

    Where slabs have a head, one more channel tells what lies outside: it is 1 there, and the head makes the logits of
    the background of it. A few slices leave at a time, all in the same memory.
    """
    if not share_outside(box, size):
        yield from slabs
        return
    following = 0
    wide: _Wide | None = None
    for slab in slabs:
        if wide is None:
            wide = _Wide(slab, box, size)
            yield from wide.outside(0, box[slab.axis].start)
        yield from wide.around(slab)
        following = box[slab.axis].start + slab.stop
    assert wide is not None
    yield from wide.outside(following, size[wide.axis])


class _Wide:
    """Memory for a few slices of the whole image, background at first.

    Args:
        slab: of the box, to know its channels, type and device by.
    """

    def __init__(self, slab: Slab, box: Box, size: Sequence[int]) -> None:
        self.axis = slab.axis
        self.box = box
        self.head, outside_F = _head_with_background(slab.head, slab.values)
        depth = max(1, _TOGETHER // (prod(size) // size[self.axis]))
        shape = list(size)
        shape[self.axis] = min(depth, size[self.axis])
        self.outside_F = outside_F.view(-1, *[1] * len(size))
        self.values = self.outside_F.repeat(1, *shape)

    def outside(self, start: int, stop: int) -> Iterator[Slab]:
        """Slices without any of the box."""
        for first in range(start, stop, self.depth):
            values = self.values.narrow(1 + self.axis, 0, min(self.depth, stop - first))
            values.copy_(self.outside_F.expand_as(values))
            yield Slab(self.axis, first, values, self.head)

    def around(self, slab: Slab) -> Iterator[Slab]:
        """Slices of a slab of the box with the image around."""
        begin = self.box[self.axis].start
        for first in range(slab.start, slab.stop, self.depth):
            count = min(self.depth, slab.stop - first)
            values = self.values.narrow(1 + self.axis, 0, count)
            place = [*self.box]
            place[self.axis] = slice(0, count)
            own = slab.values.narrow(1 + self.axis, first - slab.start, count)
            values.copy_(self.outside_F.expand_as(values))
            values[(slice(None, len(own)), *place)] = own
            if self.head is not None:
                values[-1][tuple(place)] = 0
            yield Slab(self.axis, begin + first, values, self.head)

    @property
    def depth(self) -> int:
        return self.values.shape[1 + self.axis]


def _head_with_background(head: Head | None, values_F: torch.Tensor) -> tuple[Head | None, torch.Tensor]:
    """The head with one more input, and the values outside the box, of which it makes the background."""
    if head is None:
        return None, background(len(values_F)).to(values_F)
    outside_F = torch.zeros(1 + len(values_F)).to(values_F)
    outside_F[-1] = 1
    outside_K = background(len(head.weight)).to(head.weight)
    if not head.linear:
        return _Switched(head.weight, head=head, outside_K=outside_K), outside_F
    if head.bias is not None:
        outside_K = outside_K - head.bias
    return Head(torch.cat([head.weight, outside_K[:, None]], 1), head.bias), outside_F


@dataclass(frozen=True)
class _Switched(Head):
    """A head that is not linear where the last channel is 0, and other logits (K,) where it is 1."""

    head: Head = field(kw_only=True)
    outside_K: torch.Tensor = field(kw_only=True)
    linear: ClassVar[bool] = False

    def __call__(self, features_FV: torch.Tensor) -> torch.Tensor:
        logits_KV = self.head(features_FV[:-1])
        return torch.where(features_FV[-1] > 0, self.outside_K.to(logits_KV)[:, None], logits_KV)


def _thick(mask: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Where a full block of so many voxels begins; beyond the end of the mask all is full."""
    for axis, width in enumerate(widths):
        length = mask.shape[axis]
        edge = [width - 1 if n == axis else size for n, size in enumerate(mask.shape)]
        mask = torch.cat([mask, mask.new_ones(edge)], axis)
        span = 1
        while span < width:
            step = min(span, width - span)
            span += step
            kept = length + width - span
            mask = mask.narrow(axis, 0, kept) & mask.narrow(axis, step, kept)
    return mask


def _counts(mask: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """How many voxels of a mask are in each block; the last block along an axis may be smaller."""
    counts = mask
    for axis, width in enumerate(widths):
        lacking = -mask.shape[axis] % width
        added = [lacking if n == axis else length for n, length in enumerate(counts.shape)]
        counts = torch.cat([counts, counts.new_zeros(added)], axis).unflatten(axis, (-1, width))
        counts = counts.sum(dim=axis + 1, dtype=torch.int32)
    return counts


def _each(value: int | Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    values = (value,) * len(size) if isinstance(value, int) else tuple(value)
    if len(values) != len(size):
        raise ValueError(f"margin and thin are one number or one for each of {len(size)} spatial axes, got {value}")
    return values


def _whole(size: Sequence[int]) -> Box:
    return tuple(slice(0, length) for length in size)
