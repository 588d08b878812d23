"""Overlap-tile: networks whose output is smaller than their input (Ronneberger et al., "U-Net", 2015, figure 2).

Shape legend: image_C... is (channels, *spatial axes), K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from medseg3d.inference.slabs import Slab
from medseg3d.inference.strategy import one_image
from medseg3d.inference.streamed import Streamed


class OverlapTile(Streamed):
    """Tiles overlap so far that their outputs lie side by side, each voxel segmented once; a MONAI ``Inferer``.

    What a tile lacks beyond the image's edge is the image mirrored at the edge voxel, as often as it takes.

    Args:
        tile_size: input of the network, one for each spatial axis (or one for all).
        output_size: of the network for that input; what it lost at both ends of an axis must be the same. The U-Net
            of the paper takes 572 and gives 388.
        batch_size: tiles that the network gets at a time.
        progress: called as ``progress(done, total)`` after each tile row of one image.

    Raises:
        ValueError: sizes below 1, an output larger than its tile or one that does not lie in its middle.
    """

    def __init__(
        self,
        tile_size: int | Sequence[int],
        output_size: int | Sequence[int],
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.tile_size, self.output_size = tile_size, output_size
        tiles, outputs = np.atleast_1d(tile_size), np.atleast_1d(output_size)
        lost = tiles - outputs
        if (outputs < 1).any() or (lost < 0).any() or (lost % 2).any():
            raise ValueError(
                "an output is as large as its tile or an even number of voxels smaller along every axis, "
                f"got outputs of {output_size} from tiles of {tile_size}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.batch_size = batch_size
        self.progress = progress

    def count(self, image_size: Sequence[int]) -> int:
        _, outputs = self._sizes(len(image_size))
        return int(np.prod([-(-size // output) for size, output in zip(image_size, outputs, strict=True)]))

    def blending(self, image_size: Sequence[int], channels: int) -> tuple[int, int]:
        """One row of tiles."""
        _, outputs = self._sizes(len(image_size))
        voxels = int(min(outputs[0], image_size[0]) * np.prod(image_size[1:]))
        return voxels * channels * 4, voxels

    def slabs(self, image_BC: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The segmented image (1, C, *spatial), a row of tiles a slab, along the first axis.

        Args:
            image_BC: one image.
            network: called on (batch, C, *tile_size) with ``args`` and ``kwargs``; returns (batch, K, *output_size).

        Raises:
            ValueError: more than one image, another number of axes, or the network returns something else.
        """
        image = one_image(image_BC)
        size = image.shape[1:]
        tiles, outputs = self._sizes(len(size))
        # Which voxels of the image each tile of an axis sees, mirrored at the edges.
        seen = [
            _mirrored(length, tile, output, image.device)
            for length, tile, output in zip(size, tiles, outputs, strict=True)
        ]
        for row, rows in enumerate(seen[0]):
            start = row * outputs[0]
            stop = min(start + outputs[0], size[0])
            values: torch.Tensor | None = None
            places = list(product(*(range(len(axis)) for axis in seen[1:])))
            for first in range(0, len(places), self.batch_size):
                some = places[first : first + self.batch_size]
                indices = [[rows, *(axis[n] for axis, n in zip(seen[1:], place, strict=True))] for place in some]
                batch = torch.stack([_take(image, index) for index in indices])
                logits = self._checked(network(batch, *args, **kwargs), len(some), outputs)
                if values is None:
                    values = logits.new_empty((logits.shape[1], stop - start, *size[1:]))
                for found, place in zip(logits, some, strict=True):
                    into = values[(slice(None), slice(None), *self._within(place, outputs[1:]))]
                    into.copy_(found[tuple(slice(0, length) for length in (len(found), *into.shape[1:]))])
            assert values is not None
            yield Slab(0, start, values)
            if self.progress is not None:
                self.progress(row + 1, len(seen[0]))

    def _sizes(self, axes: int) -> tuple[list[int], list[int]]:
        both = []
        for name, size in (("tile_size", self.tile_size), ("output_size", self.output_size)):
            sizes = [size] * axes if isinstance(size, int) else [int(n) for n in size]
            if len(sizes) != axes:
                raise ValueError(f"{name} {size} is for {len(sizes)} spatial axes, but the image has {axes}")
            both.append(sizes)
        return both[0], both[1]

    @staticmethod
    def _within(place: Sequence[int], outputs: Sequence[int]) -> Iterator[slice]:
        return (slice(n * output, (n + 1) * output) for n, output in zip(place, outputs, strict=True))

    def _checked(self, logits: Any, count: int, outputs: Sequence[int]) -> torch.Tensor:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if not isinstance(logits, torch.Tensor) or (len(logits), *logits.shape[2:]) != (count, *outputs):
            raise ValueError(
                f"tiles of {self.tile_size} must give logits ({count}, K, {', '.join(map(str, outputs))}), the network "
                f"gave {got}: set output_size to what it gives"
            )
        return logits.detach()


def _mirrored(length: int, tile: int, output: int, device: torch.device) -> list[torch.Tensor]:
    """For each tile along an axis of ``length`` voxels the index of every voxel it sees."""
    margin, count = (tile - output) // 2, -(-length // output)
    index = np.pad(np.arange(length), (margin, margin + count * output - length), mode="reflect")
    return [torch.from_numpy(index[n * output : n * output + tile].copy()).to(device) for n in range(count)]


def _take(image_C: torch.Tensor, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    for axis, index in enumerate(indices, start=1):
        image_C = image_C.index_select(axis, index)
    return image_C
