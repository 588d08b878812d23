"""Which box learns from which object, and which boxes take part: Ren et al., "Faster R-CNN", 2015, section 3.1.2.

Shape legend: ``iou_GN`` holds objects in its rows and boxes in its columns; labels are 1 or a class for an object, 0
for background, -1 for "left out".
"""

from __future__ import annotations

import torch

BACKGROUND = -1  # of a match: no object overlaps enough
BETWEEN = -2  # some object overlaps too much for background and too little for a match


class Matcher:
    """For each box the object that it overlaps most, or ``BACKGROUND`` or ``BETWEEN``.

    With ``allow_low_quality_matches`` every object also keeps the boxes that overlap it most, all of them if several do
    equally, however little it is; such a box learns from the object that *it* overlaps most. Departure from
    torchvision: an object that no box overlaps keeps none, where torchvision gives it all boxes.

    Args:
        high_threshold: least IoU of a match.
        low_threshold: IoU below which a box is background.
        allow_low_quality_matches: see above.
    """

    def __init__(self, high_threshold: float, low_threshold: float, allow_low_quality_matches: bool = False) -> None:
        if not 0 <= low_threshold <= high_threshold <= 1:
            raise ValueError(
                "thresholds of an IoU lie in 0 to 1, the one for background not above the one for objects, got "
                f"{low_threshold} and {high_threshold}"
            )
        self.high_threshold = high_threshold
        self.low_threshold = low_threshold
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, iou_GN: torch.Tensor) -> torch.Tensor:
        """Index of the object, or ``BACKGROUND`` or ``BETWEEN``: (N,). Without objects all is background."""
        if not len(iou_GN):
            return torch.full(iou_GN.shape[1:], BACKGROUND, device=iou_GN.device)
        iou_N, closest_N = iou_GN.max(0)
        matches = closest_N.clone()
        matches[iou_N < self.high_threshold] = BETWEEN
        matches[iou_N < self.low_threshold] = BACKGROUND
        if self.allow_low_quality_matches and iou_GN.shape[1]:
            best_G1 = iou_GN.amax(1, keepdim=True)
            restored = ((iou_GN == best_G1) & (best_G1 > 0)).any(0)
            matches = torch.where(restored, closest_N, matches)
        return matches


class BalancedSampler:
    """A random choice of boxes, with at most a share of objects.

    Args:
        batch_size_per_image: boxes of an image; fewer if it has fewer.
        positive_fraction: largest share of boxes with an object. Background fills what they leave.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        if batch_size_per_image < 1 or not 0 <= positive_fraction <= 1:
            raise ValueError(
                "a batch has at least one box and a share of objects from 0 to 1, got "
                f"{batch_size_per_image} and {positive_fraction}"
            )
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction

    def __call__(self, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of boxes with an object (label 1 or more) and of background (0)."""
        positive, negative = torch.where(labels_N >= 1)[0], torch.where(labels_N == 0)[0]
        positives = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
        negatives = min(len(negative), self.batch_size_per_image - positives)
        return _some(positive, positives), _some(negative, negatives)


def _some(index: torch.Tensor, count: int) -> torch.Tensor:
    return index[torch.randperm(len(index), device=index.device)[:count]]
