"""Weighted sums of overlapping windows: of whole images, and in a slab that rolls along one axis.

Shape legend: C channels, ... spatial axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from medseg3d.inference.windows import Window

# Of a window, converted at a time to the type of the sums.
SLICES = 4


class Stitcher:
    """Weighted sum of one output over all windows of a batch of images, at that output's own resolution.

    Args:
        output: the first windows' output (windows, C, ...).
        image_shape: (B, channels, *spatial) of the padded images.
        roi_size: size of a window of the images.
        weight: importance of a window's voxels.
        windows: all windows of one image; each contributes its weight once.
        device: where sums are kept; by default where the output is.
    """

    def __init__(
        self,
        output: torch.Tensor,
        image_shape: Sequence[int],
        roi_size: Sequence[int],
        weight: torch.Tensor,
        windows: Sequence[Window],
        device: torch.device | None = None,
    ) -> None:
        self.scale = [out / roi for out, roi in zip(output.shape[2:], roi_size, strict=True)]
        self.shape = output.shape[2:]
        self.padded = tuple(image_shape[2:])
        self.device = device or output.device
        size = [int(length * scale) for length, scale in zip(image_shape[2:], self.scale, strict=True)]
        self.sum = torch.zeros((image_shape[0], output.shape[1], *size), device=self.device)
        self.weight_sum = torch.zeros(size, device=self.device)
        own_weight = self._at_own_resolution(weight)
        for window in windows:
            self.weight_sum[self._scaled(window)] += own_weight

    def add(self, output: torch.Tensor, group: Sequence[tuple[int, Window]], weight: torch.Tensor) -> None:
        """Add outputs (windows, C, ...) at the places ``group``, pairs of an image's number and a window."""
        own_weight = self._at_own_resolution(weight)
        for (b, window), part in zip(group, output, strict=True):
            self.sum[b][(slice(None), *self._scaled(window))].addcmul_(part.to(self.device).float(), own_weight)

    def result(self, before: Sequence[int], image_size: Sequence[int]) -> torch.Tensor:
        """The blended output without the padding."""
        blended = self.sum.div_(self.weight_sum)
        for axis, (b, size, scale) in enumerate(zip(before, image_size, self.scale, strict=True), start=2):
            if size < self.padded[axis - 2]:  # else the size was rounded already, and down
                start, stop = round(b * scale), round((b + size) * scale)
                blended = blended.narrow(axis, start, stop - start)
        return blended

    def _scaled(self, window: Window) -> Window:
        return tuple(
            slice(int(part.start * scale), int(part.stop * scale))
            for part, scale in zip(window, self.scale, strict=True)
        )

    def _at_own_resolution(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.reshape(weight.shape[-len(self.shape) :]).to(self.device).float()
        if weight.shape == self.shape:
            return weight
        return F.interpolate(weight[None, None], self.shape, mode="nearest-exact")[0, 0]


class RollingSlab:
    """Weighted sum of windows in memory that is as deep as one window: slices that no window reaches any more leave it.

    Slices lie in a ring: slice n of the image is slice n % depth of the memory.

    Args:
        output: a window's output (C, ...) as the network gives it; the memory has its layout and device.
        image_size: spatial size of the padded image.
        axis: along which windows come in order.
        dtype: of the sums.
        device: where they are kept; by default where the output is.
    """

    def __init__(
        self,
        output: torch.Tensor,
        image_size: Sequence[int],
        axis: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.axis = axis
        self.depth = output.shape[1 + axis]
        self.start = 0  # the image's slice that leaves next
        size = list(image_size)
        size[axis] = self.depth
        device = device or output.device
        if output.stride(0) == 1 and output.dim() > 2:  # channels-last
            self.sum = torch.zeros((*size, len(output)), dtype=dtype, device=device).movedim(-1, 0)
        else:
            self.sum = torch.zeros((len(output), *size), dtype=dtype, device=device)
        self.weight_sum = torch.zeros(size, device=device)

    def add(self, output: torch.Tensor, window: Window, weight: torch.Tensor) -> None:
        """Add a window's output (C, ...); ``window`` starts no earlier than the slices that have left."""
        output, weight = output.detach(), weight.detach().to(self.sum.device, self.sum.dtype)
        if output.device != self.sum.device:
            output = output.to(self.sum.device, self.sum.dtype)
        assert window[self.axis].start >= self.start
        for part, place in self._pieces(window[self.axis].start, window[self.axis].stop):
            where = tuple(place if axis == self.axis else window[axis] for axis in range(len(window)))
            piece = weight.narrow(self.axis, part.start, part.stop - part.start)
            self.weight_sum[where] += piece
            own = output.narrow(1 + self.axis, part.start, part.stop - part.start)
            _add_product(self.sum[(slice(None), *where)], own, piece)

    def leave(self, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The slices before ``stop`` that have not left yet: the first one's number, and blended values (C, ...).

        The values are in the slab's own memory, which is cleared when the next ones are asked for.
        """
        first = self.start
        for part, place in self._pieces(first, stop):
            where = tuple(place if axis == self.axis else slice(None) for axis in range(self.weight_sum.dim()))
            values, weight = self.sum[(slice(None), *where)], self.weight_sum[where]
            yield first + part.start, values.div_(weight.to(values.dtype))
            values.zero_()
            weight.zero_()
        self.start = stop

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Slices of the image from ``start`` on, counted from there, and where they lie in the ring."""
        assert stop - start <= self.depth
        first = start % self.depth
        until_end = min(stop - start, self.depth - first)
        yield slice(0, until_end), slice(first, first + until_end)
        if until_end < stop - start:
            yield slice(until_end, stop - start), slice(0, stop - start - until_end)


def _add_product(total: torch.Tensor, output: torch.Tensor, weight: torch.Tensor) -> None:
    """Add output (C, ...) times weight (...) to ``total``; on a CPU another type is converted in parts, in cache."""
    at_a_time = SLICES if output.dtype != total.dtype and total.device.type == "cpu" else total.shape[1]
    slices = (total.split(at_a_time, 1), output.split(at_a_time, 1), weight.split(at_a_time))
    for some, own, by in zip(*slices, strict=True):
        some.addcmul_(own.to(total.dtype), by)
