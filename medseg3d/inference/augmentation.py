"""Test-time augmentation: a network sees each window and its mirror images, and its answers are averaged.

Shape legend: window_BC... are (batch, channels, *spatial axes), logits_BK... are (batch, classes, *spatial axes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import torch

from medseg3d.inference.averaging import Mean, check_average, check_logits

_SIDES = {"left": "left", "l": "left", "right": "right", "r": "right"}


class Flips:
    """A network that answers with the mean over a window's mirror images; it stands for the network in any strategy.

    The window is mirrored along every combination of ``axes`` (2 ** len(axes) of them, the window itself among them),
    the answers are mirrored back, and where the laterality axis was mirrored, left and right classes change places:
    what the network took for a left kidney in the mirror is the right one. Windows are done one at a time, so memory
    does not grow with the image. Mirror only along axes along which the network was trained to be mirrored: a heart
    on the right side is rare in training data.

    One mirror image after the other takes, beside what the network needs, one more window and two more tensors of
    logits (three for probabilities, and in float32); ``batched`` needs the network's memory for all of them at once.

    Args:
        network: called as ``network(window_BC, ...)``; returns logits (B, K, *spatial).
        axes: spatial axes to mirror, counted from 0; empty runs the network once.
        pairs: numbers of classes that are each other's mirror image, as (left, right); see :func:`side_pairs`.
        laterality_axis: the spatial axis from the patient's left to right, 0 where the orientation is RAS (or LAS).
        average: "logits", as nnU-Net does it, or "probabilities", see :class:`medseg3d.inference.averaging.Mean`.
        batched: all mirror images of a window go through the network at once.

    Raises:
        ValueError: axes or pairs are impossible; when called, if they do not fit the window or the network's classes.
    """

    def __init__(
        self,
        network: Callable,
        axes: Sequence[int],
        pairs: Sequence[tuple[int, int]] = (),
        laterality_axis: int = 0,
        average: str = "logits",
        batched: bool = False,
    ) -> None:
        self.network = network
        self.axes = tuple(axes)
        self.pairs = tuple((int(left), int(right)) for left, right in pairs)
        self.laterality_axis = laterality_axis
        self.average = check_average(average)
        self.batched = batched
        if len(set(self.axes)) != len(self.axes) or min((*self.axes, laterality_axis)) < 0:
            raise ValueError(
                f"axes are different spatial axes counted from 0, got axes {self.axes} and laterality_axis "
                f"{laterality_axis}"
            )
        paired = list(chain(*self.pairs))
        if len(set(paired)) != len(paired) or min(paired, default=0) < 0:
            raise ValueError(f"a class has one mirror image and a number from 0, got pairs {self.pairs}")

    def __call__(self, window_BC: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (B, K, *spatial) in the type and on the device of the network's own; ``args`` go to the network."""
        spatial = window_BC.dim() - 2
        if max((*self.axes, self.laterality_axis if self.pairs else 0)) >= spatial:
            raise ValueError(
                f"axes {self.axes} and laterality_axis {self.laterality_axis} must be below the window's {spatial} "
                f"spatial axes, its shape is {tuple(window_BC.shape)}"
            )
        mean = Mean(self.average)
        for mirrored, logits_BK in self._answers(window_BC, args, kwargs):
            swap = bool(self.pairs) and self.laterality_axis in mirrored
            answer_BK = _mirror(logits_BK, mirrored) if mirrored else logits_BK
            mean.add(answer_BK, channels=self._swapped(logits_BK.shape[1]) if swap else None)
        return mean.result()

    def _answers(
        self, window_BC: torch.Tensor, args: Any, kwargs: Any
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Pairs of mirrored axes and what the network makes of the mirror image."""
        sets = [axes for count in range(len(self.axes) + 1) for axes in combinations(self.axes, count)]
        if not self.batched:
            for axes in sets:
                yield axes, check_logits(self.network(_mirror(window_BC, axes), *args, **kwargs))
            return
        if args or kwargs:
            raise ValueError("batched mirror images cannot share a window's further arguments: take batched=False")
        logits_BK = check_logits(self.network(torch.cat([_mirror(window_BC, axes) for axes in sets])))
        yield from zip(sets, logits_BK.split(len(window_BC)), strict=True)

    def _swapped(self, classes: int) -> list[int]:
        """For each class, the class that it is in the mirror."""
        if max(chain(*self.pairs)) >= classes:
            raise ValueError(
                f"pairs {self.pairs} name classes that the network does not have: it gives 0 to {classes - 1}"
            )
        order = list(range(classes))
        for left, right in self.pairs:
            order[left], order[right] = right, left
        return order


def side_pairs(names: Mapping[int, str]) -> tuple[tuple[int, int], ...]:
    """Pairs (left, right) of labels whose names differ in the side only, such as "kidney_left" and "kidney_right".

    A side is the word left or right, or the letter L or R, in any case, set apart by a space or punctuation. Names of
    which the other side is missing are left out.

    Raises:
        ValueError: two labels have the same side of the same name.
    """
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for label, name in names.items():
        words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
        sides = [number for number, word in enumerate(words) if word in _SIDES]
        if len(sides) != 1:
            continue
        side = _SIDES[words[sides[0]]]
        labels = found.setdefault((*words[: sides[0]], "", *words[sides[0] + 1 :]), {})
        if side in labels:
            raise ValueError(f"labels {labels[side]} and {label} are both the {side} side of {name!r}: rename one")
        labels[side] = label
    return tuple((labels["left"], labels["right"]) for labels in found.values() if len(labels) == 2)


def _mirror(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """A copy, also along no axis: a network that writes into its input harms no other mirror image."""
    return x.flip([2 + axis for axis in axes])
