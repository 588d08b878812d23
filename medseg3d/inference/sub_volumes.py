"""Sub-volumes: a network runs in overlapping windows at full resolution and its outputs are blended.

Shape legend: image_BC... is (batch, channels, *spatial axes), any number of spatial axes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from medseg3d.inference.body import Box, checked_box, slabs_with_background, told, with_background
from medseg3d.inference.feeding import Feed, Place, device_of
from medseg3d.inference.graphs import Replayed
from medseg3d.inference.heads import split_head
from medseg3d.inference.precision import representative_window
from medseg3d.inference.slabs import Head, Slab
from medseg3d.inference.stitching import RollingSlab, Stitcher
from medseg3d.inference.strategy import Strategy, like, one_image, plain, some_images
from medseg3d.inference.windows import BLENDS, PLACEMENTS, Window, importance_map, windows

# To take the head off a network costs one window to four.
SPLIT_FROM_WINDOWS = 8
PADDING_MODES = ("constant", "reflect", "replicate", "circular")

logger = logging.getLogger(__name__)


class SubVolumes(Strategy):
    """Sliding-window inference with the placement and weights of MONAI's ``SlidingWindowInferer``.

    Sums are kept in float32 whatever the input's type, and neither the image nor what the network returns is changed.

    Args:
        roi_size: size of a window along each axis; an entry of 0, less than 0 or None takes the image's size.
        overlap: share of a window that neighbours have in common, in [0, 1); one number or one an axis.
        blend: "gaussian" or "constant", see :func:`medseg3d.inference.windows.importance_map`.
        sigma_scale: standard deviation of the Gaussian in window sizes.
        batch_size: windows that go through the network at once.
        padding_mode: how an image smaller than a window is padded; "constant", "reflect" (as often
            as it takes), "replicate" or "circular".
        padding_value: value of constant padding.
        weight_map: own weights of shape ``roi_size`` instead of ``blend``.
        process: called as ``process(outputs, window_batch, weight)`` and returns (outputs, weight). As in MONAI,
            outputs are weighted by the returned weight, but normalised by the one returned for the first batch.
        with_coordinates: call the network as ``network(window_batch, slices)``.
        progress: called as ``progress(done, total)`` after each batch of windows.
        placement: "monai" or "even", see :func:`medseg3d.inference.windows.window_starts`.
        device: where windows are blended; by default where the network's output is.
        accumulate: type of the sums in ``slabs`` and what follows from them. torch.bfloat16 halves their memory; a sum
            of n windows then has a relative error of up to n * 2**-9.
        graph: in ``slabs`` and what follows from them, start the network as a CUDA graph where there is a CUDA device
            and windows are many, see :class:`medseg3d.inference.graphs.Replayed`.
        crop: called with each image (C, *spatial); gives the box, a slice an axis, that windows are laid over, such as
            :class:`medseg3d.inference.BodyBox`. It is grown to a window's size. Outside it the answer is background:
            logits of 0 for class 0 and -20 for the others (-20 where there is one alone). What is left out is logged.

    An image in the memory of the CPU goes window by window to where the network's parameters are. Where memory runs
    out, half as many windows go through the network at once from then on.

    Raises:
        ValueError: on arguments out of range, and when called on an image whose axes do not fit ``roi_size``.
    """

    def __init__(
        self,
        roi_size: Sequence[int | None] | int,
        overlap: float | Sequence[float] = 0.5,
        blend: str = "gaussian",
        sigma_scale: float | Sequence[float] = 0.125,
        batch_size: int = 1,
        padding_mode: str = "constant",
        padding_value: float = 0.0,
        weight_map: torch.Tensor | None = None,
        process: Callable | None = None,
        with_coordinates: bool = False,
        progress: Callable[[int, int], None] | None = None,
        placement: str = "monai",
        device: str | torch.device | None = None,
        accumulate: torch.dtype = torch.float32,
        graph: bool = True,
        crop: Callable[[torch.Tensor], Sequence[slice]] | None = None,
    ) -> None:
        if blend not in BLENDS:
            raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        if accumulate not in (torch.float32, torch.bfloat16):
            raise ValueError(f"accumulate must be torch.float32 or torch.bfloat16, got {accumulate}")
        if crop is not None and with_coordinates:
            raise ValueError("with_coordinates are those of windows in the whole image: leave crop out")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        shares = (overlap,) if isinstance(overlap, int | float) else tuple(overlap)
        if not all(0 <= share < 1 for share in shares):
            raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
        self.roi_size = roi_size
        self.overlap = overlap
        self.blend = blend
        self.sigma_scale = sigma_scale
        self.batch_size = batch_size
        self.padding_mode = padding_mode
        self.padding_value = padding_value
        self.weight_map = weight_map
        self.process = process
        self.with_coordinates = with_coordinates
        self.progress = progress
        self.placement = placement
        self.device = None if device is None else torch.device(device)
        self.accumulate = accumulate
        self.graph = graph
        self.crop = crop

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """What ``network`` returns for the whole image: a tensor, a tuple or a dictionary of tensors.

        Args:
            inputs: (B, C, *spatial).
            network: called on (windows, C, *roi_size) with ``args`` and ``kwargs``. Its outputs may have another
                resolution than its input; each is stitched at its own.

        Raises:
            ValueError: there is no image, or what is given or returned is no tensor or has other axes.
        """
        if self.crop is not None:
            return self._cropped(inputs, network, *args, **kwargs)
        image = some_images(inputs)
        if getattr(network, "average", None) == "probabilities" and self.process is None:
            body, head = self._without_head(image, network, args, kwargs)
            if head is not None:  # the mean comes after blending, as in slabs
                features = self(image.to(device_of(network, image.device)), body)
                return like(torch.stack([Slab(0, 0, one, head).logits() for one in features]), inputs)
        roi_size = self._roi_size(image.shape[2:])
        padded, before = self._pad(image, roi_size)
        stitchers: list[Stitcher] = []
        names: list[str] | None = None
        feed = Feed(padded, device_of(network, image.device), self.batch_size)
        weight = self._weight(roi_size).to(feed.device)
        own = self._windows(padded.shape[2:], roi_size)
        places = [(b, window) for b in range(image.shape[0]) for window in own]
        done = 0
        for group, batch, given in feed.run(places, self._call(network, args, kwargs)):
            names, outputs = _flatten(given)
            batch_weight = weight
            if self.process is not None:
                outputs, batch_weight = self.process(outputs, batch, weight)
            for output in outputs:
                _require_axes(output, batch)
            if not stitchers:
                stitchers = [Stitcher(o, padded.shape, roi_size, batch_weight, own, self.device) for o in outputs]
            for stitcher, output in zip(stitchers, outputs, strict=True):
                stitcher.add(output, group, batch_weight)
            done += len(group)
            if self.progress is not None:
                self.progress(done, len(places))
        results = [like(stitcher.result(before, image.shape[2:]), inputs) for stitcher in stitchers]
        return _unflatten(results, names)

    def slabs(self, image_BC: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The blended output for one image (1, C, *spatial), slab by slab along the axis where that takes least memory.

        The network must return one tensor at the image's resolution. Where it ends in a convolution of kernel 1 from
        fewer channels than there are classes, those channels are blended, and slabs have that convolution as head.

        Raises:
            ValueError: there is more than one image, or the network returns something else.
        """
        image = one_image(image_BC, axes=1)[None]
        if self.process is not None:
            raise ValueError("process may change the weights of windows, which slabs do not support: call the strategy")
        if self.crop is not None:
            box = self._told_box(image)
            slabs = self.changed(crop=None).slabs(image[(slice(None), slice(None), *box)], network, *args, **kwargs)
            yield from slabs_with_background(slabs, box, image.shape[2:])
            return
        roi_size = self._roi_size(image.shape[2:])
        padded, before = self._pad(image, roi_size)
        size = tuple(padded.shape[2:])
        axis = _slab_axis(size, roi_size)
        layers = [
            [(0, window) for window in layer] for _, layer in groupby(self._windows(size, roi_size), key=_start(axis))
        ]
        inside = [slice(b, b + n) for b, n in zip(before, image.shape[2:], strict=True)]
        done, total = 0, sum(map(len, layers))
        slab: RollingSlab | None = None
        feed = Feed(padded, device_of(network, image.device), self.batch_size)
        weight = self._weight(roi_size).to(self.device or feed.device)
        body, head = self._without_head(image, network, args, kwargs)
        if self.graph:
            body = Replayed(body, total // self.batch_size, made_of=network)
        call = self._call(body, args, kwargs)
        for number, layer in enumerate(layers):
            following = layers[number + 1] if number + 1 < len(layers) else []
            for group, batch, outputs in feed.run(layer, call, following):
                if slab is None:
                    _require_one_tensor(outputs, batch)
                    slab = RollingSlab(outputs[0], size, axis, self.accumulate, self.device)
                for (_, window), output in zip(group, outputs, strict=True):
                    slab.add(output, window, weight)
                done += len(group)
                if self.progress is not None:
                    self.progress(done, total)
            assert slab is not None
            stop = following[0][1][axis].start if following else size[axis]
            yield from _without_padding(slab.leave(stop), axis, inside, head)

    def label_map(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.with_coordinates and len(inputs) > 1:
            raise ValueError(
                f"with_coordinates, labels are of one image at a time, got {len(inputs)}: call it for each"
            )
        return super().label_map(inputs, network, *args, **kwargs)

    def changed(self, **arguments: Any) -> SubVolumes:
        """The same with other ``arguments``."""
        own = {name: getattr(self, name) for name in signature(SubVolumes).parameters}
        return SubVolumes(**{**own, **arguments})

    def count(self, image_size: Sequence[int]) -> int:
        roi_size = self._roi_size(image_size)
        padded = [max(size, roi) for size, roi in zip(image_size, roi_size, strict=True)]
        return len(self._windows(padded, roi_size))

    def blending(self, image_size: Sequence[int], channels: int) -> tuple[int, int]:
        roi_size = self._roi_size(image_size)
        padded = [max(size, roi) for size, roi in zip(image_size, roi_size, strict=True)]
        axis = _slab_axis(padded, roi_size)
        padded[axis] = roi_size[axis]
        return prod(padded) * (channels * self.accumulate.itemsize + torch.float32.itemsize), prod(padded)

    def example(self, image_BC: torch.Tensor) -> torch.Tensor:
        """The window (1, C, *roi_size) in which values vary most among a few."""
        return representative_window(image_BC, self.roi_size, padding_value=self.padding_value)

    def box(self, image_BC: torch.Tensor) -> Box:
        if self.crop is None:
            return super().box(image_BC)
        size = tuple(image_BC.shape[2:])
        return checked_box(self.crop(plain(image_BC)[0]), size, self._roi_size(size))

    def _told_box(self, image_BC: torch.Tensor) -> Box:
        box = self.box(image_BC)
        logger.info(told(box, image_BC.shape[2:]))
        return box

    def _cropped(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """Each image in its own box."""
        names: list[str] | None = None
        images, inside = [], self.changed(crop=None)
        for image in some_images(inputs).split(1):
            box = self._told_box(image)
            part = image[(slice(None), slice(None), *box)]
            names, outputs = _flatten(inside(part, network, *args, **kwargs))
            images.append([with_background(output, box, image.shape[2:]) for output in outputs])
        return _unflatten([like(torch.cat(parts), inputs) for parts in zip(*images, strict=True)], names)

    def _windows(self, image_size: Sequence[int], roi_size: Sequence[int]) -> list[Window]:
        """In the order that slabs need, so that sums are the same to the last bit with slabs and without."""
        found = windows(image_size, roi_size, self._overlap(len(roi_size)), self.placement)
        if self.process is not None:  # it may depend on which windows share a batch: MONAI's order
            return list(found)
        return sorted(found, key=_start(_slab_axis(image_size, roi_size)))

    def _without_head(
        self, image: torch.Tensor, network: Callable, args: Any, kwargs: Any
    ) -> tuple[Callable, Head | None]:
        """The network without its head, and that; the network as it is where that is not worth its time."""
        if args or kwargs or self.with_coordinates or self.count(image.shape[2:]) < SPLIT_FROM_WINDOWS:
            return network, None
        return split_head(network, self.example(image).to(device_of(network, image.device))) or (network, None)

    def _call(self, network: Callable, args: Any, kwargs: Any) -> Callable[[torch.Tensor, Sequence[Place]], Any]:
        """What runs the network on windows of these places."""
        if not self.with_coordinates:
            return lambda batch, group: network(batch, *args, **kwargs)
        return lambda batch, group: network(
            batch, [[slice(b, b + 1), slice(None), *window] for b, window in group], *args, **kwargs
        )

    def _overlap(self, axes: int) -> tuple[float, ...]:
        overlap = (self.overlap,) * axes if isinstance(self.overlap, int | float) else tuple(self.overlap)
        if len(overlap) != axes:
            raise ValueError(f"overlap {overlap} is for {len(overlap)} spatial axes, but the image has {axes}")
        return overlap

    def _roi_size(self, image_size: Sequence[int]) -> tuple[int, ...]:
        axes = len(image_size)
        roi = (self.roi_size,) * axes if isinstance(self.roi_size, int) else tuple(self.roi_size)
        if len(roi) != axes:
            raise ValueError(
                f"roi_size {roi} is for {len(roi)} spatial axes, but the image has {axes}: {tuple(image_size)}"
            )
        return tuple(size if r is None or r <= 0 else r for r, size in zip(roi, image_size, strict=True))

    def _pad(self, image: torch.Tensor, roi_size: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """The image grown to the window on both sides, an odd voxel at the end; and what was put before it."""
        missing = [max(roi - size, 0) for roi, size in zip(roi_size, image.shape[2:], strict=True)]
        before = [m // 2 for m in missing]
        if not any(missing):
            return image, before
        if self.padding_mode == "reflect":
            for axis, (first, gap) in enumerate(zip(before, missing, strict=True), start=2):
                seen = np.pad(np.arange(image.shape[axis]), (first, gap - first), mode="reflect")
                image = image.index_select(axis, torch.from_numpy(seen).to(image.device))
            return image, before
        if self.padding_mode == "circular":
            for axis, (gap, size) in enumerate(zip(missing, image.shape[2:], strict=True)):
                if gap - gap // 2 > size:
                    raise ValueError(
                        f"circular padding cannot grow axis {axis} from {size} to {roi_size[axis]} voxels: "
                        f"use padding_mode='constant' or 'replicate'"
                    )
        pads = [n for b, m in zip(before[::-1], missing[::-1], strict=True) for n in (b, m - b)]
        value = self.padding_value if self.padding_mode == "constant" else None
        return F.pad(image, pads, mode=self.padding_mode, value=value), before

    def _weight(self, roi_size: Sequence[int]) -> torch.Tensor:
        if self.weight_map is None:
            return importance_map(roi_size, self.blend, self.sigma_scale)
        if tuple(self.weight_map.shape) != tuple(roi_size):
            raise ValueError(
                f"weight_map must have the window's shape {tuple(roi_size)}, got {tuple(self.weight_map.shape)}"
            )
        return torch.as_tensor(self.weight_map, dtype=torch.float32)


def _flatten(result: Any) -> tuple[list[str] | None, Sequence[torch.Tensor]]:
    if isinstance(result, Mapping):
        names = sorted(result)
        return names, [result[name] for name in names]
    if not isinstance(result, torch.Tensor | Sequence) or isinstance(result, str):
        raise ValueError(
            "a network must return a tensor of logits, or a sequence or mapping of tensors, but this one returns a "
            f"{type(result).__name__}: see that its forward ends in a return"
        )
    return None, (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _unflatten(results: list[torch.Tensor], names: list[str] | None) -> Any:
    if names is not None:
        return dict(zip(names, results, strict=True))
    return results[0] if len(results) == 1 else tuple(results)


def _slab_axis(image_size: Sequence[int], roi_size: Sequence[int]) -> int:
    """Along which the memory of a slab is smallest: its slab is the smallest share of the image."""
    return max(range(len(image_size)), key=lambda axis: image_size[axis] / roi_size[axis])


def _start(axis: int) -> Callable[[Window], int]:
    return lambda window: window[axis].start


def _require_one_tensor(outputs: Any, batch: torch.Tensor) -> None:
    if not isinstance(outputs, torch.Tensor):
        raise ValueError(
            f"labels need one tensor of logits, but the network returns a {type(outputs).__name__}: wrap it so that it "
            "returns the logits only"
        )
    _require_axes(outputs, batch)
    if outputs.shape[2:] != batch.shape[2:]:
        raise ValueError(
            f"labels need logits at the image's resolution, but the network makes {tuple(outputs.shape[2:])} of a "
            f"window of {tuple(batch.shape[2:])}: call the strategy itself, which stitches any resolution"
        )


def _require_axes(output: Any, batch: torch.Tensor) -> None:
    """ValueError unless the output is a tensor with the axes of the windows and as many of them."""
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"all that a network returns must be tensors, got one of type {type(output).__name__}")
    if output.dim() != batch.dim() or len(output) != len(batch):
        raise ValueError(
            f"of windows {tuple(batch.shape)} a network must make (windows, classes, ...) with as many windows and "
            f"axes, but this one makes {tuple(output.shape)}: are the image's axes (batch, channels, ...)?"
        )


def _without_padding(
    slices: Iterator[tuple[int, torch.Tensor]], axis: int, inside: Sequence[slice], head: Head | None
) -> Iterator[Slab]:
    """Slabs of the image from slices of the padded one: their numbers and values (C, ...)."""
    for first, values in slices:
        start = max(first, inside[axis].start)
        stop = min(first + values.shape[1 + axis], inside[axis].stop)
        if start < stop:
            kept = list(inside)
            kept[axis] = slice(start - first, stop - first)
            yield Slab(axis, start - inside[axis].start, values[(slice(None), *kept)], head)
