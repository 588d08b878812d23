"""Coarse to fine with fixed-point iteration: where an organ was found, networks look again, closer.

The rules are those of Zhou et al., MICCAI 2017 (A fixed-point model for pancreas segmentation in abdominal CT scans,
sections 2.2 and 2.3), for one organ and any networks.

Shape legend: image_C... is (channels, *spatial axes), N slices, ``*plane`` the axes within a slice; masks are bool and
have the image's spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg3d.inference.fusion import LEAST, fused_mask, keep_seeded
from medseg3d.inference.slabs import Slab
from medseg3d.inference.slices import Slices, networks_of
from medseg3d.inference.strategy import one_image
from medseg3d.inference.streamed import Streamed
from medseg3d.inference.windows import Window

Boxes = dict[int, Window]


@dataclass(frozen=True)
class Round:
    """What one round found.

    Attributes:
        number: 0 for the coarse round, then from 1 on.
        mask: the organ.
        dice: of this mask and that of the round before, in [0, 1]; nan for the coarse round.
    """

    number: int
    mask: np.ndarray
    dice: float


class CoarseToFine(Streamed):
    """Coarse networks find an organ in whole slices, fine ones segment it in crops, until the mask stays as it is.

    Coarse round: each axis' mask is where its probability is 0.5 or more; of the voxels with a majority of votes, those
    pieces are kept that hold the most certain voxels and are not small. Fine rounds: every slice is cropped to the box
    of the last mask in it and its neighbours, with a margin; slices without any are skipped; the mean over axes is 0.5
    or more, and small pieces are dropped. An empty mask stays empty.

    Networks return (N, 1, *plane), a logit of the organ; or (N, 2, *plane), those of background and organ; or, as in
    the paper, (N, 2 * neighbours + 1, *plane), the organ's logit in each slice of the stack they saw. A slice then has
    the mean of the stacks it is in, of those that exist in the coarse round and of all in fine ones, where a skipped
    stack counts as 0.

    Args:
        slices: axes, neighbours, padding and windows of both networks; by default all three axes with one neighbour on
            each side. Its ``fusion`` and ``progress`` are not used.
        margin: voxels around the organ's box, on each side.
        min_share: pieces smaller than this share of the largest are dropped, in [0, 1].
        threshold: Dice of two rounds at which the iteration stops, in [0, 1].
        max_rounds: fine rounds at most; 0 is the coarse round alone.
        progress: called as ``progress(done, total)`` after each round, ``total`` being the most there can be.

    Raises:
        ValueError: on arguments out of range.
    """

    def __init__(
        self,
        slices: Slices | None = None,
        margin: int = 20,
        min_share: float = 0.5,
        threshold: float = 0.95,
        max_rounds: int = 10,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        for name, value in (("margin", margin), ("max_rounds", max_rounds)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        for name, share in (("min_share", min_share), ("threshold", threshold)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        self.slices = Slices((0, 1, 2), neighbours=1) if slices is None else slices
        self.margin = margin
        self.min_share = min_share
        self.threshold = threshold
        self.max_rounds = max_rounds
        self.progress = progress

    def slabs(self, image_BC: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The last round's mask of one image (1, C, *spatial) as logits of two classes, of which one is certain.

        Arguments and errors as for :meth:`rounds`.
        """
        *_, last = self.rounds(image_BC, network, *args, **kwargs)
        for start, mask in enumerate(torch.from_numpy(last.mask)):
            logits = torch.stack([~mask, mask]).float().clamp_(min=LEAST).log_()
            yield Slab(0, start, logits[:, None].to(image_BC.device))

    def count(self, image_size: Sequence[int]) -> int:
        """Slices at most: all of them in each round, though fine ones skip and crop."""
        axes = len(image_size)
        return (1 + self.max_rounds) * sum(image_size[axis % axes] for axis in self.slices.axes)

    def rounds(self, image_BC: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Iterator[Round]:
        """Round after round of one image (1, C, *spatial).

        Args:
            image_BC: one image of two spatial axes or more.
            network: a mapping with "coarse" and "fine", each of which is one network for all axes, or a sequence or
                mapping with one an axis; or any of these for both rounds.

        Raises:
            ValueError: there is more than one image, the networks are not as many as axes, or a network does not
                return what the class says.
        """
        image = one_image(image_BC)
        axes = self.slices.axes_of(image)
        coarse, fine = (networks_of(one, axes) for one in _coarse_and_fine(network))
        masks = []
        for axis, own in zip(axes, coarse, strict=True):
            masks.append(self._look(image, own, axis, _whole_planes(image, axis), False, *args, **kwargs) >= 0.5)
        latest = Round(0, fused_mask(masks, self.min_share), float("nan"))
        yield self._told(latest)
        while latest.number < self.max_rounds and not latest.dice >= self.threshold:
            votes = np.zeros(latest.mask.shape, np.float32)
            for axis, own in zip(axes, fine, strict=True):
                boxes = slice_boxes(latest.mask, axis, self.slices.neighbours, self.margin)
                votes += self._look(image, own, axis, boxes, True, *args, **kwargs)
            mask = votes >= 0.5 * len(axes)
            mask = keep_seeded(mask, mask, self.min_share)
            latest = Round(latest.number + 1, mask, dice(mask, latest.mask))
            yield self._told(latest)

    def _look(
        self, image: torch.Tensor, network: Callable, axis: int, boxes: Boxes, fade: bool, *args: Any, **kwargs: Any
    ) -> np.ndarray:
        """The organ's probability by one network in the boxes of the slices along an axis, 0 elsewhere.

        Where networks see to whole stacks, a slice has the mean of those that were predicted, or with ``fade`` their
        sum over the number there could be.
        """
        total = torch.zeros(image.shape[1:], device=image.device)
        slices = total.movedim(axis, 0)
        counts = torch.zeros([len(slices), *[1] * (total.dim() - 1)], device=image.device)
        for box, numbers in _batches(boxes, self.slices.batch_size):
            place = (slice(None), *box[:axis], slice(None), *box[axis:])
            logits = self.slices.planes(image[place], network, axis, torch.tensor(numbers), *args, **kwargs)
            for number, organ in zip(numbers, self._probability(logits).to(total.device), strict=True):
                first = number - len(organ) // 2
                for n in range(max(first, 0), min(first + len(organ), len(slices))):
                    slices[n][box] += organ[n - first]
                    counts[n] = len(organ) if fade else counts[n] + 1
        slices /= counts.clamp(min=1)
        return total.cpu().numpy()

    def _probability(self, logits: torch.Tensor) -> torch.Tensor:
        """The organ's probability in a slice (N, 1, *plane), or in each slice of its stack (N, S, *plane)."""
        channels, stack = logits.shape[1], 2 * self.slices.neighbours + 1
        if channels not in (1, 2, stack):
            raise ValueError(
                f"coarse to fine is for one organ: a network must return 1 or 2 channels, or one for each of the "
                f"{stack} slices it sees, got {channels}"
            )
        logits = logits.detach()
        if logits.isnan().any():
            raise ValueError("the network's output is not a number at some voxels: its weights or its input are broken")
        return logits.softmax(1)[:, 1:] if channels == 2 else logits.sigmoid()

    def _told(self, latest: Round) -> Round:
        if self.progress is not None:
            self.progress(latest.number + 1, self.max_rounds + 1)
        return latest


def slice_boxes(mask: np.ndarray, axis: int, neighbours: int = 1, margin: int = 20) -> Boxes:
    """Where to look in each slice along ``axis``: the box of the mask in it and its neighbours, made larger.

    Args:
        mask: (...) bool.
        axis: along which the slices follow each other.
        neighbours: slices on each side whose mask counts too.
        margin: voxels added on each side, as far as the image goes.

    Returns:
        For each slice that has any mask in its stack the ranges along the other axes, in the image's order.
    """
    profiles = []  # for each other axis: which of its voxels are in the mask, slice by slice
    for other in range(mask.ndim):
        if other != axis:
            profile = np.any(mask, axis=tuple(a for a in range(mask.ndim) if a not in (axis, other)))
            profiles.append(profile if axis < other else profile.T)
    boxes = {}
    for number in range(mask.shape[axis]):
        stack = slice(max(number - neighbours, 0), number + neighbours + 1)
        used = [np.flatnonzero(profile[stack].any(axis=0)) for profile in profiles]
        if used[0].size:
            boxes[number] = tuple(
                slice(max(int(voxels[0]) - margin, 0), min(int(voxels[-1]) + 1 + margin, profile.shape[1]))
                for voxels, profile in zip(used, profiles, strict=True)
            )
    return boxes


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two bool masks, in [0, 1]; 1 if both are empty, since nothing changes any more."""
    both = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero(one & other) / both if both else 1.0


def _whole_planes(image: torch.Tensor, axis: int) -> Boxes:
    plane = tuple(slice(0, size) for other, size in enumerate(image.shape[1:]) if other != axis)
    return dict.fromkeys(range(image.shape[1 + axis]), plane)


def _batches(boxes: Boxes, size: int) -> Iterator[tuple[Window, list[int]]]:
    """Slices of the same box that follow each other, at most so many at a time."""
    for box, group in groupby(boxes, key=boxes.__getitem__):
        numbers = list(group)
        for first in range(0, len(numbers), size):
            yield box, numbers[first : first + size]


def _coarse_and_fine(network: Any) -> tuple[Any, Any]:
    if isinstance(network, Mapping | nn.ModuleDict) and {"coarse", "fine"} & set(network):
        if set(network) != {"coarse", "fine"}:
            raise ValueError(f"networks must be named coarse and fine, got {', '.join(map(str, network))}")
        return network["coarse"], network["fine"]
    return network, network
