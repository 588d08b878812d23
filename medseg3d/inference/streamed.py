"""Strategies whose logits are no more than their slabs put side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from medseg3d.inference.slabs import Slab
from medseg3d.inference.strategy import Strategy, like, some_images


class Streamed(Strategy):
    """A strategy that is defined by its slabs: its logits and its labels follow from them."""

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (B, K, *spatial), float32, of images (B, C, *spatial); arguments and errors as for ``slabs``.

        The metadata and the history of a MetaTensor come along.
        """
        images = some_images(inputs)
        logits: torch.Tensor | None = None
        for number in range(len(images)):
            for slab in self.slabs(images[number : number + 1], network, *args, **kwargs):
                if logits is None:
                    shape = (len(images), slab.classes, *images.shape[2:])
                    logits = torch.empty(shape, device=slab.values.device)
                logits[number][(slice(None), *slab.place)] = slab.logits()
        assert logits is not None
        return like(logits, inputs)


def slice_slabs(axis: int, start: int, values: torch.Tensor) -> list[Slab]:
    """Slabs of one slice each from slices (N, C, *plane): their memory is then as it lies, whatever the axis."""
    return [Slab(axis, start + n, one.unsqueeze(1 + axis)) for n, one in enumerate(values)]
