"""Slices of volumes as training pictures for 2D networks.

Shape legend: a volume is (C, D, H, W), a slice ((2k + 1) * C, rows, columns) with its k neighbours on each side.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from monai.utils import ensure_tuple


class RandSliced(MapTransform, Randomizable):
    """A window of a slice, along an axis drawn at random, through a voxel of a class drawn at random.

    Channels of the images are slices -k to +k around the window's, as :class:`medseg3d.inference.Slices` hands them to
    a network, the last one repeated beyond the volume. Label maps give the middle slice. Rows and columns are the two
    other axes in the volume's order.

    Args:
        keys: images and label maps, each (C, D, H, W), of one shape.
        size: rows and columns of the window; what lies outside of the volume is filled.
        label_keys: those of ``keys`` that hold label numbers; they are filled with background.
        axes: spatial axes to draw from, each as often.
        neighbours: k.
        fill: value of images outside of the volume.
        ratios: how often each class is drawn; by default all that the volume has, as often as each other.
        indices_key: flat indices of the voxels of each class, as ``ClassesToIndicesd`` leaves them; the key is removed.

    Raises:
        ValueError: on arguments out of range, or a number of ratios that is not that of the classes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int],
        label_keys: KeysCollection = (),
        axes: Sequence[int] = (0, 1, 2),
        neighbours: int = 0,
        fill: float = 0.0,
        ratios: Sequence[float] | None = None,
        indices_key: str = "label_cls_indices",
    ) -> None:
        super().__init__(keys)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be rows and columns, 1 or more each, got {size}")
        if neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, got {neighbours}")
        if not axes or not all(axis in (0, 1, 2) for axis in axes):
            raise ValueError(f"axes must be one or more of 0, 1 and 2, got {axes}")
        self.size = tuple(size)
        self.label_keys = ensure_tuple(label_keys)
        self.axes = tuple(axes)
        self.neighbours = neighbours
        self.fill = fill
        self.ratios = ratios
        self.indices_key = indices_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        shape = tuple(output[self.keys[0]].shape[1:])
        axis = self.axes[self.R.randint(len(self.axes))]
        centre = self._voxel(output.pop(self.indices_key), shape)
        for key in self.keys:
            labels = key in self.label_keys
            output[key] = self._window(torch.as_tensor(output[key]), axis, centre, labels)
        return output

    def _voxel(self, indices: Sequence[Any], shape: Sequence[int]) -> list[int]:
        ratios = [1.0] * len(indices) if self.ratios is None else list(self.ratios)
        if len(ratios) != len(indices):
            raise ValueError(f"ratios has {len(ratios)} entries, but there are {len(indices)} classes: give each one")
        shares = [ratio if len(own) else 0.0 for ratio, own in zip(ratios, indices, strict=True)]
        if not sum(shares):
            return [self.R.randint(length) for length in shape]
        own = indices[self.R.choice(len(shares), p=[share / sum(shares) for share in shares])]
        flat = int(own[self.R.randint(len(own))])
        return [int(index) for index in np.unravel_index(flat, tuple(shape))]

    def _window(self, volume: torch.Tensor, axis: int, centre: Sequence[int], labels: bool) -> torch.Tensor:
        reach = 0 if labels else self.neighbours
        wanted = torch.arange(centre[axis] - reach, centre[axis] + reach + 1, device=volume.device)
        stack = volume.index_select(1 + axis, wanted.clamp(0, volume.shape[1 + axis] - 1))
        stack = stack.movedim(1 + axis, 0).flatten(0, 1)
        middle = [centre[other] for other in range(3) if other != axis]
        fill = 0 if labels else self.fill
        window = torch.full((len(stack), *self.size), fill, dtype=stack.dtype, device=stack.device)
        source, target = [slice(None)], [slice(None)]
        for at, length, size in zip(middle, stack.shape[1:], self.size, strict=True):
            start = _start(at, length, size)
            first, last = max(start, 0), min(start + size, length)
            source.append(slice(first, last))
            target.append(slice(first - start, last - start))
        window[tuple(target)] = stack[tuple(source)]
        return window


def _start(centre: int, length: int, size: int) -> int:
    """Where a window begins: within the axis if it fits, else around all of it."""
    if size >= length:
        return (length - size) // 2
    return min(max(centre - size // 2, 0), length - size)
