"""Where the entries of a map lie in the image that it was computed from, and how much of it they see.

Long, Shelhamer and Darrell's nets crop their maps onto each other; by how much follows from their layers alone. The
receptive field of Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks", Distill 2019.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sampling:
    """Along one axis: entry i is centred on pixel ``first + i * step`` and depends on ``field`` pixels about it.

    ``Sampling()`` is the image itself. What lies outside of the image counts: padding moves ``first`` below zero.
    """

    step: Fraction = Fraction(1)
    first: Fraction = Fraction(0)
    field: Fraction = Fraction(1)

    def windowed(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Sampling:
        """Behind a convolution or a pooling."""
        reach = dilation * (kernel - 1)
        first = self.first + self.step * (Fraction(reach, 2) - padding)
        return Sampling(self.step * stride, first, self.field + self.step * reach)

    def transposed(self, kernel: int, stride: int, padding: int = 0) -> Sampling:
        """Behind a transposed convolution; ``field`` is that of entries to which the most inputs contribute."""
        step = self.step / stride
        inputs = -(-kernel // stride)
        return Sampling(
            step, self.first - step * (Fraction(kernel - 1, 2) - padding), self.field + self.step * (inputs - 1)
        )

    def padded(self, entries: int) -> Sampling:
        """With so many entries more before the first."""
        return replace(self, first=self.first - self.step * entries)

    def through(self, *layers: nn.Module) -> Sampling:
        """Behind these layers, one behind the other.

        Children of a layer run one behind the other too, unless their names begin with "branch": those run side by
        side on the same grid, and the widest field counts.

        Raises:
            ValueError: a layer has other numbers for height than for width, or branches give different grids.
        """
        sampling = self
        for layer in layers:
            sampling = sampling._through_one(layer)
        return sampling

    def _through_one(self, layer: nn.Module) -> Sampling:
        if hasattr(layer, "kernel_size") and hasattr(layer, "stride"):
            kernel, stride = _one(layer, "kernel_size"), _one(layer, "stride")
            padding, dilation = _one(layer, "padding", 0), _one(layer, "dilation", 1)
            if getattr(layer, "transposed", False):
                return self.transposed(dilation * (kernel - 1) + 1, stride, padding)
            return self.windowed(kernel, stride, padding, dilation)
        branches = [child for name, child in layer.named_children() if name.startswith("branch")]
        if not branches:
            return self.through(*layer.children())
        ends = [self.through(branch) for branch in branches]
        if len({(end.step, end.first) for end in ends}) > 1:
            raise ValueError(f"the branches of {type(layer).__name__} give maps on different grids: {ends}")
        return max(ends, key=lambda end: end.field)

    def offset_of(self, reference: Sampling) -> int:
        """The entry that coincides with the first one of ``reference``: negative if it lies before this map.

        Raises:
            ValueError: the steps differ, or entries of one lie between those of the other.
        """
        offset = (reference.first - self.first) / self.step
        if self.step != reference.step or offset.denominator != 1:
            raise ValueError(f"entries of {self} and {reference} do not coincide")
        return int(offset)

    def meets(self, reference: Sampling) -> bool:
        """Whether entries of one coincide with entries of the other."""
        return self.step == reference.step and ((reference.first - self.first) / self.step).denominator == 1


def receptive_field(layers: nn.Module | Iterable[nn.Module]) -> int:
    """Pixels along an axis that an entry behind these layers depends on; ``Sampling.through`` says how they run."""
    return int(Sampling().through(*([layers] if isinstance(layers, nn.Module) else layers)).field)


def _one(layer: Any, name: str, default: int = 0) -> int:
    """An argument of a layer that is the same for every axis."""
    value = getattr(layer, name, default)
    values = set(value) if isinstance(value, tuple | list) else {value}
    if len(values) != 1 or not all(isinstance(number, int) for number in values):
        raise ValueError(f"{name} of {layer} must be one number for all axes")
    return int(values.pop())
