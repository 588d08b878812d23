"""Test-time augmentation: a network sees each window and its mirror images, and its answers are averaged.

Shape legend: window_BC... are (batch, channels, *spatial axes), logits_BK... are (batch, classes, *spatial axes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import nn

from medseg3d.inference.averaging import Mean, check_average, check_logits
from medseg3d.inference.heads import joined, split_head
from medseg3d.inference.slabs import Head
from medseg3d.inference.slices import Networks, Slices, networks_of

THROUGH = -1  # the axis through the slices that a 2D network sees as channels

_SIDES = {"left": "left", "l": "left", "right": "right", "r": "right"}


class Flips(nn.Module):
    """A network that answers with the mean over a window's mirror images; it stands for the network in any strategy.

    The window is mirrored along every combination of ``axes`` (2 ** len(axes) of them, the window itself among them),
    the answers are mirrored back, and where the laterality axis was mirrored, left and right classes change places:
    what the network took for a left kidney in the mirror is the right one. Windows are done one at a time, so memory
    does not grow with the image. Mirror only along axes along which the network was trained to be mirrored: a heart
    on the right side is rare in training data.

    One mirror image after the other takes, beside what the network needs, one more window and two more tensors of
    logits (three for probabilities, and in float32); ``batched`` needs the network's memory for all of them at once.

    Where the network ends in a convolution of kernel 1, a strategy that applies it after blending still does. The mean
    of logits is the same then: features of mirror images whose left and right change places are summed apart. A mean of
    probabilities is then that of the blended logits of each mirror image.

    Args:
        network: called as ``network(window_BC, ...)``; returns logits (B, K, *spatial).
        axes: spatial axes to mirror, counted from 0; empty runs the network once. ``THROUGH`` is the one through the
            slices of a ``stack``.
        pairs: numbers of classes that are each other's mirror image, as (left, right); see :func:`side_pairs`.
        laterality_axis: the spatial axis from the patient's left to right, 0 where the orientation is RAS (or LAS).
        average: "logits", as nnU-Net does it, or "probabilities", see :class:`medseg3d.inference.averaging.Mean`.
        batched: all mirror images of a window go through the network at once.
        stack: of so many slices, one after another, are a window's channels; see :func:`mirrored_slices`.

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
        stack: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.training = getattr(network, "training", False)
        self.axes = tuple(axes)
        self.pairs = tuple((int(left), int(right)) for left, right in pairs)
        self.laterality_axis = laterality_axis
        self.average = check_average(average)
        self.batched = batched
        self.stack = stack
        self._orders: dict[tuple[int, torch.device], torch.Tensor] = {}
        if len(set(self.axes)) != len(self.axes) or min((*self.axes, laterality_axis)) < (THROUGH if stack > 1 else 0):
            raise ValueError(
                f"axes are different spatial axes counted from 0, got axes {self.axes} and laterality_axis "
                f"{laterality_axis}"
            )
        paired = list(chain(*self.pairs))
        if len(set(paired)) != len(paired) or min(paired, default=0) < 0:
            raise ValueError(f"a class has one mirror image and a number from 0, got pairs {self.pairs}")

    def forward(self, window_BC: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (B, K, *spatial) in the type and on the device of the network's own; ``args`` go to the network."""
        self._check(window_BC)
        mean = Mean(self.average)
        for mirrored, answer_BK in self._answers(self.network, window_BC, args, kwargs):
            mean.add(answer_BK, channels=self._order_for(answer_BK) if self._swaps(mirrored) else None)
        return mean.result()

    def without_head(self, window_BC: torch.Tensor) -> tuple[Callable, Head] | None:
        """See :mod:`medseg3d.inference.heads`."""
        self._check(window_BC)
        split = split_head(self.network, window_BC)
        if split is None:
            return None
        body, head = split
        # Mirror images of one group have one head, so that the mean of their features is enough.
        group_of = {axes: self._swaps(axes) if self.average == "logits" else axes for axes in self._mirror_images()}
        groups = {group: axes for axes, group in group_of.items()}
        heads = [self._exchanged(head) if self._swaps(axes) else head for axes in groups.values()]
        own = joined(heads, [1 / len(groups)] * len(groups), self.average)

        def features(window_BC: torch.Tensor) -> torch.Tensor:
            means = {group: Mean("logits") for group in groups}
            for mirrored, features_BF in self._answers(body, window_BC, (), {}):
                means[group_of[mirrored]].add(features_BF)
            return torch.cat([mean.result() for mean in means.values()], 1)

        return None if own is None else (features, own)

    def _check(self, window_BC: torch.Tensor) -> None:
        spatial = window_BC.dim() - 2
        if max((*self.axes, self.laterality_axis if self.pairs else 0)) >= spatial:
            raise ValueError(
                f"axes {self.axes} and laterality_axis {self.laterality_axis} must be below the window's {spatial} "
                f"spatial axes, its shape is {tuple(window_BC.shape)}"
            )

    def _mirror_images(self) -> list[tuple[int, ...]]:
        """The axes that are mirrored in each."""
        return [axes for count in range(len(self.axes) + 1) for axes in combinations(self.axes, count)]

    def _answers(
        self, network: Callable, window_BC: torch.Tensor, args: Any, kwargs: Any
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Pairs of mirrored axes and what a network makes of the mirror image, mirrored back."""
        images = self._mirror_images()
        answers: Iterable[torch.Tensor]
        if self.batched and (args or kwargs):
            raise ValueError("batched mirror images cannot share a window's further arguments: take batched=False")
        if self.batched:
            together = network(torch.cat([self._mirror(window_BC, axes) for axes in images]))
            answers = check_logits(together).split(len(window_BC))
        else:
            answers = (check_logits(network(self._mirror(window_BC, axes), *args, **kwargs)) for axes in images)
        for axes, answer_BK in zip(images, answers, strict=True):
            dims = [2 + axis for axis in axes if axis != THROUGH]  # an answer is of the slice in the middle
            yield axes, answer_BK.flip(dims) if dims else answer_BK

    def _mirror(self, window_BC: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """A copy, also along no axis: a network that writes into its input harms no other mirror image."""
        window_BC = window_BC.flip([2 + axis for axis in axes if axis != THROUGH])
        return window_BC.unflatten(1, (self.stack, -1)).flip(1).flatten(1, 2) if THROUGH in axes else window_BC

    def _swaps(self, mirrored: Sequence[int]) -> bool:
        """Whether left and right change places in this mirror image."""
        return bool(self.pairs) and self.laterality_axis in mirrored

    def _exchanged(self, head: Head) -> Head:
        """The head whose left classes are the right ones of this."""
        order = self._swapped(len(head.weight))
        return Head(head.weight[order], None if head.bias is None else head.bias[order])

    def _order_for(self, logits_BK: torch.Tensor) -> torch.Tensor:
        """``_swapped`` as a tensor beside the logits, sent there once: a GPU would wait for it at each window."""
        key = logits_BK.shape[1], logits_BK.device
        if key not in self._orders:
            with torch.inference_mode(False):  # it may be used with gradients later
                self._orders[key] = torch.tensor(self._swapped(key[0]), device=key[1])
        return self._orders[key]

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


def mirrored_slices(
    network: Networks, strategy: Slices, axes: Sequence[int], dims: int = 3, laterality_axis: int = 0, **options: Any
) -> Callable:
    """The networks of a strategy of slices with mirror images along ``axes`` of the volume.

    An axis within a slice mirrors the slice. The axis through the slices reverses the order of a slice and its
    neighbours; without neighbours a slice has no such mirror image, and the axis is left out there.

    Args:
        network: as ``strategy.slabs`` takes it.
        axes, laterality_axis: of the volume, counted from 0.
        dims: how many axes the volume has.
        options: further arguments of :class:`Flips`.

    Returns:
        What ``strategy`` takes in the place of ``network``.

    Raises:
        ValueError: there is nothing to mirror.
    """
    stack = 2 * strategy.neighbours + 1
    through = [axis % dims for axis in strategy.axes]
    flips = {}
    for slice_axis, own in zip(through, networks_of(network, through), strict=True):
        within = {axis: axis - (axis > slice_axis) for axis in range(dims) if axis != slice_axis}
        if stack > 1:
            within[slice_axis] = THROUGH
        chosen = [within[axis] for axis in axes if axis in within]
        laterality = {"laterality_axis": within[laterality_axis]} if laterality_axis in within else {"pairs": ()}
        flips[str(slice_axis)] = Flips(own, chosen, **{**options, **laterality}, stack=stack)
    if not any(one.axes for one in flips.values()):
        raise ValueError(
            f"slices along axis {through[0]} are the same in a mirror along it: take neighbours, or leave mirror out"
        )
    return nn.ModuleDict(flips) if len(flips) > 1 else next(iter(flips.values()))


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
