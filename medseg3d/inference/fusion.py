"""What becomes of a voxel that networks along several axes have segmented: their results are fused.

For any number of classes there are the mean of the probabilities and the majority vote. For one organ there are the
rules of Zhou et al., MICCAI 2017 (A fixed-point model for pancreas segmentation in abdominal CT scans, section 2):
masks of at least 1, 2 or 3 votes, and a clean-up by the voxels that are most certain.

Shape legend: N slices along an axis, K classes, ``*plane`` the axes within a slice, ... spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from medseg3d.inference.slabs import largest

FUSIONS = ("mean", "majority")

# The least share whose logarithm is taken, so that it stays a finite number.
LEAST = torch.finfo(torch.float32).tiny


class MeanProbability:
    """Mean over axes of the softmax probabilities.

    Args:
        axes: how many axes are fused.
        size: of the image.
        dtype: of the sum of K x volume.
        device: where it is kept; by default where the first logits are.
    """

    def __init__(self, axes: int, size: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.axes = axes
        self.size = tuple(size)
        self.dtype = dtype
        self.device = device
        self.sum: torch.Tensor | None = None

    def add(self, axis: int, start: int, logits_NK: torch.Tensor) -> None:
        """Count what the network of one axis, but the last, says of slices (N, K, *plane)."""
        own = self._probabilities(logits_NK)
        if self.sum is None:
            self.sum = torch.zeros((own.shape[1], *self.size), dtype=self.dtype, device=own.device)
        self._slices(axis, start, own).add_(own)

    def finish(self, axis: int, start: int, logits_NK: torch.Tensor) -> torch.Tensor:
        """Logarithm (N, K, *plane) of the mean over all axes, from the logits of the last one."""
        own = self._probabilities(logits_NK)
        return own.add_(self._slices(axis, start, own)).div_(self.axes).clamp_(min=LEAST).log_()

    def _probabilities(self, logits_NK: torch.Tensor) -> torch.Tensor:
        _require_classes(logits_NK, None if self.sum is None else len(self.sum))
        return logits_NK.detach().softmax(1).to(self.device or logits_NK.device)

    def _slices(self, axis: int, start: int, own: torch.Tensor) -> torch.Tensor:
        assert self.sum is not None
        return self.sum.movedim(1 + axis, 0)[start : start + len(own)]


class MajorityVote:
    """The class that most axes vote for; a tie goes to the lower class.

    Args:
        size: of the image.
        device: where label maps are kept, one an axis but the last; by default where the first logits are.
    """

    def __init__(self, size: Sequence[int], device: torch.device | None = None) -> None:
        self.size = tuple(size)
        self.device = device
        self.classes: int | None = None
        self.votes: dict[int, torch.Tensor] = {}

    def add(self, axis: int, start: int, logits_NK: torch.Tensor) -> None:
        """Take the votes of one axis, but the last, from slices (N, K, *plane)."""
        own = self._labels(logits_NK)
        if axis not in self.votes:
            self.votes[axis] = torch.empty(self.size, dtype=own.dtype, device=own.device)
        self.votes[axis].movedim(axis, 0)[start : start + len(own)] = own

    def finish(self, axis: int, start: int, logits_NK: torch.Tensor) -> torch.Tensor:
        """Logarithm (N, K, *plane) of each class' share of the votes, the last axis being that of the logits."""
        own = self._labels(logits_NK)
        others = [labels.movedim(axis, 0)[start : start + len(own)] for labels in self.votes.values()]
        votes = torch.stack([*others, own], dim=1).long()
        agreeing = (votes[:, :, None] == votes[:, None]).sum(1)
        shares = torch.full(logits_NK.shape, LEAST, device=own.device)
        return shares.scatter_(1, votes, agreeing / votes.shape[1]).log_()

    def _labels(self, logits_NK: torch.Tensor) -> torch.Tensor:
        _require_classes(logits_NK, self.classes)
        self.classes = logits_NK.shape[1]
        labels = torch.stack([largest(one.flatten(1))[0].view(one.shape[1:]) for one in logits_NK.detach()])
        return labels.to(self.device or labels.device)


def fusion_of(
    name: str, axes: int, size: Sequence[int], dtype: torch.dtype, device: torch.device | None
) -> MeanProbability | MajorityVote:
    """The fusion of that name, one of `FUSIONS`, for one image."""
    assert name in FUSIONS
    return MeanProbability(axes, size, dtype, device) if name == "mean" else MajorityVote(size, device)


def _require_classes(logits_NK: torch.Tensor, expected: int | None) -> None:
    classes = logits_NK.shape[1]
    if classes < 2:
        raise ValueError(f"axes are fused class by class, for two classes or more, but the network has only {classes}")
    if expected not in (None, classes):
        raise ValueError(f"networks of all axes must have the same classes, got {expected} and {classes}")


def at_least(votes: int, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Bool mask of the voxels that are set in so many of the masks or more: F1, F2 and F3 of the paper."""
    count = np.zeros(masks[0].shape, np.uint8)
    for mask in masks:
        count += mask.astype(bool)
    return count >= votes


def strictest(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Voxels set in all of the masks; if there are none in all but one, and so on."""
    for votes in range(len(masks), 1, -1):
        mask = at_least(votes, masks)
        if mask.any():
            return mask
    return at_least(1, masks)


def keep_seeded(mask: np.ndarray, seeds: np.ndarray, min_share: float = 0.5) -> np.ndarray:
    """Those pieces of a mask that hold a seed and are not small beside the largest such piece.

    Voxels belong together if they share a face. A mask that is empty, or fills half of the image or more, comes back as
    it is.

    Args:
        mask: (...) bool.
        seeds: (...) bool.
        min_share: least size of a piece as a share of the largest one's, in [0, 1].

    Returns:
        A new bool mask; empty if no piece holds a seed.
    """
    mask = mask.astype(bool)
    count = np.count_nonzero(mask)
    if count == 0 or 2 * count >= mask.size:
        return mask
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    seeded = np.zeros(len(sizes), bool)
    seeded[np.unique(pieces[seeds.astype(bool)])] = True
    seeded[0] = False
    largest = sizes[seeded].max(initial=0)
    return (seeded & (sizes >= min_share * largest))[pieces]


def fused_mask(masks: Sequence[np.ndarray], min_share: float = 0.5) -> np.ndarray:
    """The paper's coarse result: what most masks hold, and of that the pieces with the most certain voxels."""
    return keep_seeded(at_least(len(masks) // 2 + 1, masks), strictest(masks), min_share)
