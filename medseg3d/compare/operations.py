"""How many operations a strategy's windows take, from their shapes alone.

Shape legend: image_BC... is (1, channels, *spatial axes), window_BC... what a network gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from medseg3d.flops import count_operations
from medseg3d.inference import CoarseToFine, OverlapTile
from medseg3d.inference.strategy import Strategy

Shape = tuple[int, ...]


class Operations:
    """Operations of one network, or of one for each axis, in a strategy.

    Args:
        network: as the strategy takes it.
        strategy: None if it is not known, which counts nothing.

    Attributes:
        of_noise: whether a network was counted on random values, since its work depends on what it sees.
    """

    def __init__(self, network: nn.Module, strategy: Strategy | None) -> None:
        self.network = network
        self.strategy = strategy
        self.of_noise = False
        self._of_window: dict[tuple[str, Shape], int] = {}

    def count(self, image_BC: torch.Tensor) -> tuple[int, int] | None:
        """(windows, FLOPs) of an image; None where no windows are known before the network has seen them.

        A network that stands in goes through the strategy and notes the shapes it is given. The head that medseg3d
        may take off, resampling and blending are not counted.

        Raises:
            ValueError: the network does not take such windows.
        """
        strategy = self.strategy
        if strategy is None or isinstance(strategy, CoarseToFine):
            return None
        shapes: Counter[tuple[str, Shape]] = Counter()
        stand_in: Any = partial(self._note, shapes, "")
        if isinstance(self.network, nn.ModuleDict):
            stand_in = {axis: partial(self._note, shapes, axis) for axis in self.network}
        elif isinstance(self.network, nn.ModuleList):
            stand_in = [partial(self._note, shapes, str(n)) for n in range(len(self.network))]
        for _ in strategy.slabs(image_BC, stand_in):
            pass
        return sum(shapes.values()), sum(times * self._flops(*one) for one, times in shapes.items())

    def _note(self, shapes: Counter[tuple[str, Shape]], which: str, window_BC: torch.Tensor, *_: Any) -> torch.Tensor:
        """Zeros of two classes, the fewest that slices are fused of, as large as what the network would give."""
        shapes[which, tuple(window_BC.shape[1:])] += len(window_BC)
        size = window_BC.shape[2:]
        if isinstance(self.strategy, OverlapTile):
            given = self.strategy.output_size
            size = torch.Size([given] * len(size) if isinstance(given, int) else given)
        return window_BC.new_zeros(1).expand(len(window_BC), 2, *size)

    def _flops(self, which: str, shape: Shape) -> int:
        if (which, shape) not in self._of_window:
            network = self.network.get_submodule(which)  # the network itself where it has no name
            counted = count_operations(network, (1, *shape))
            self.of_noise = self.of_noise or not counted.on_meta
            self._of_window[which, shape] = counted.flops
        return self._of_window[which, shape]


class Watched:
    """A preprocessing that remembers the last image it made, so that nobody needs to make it again."""

    def __init__(self, preprocessing: Callable) -> None:
        self.preprocessing = preprocessing
        self.image: Any = None

    def __call__(self, data: Any) -> Any:
        made = self.preprocessing(data)
        self.image = made["image"]
        return made
