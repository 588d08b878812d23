"""Sub-volumes: a network runs in overlapping windows at full resolution and its outputs are blended.

Shape legend: image_BC... is (batch, channels, *spatial axes), any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from medseg3d.inference.windows import BLENDS, importance_map, windows

PADDING_MODES = ("constant", "reflect", "replicate", "circular")


class SubVolumes:
    """Sliding-window inference with the placement and weights of MONAI's ``SlidingWindowInferer``.

    Sums are kept in float32 whatever the input's type, and neither the image nor what the network returns is changed.

    Args:
        roi_size: size of a window along each axis; an entry of 0, less than 0 or None takes the image's size.
        overlap: share of a window that neighbours have in common, in [0, 1); one number or one an axis.
        blend: "gaussian" or "constant", see :func:`medseg3d.inference.windows.importance_map`.
        sigma_scale: standard deviation of the Gaussian in window sizes.
        batch_size: windows that go through the network at once.
        padding_mode: how an image smaller than a window is padded; "constant", "reflect", "replicate" or "circular".
        padding_value: value of constant padding.
        weight_map: own weights of shape ``roi_size`` instead of ``blend``.
        process: called as ``process(outputs, window_batch, weight)`` and returns (outputs, weight). As in MONAI,
            outputs are weighted by the returned weight, but normalised by the one returned for the first batch.
        with_coordinates: call the network as ``network(window_batch, slices)``.
        progress: called as ``progress(done, total)`` after each batch of windows.

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
    ) -> None:
        if blend not in BLENDS:
            raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
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

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """What ``network`` returns for the whole image: a tensor, a tuple or a dictionary of tensors.

        Args:
            inputs: (B, C, *spatial).
            network: called on (windows, C, *roi_size) with ``args`` and ``kwargs``. Its outputs may have another
                resolution than its input; each is stitched at its own.
        """
        image = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        roi_size = self._roi_size(image.shape[2:])
        padded, before = self._pad(image, roi_size)
        stitchers: list[_Stitcher] = []
        names: list[str] | None = None
        weight = self._weight(roi_size).to(image.device)
        overlap = self._overlap(len(roi_size))
        slices = [(b, w) for b in range(image.shape[0]) for w in windows(padded.shape[2:], roi_size, overlap)]
        for first in range(0, len(slices), self.batch_size):
            group = slices[first : first + self.batch_size]
            batch = torch.cat([padded[(slice(b, b + 1), slice(None), *window)] for b, window in group])
            if self.with_coordinates:
                coordinates = [[slice(b, b + 1), slice(None), *window] for b, window in group]
                result = network(batch, coordinates, *args, **kwargs)
            else:
                result = network(batch, *args, **kwargs)
            names, outputs = _flatten(result)
            batch_weight = weight
            if self.process is not None:
                outputs, batch_weight = self.process(outputs, batch, weight)
            if not stitchers:
                stitchers = [_Stitcher(o, padded.shape, roi_size, batch_weight, slices) for o in outputs]
            for stitcher, output in zip(stitchers, outputs, strict=True):
                stitcher.add(output, group, batch_weight)
            if self.progress is not None:
                self.progress(min(first + self.batch_size, len(slices)), len(slices))
        results = [_like(stitcher.result(before, image.shape[2:]), inputs) for stitcher in stitchers]
        return _unflatten(results, names)

    def label_map(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Class numbers (B, 1, *spatial): the argmax of the logits, ties to the lower class."""
        logits = self(inputs, network, *args, **kwargs)
        return logits.argmax(dim=1, keepdim=True).to(torch.uint8 if logits.shape[1] <= 256 else torch.int32)

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
        if self.padding_mode in ("reflect", "circular"):
            for axis, (gap, size) in enumerate(zip(missing, image.shape[2:], strict=True)):
                if gap - gap // 2 >= size + (self.padding_mode == "circular"):
                    raise ValueError(
                        f"{self.padding_mode} padding cannot grow axis {axis} from {size} to {roi_size[axis]} voxels: "
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


class _Stitcher:
    """Weighted sum of one output over all windows, at that output's own resolution."""

    def __init__(
        self,
        output: torch.Tensor,
        image_shape: Sequence[int],
        roi_size: Sequence[int],
        weight: torch.Tensor,
        slices: Sequence[tuple[int, tuple[slice, ...]]],
    ) -> None:
        self.scale = [out / roi for out, roi in zip(output.shape[2:], roi_size, strict=True)]
        self.shape = output.shape[2:]
        size = [int(length * scale) for length, scale in zip(image_shape[2:], self.scale, strict=True)]
        self.sum = torch.zeros((image_shape[0], output.shape[1], *size), device=output.device)
        self.weight_sum = torch.zeros(size, device=output.device)
        own_weight = self._at_own_resolution(weight)
        for b, window in slices:
            if b == 0:
                self.weight_sum[self._scaled(window)] += own_weight

    def add(self, output: torch.Tensor, group: Sequence[tuple[int, tuple[slice, ...]]], weight: torch.Tensor) -> None:
        own_weight = self._at_own_resolution(weight)
        for (b, window), part in zip(group, output, strict=True):
            self.sum[b][(slice(None), *self._scaled(window))].addcmul_(part.float(), own_weight)

    def result(self, before: Sequence[int], image_size: Sequence[int]) -> torch.Tensor:
        """The blended output without the padding."""
        blended = self.sum.div_(self.weight_sum)
        for axis, (b, size, scale) in enumerate(zip(before, image_size, self.scale, strict=True), start=2):
            start, stop = round(b * scale), round((b + size) * scale)
            blended = blended.narrow(axis, start, stop - start)
        return blended

    def _scaled(self, window: Sequence[slice]) -> tuple[slice, ...]:
        return tuple(
            slice(int(part.start * scale), int(part.stop * scale))
            for part, scale in zip(window, self.scale, strict=True)
        )

    def _at_own_resolution(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.reshape(weight.shape[-len(self.shape) :]).float()
        if weight.shape == self.shape:
            return weight
        return F.interpolate(weight[None, None], self.shape, mode="nearest-exact")[0, 0]


def _flatten(result: Any) -> tuple[list[str] | None, Sequence[torch.Tensor]]:
    if isinstance(result, Mapping):
        names = sorted(result)
        return names, [result[name] for name in names]
    return None, (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _unflatten(results: list[torch.Tensor], names: list[str] | None) -> Any:
    if names is not None:
        return dict(zip(names, results, strict=True))
    return results[0] if len(results) == 1 else tuple(results)


def _like(result: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The result with the metadata and the history of a MetaTensor input, so that MONAI can invert it."""
    if not hasattr(inputs, "copy_meta_from"):
        return result
    output: Any = type(inputs)(result)
    return output.copy_meta_from(inputs)
