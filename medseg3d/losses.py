"""Losses that MONAI lacks. Computed in float32 whatever the network's precision.

Shape legend: logits_BK... are (batch, classes, *spatial axes), labels_B1... hold class numbers, annotated_BK is
boolean.
"""

from __future__ import annotations

import torch
from torch import nn


class PartialDiceCELoss(nn.Module):
    """Dice and cross-entropy for cases in which some organs were never contoured.

    In such a case a background voxel may belong to a missing organ. Its class probabilities are therefore added to the
    background's before both terms (the marginal loss of Shi et al., Medical Image Analysis 70, 2021), and the Dice term
    leaves missing classes out. With every class annotated this is the ordinary sum of soft Dice (over the batch,
    background excluded) and cross-entropy.

    Classes of which the batch has no voxel are left out of the Dice term too. There it could only reward silence, and a
    small organ that few windows show would be silenced for good.

    Args:
        dice_weight: factor of the Dice term; the cross-entropy has factor 1.
        smooth: added to numerator and denominator of each class's Dice.
    """

    def __init__(self, dice_weight: float = 1.0, smooth: float = 1e-5) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.smooth = smooth

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, annotated: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, K, ...), any float type.
            labels: (B, 1, ...), class numbers 0 to K - 1; 0 is the background.
            annotated: (B, K) boolean, False where a class was not contoured in that case; None where all were.

        Raises:
            ValueError: on shapes that do not fit.
        """
        batch, classes = logits.shape[:2]
        if labels.shape != (batch, 1, *logits.shape[2:]):
            raise ValueError(
                f"labels must be {(batch, 1, *logits.shape[2:])} for these logits, got {tuple(labels.shape)}"
            )
        if annotated is None:
            annotated = torch.ones(batch, classes, dtype=torch.bool, device=logits.device)
        if annotated.shape != (batch, classes):
            raise ValueError(f"annotated must be {(batch, classes)}, got {tuple(annotated.shape)}")

        log_probs_BKN = logits.flatten(2).float().log_softmax(dim=1)
        labels_B1N = labels.flatten(2).long()
        missing_BK1 = annotated[..., None].logical_not()  # zeros and ones will do as well as booleans
        missing_BK1[:, 0] = False
        merged_BK1 = missing_BK1.clone()
        merged_BK1[:, 0] = True
        background_B1N = log_probs_BKN.masked_fill(~merged_BK1, -torch.inf).logsumexp(dim=1, keepdim=True)
        target_B1N = torch.where(labels_B1N > 0, log_probs_BKN.gather(1, labels_B1N), background_B1N)
        cross_entropy = -target_B1N.mean()

        probs_BKN = log_probs_BKN.exp() * ~missing_BK1
        one_hot_BKN = torch.zeros_like(probs_BKN).scatter_(1, labels_B1N, 1.0)
        overlap_K = (probs_BKN * one_hot_BKN).sum(dim=(0, 2))[1:]
        size_K = one_hot_BKN.sum(dim=(0, 2))[1:]
        total_K = probs_BKN.sum(dim=(0, 2))[1:] + size_K
        dice_K = (2 * overlap_K + self.smooth) / (total_K + self.smooth)
        present_K = size_K > 0
        if not present_K.any():
            return cross_entropy
        dice = (dice_K * present_K).sum() / present_K.sum()
        return cross_entropy + self.dice_weight * (1 - dice)


class WeightedCrossEntropyLoss(nn.Module):
    """Cross-entropy in which every voxel has its own weight (Ronneberger et al., "U-Net", 2015, equation 1).

    Args:
        reduction: "sum" over all voxels as in the paper; "mean" divides it by the number of voxels, "weighted_mean" by
            the sum of the weights, so that the rate of learning does not depend on either.

    Raises:
        ValueError: on any other reduction.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("sum", "mean", "weighted_mean"):
            raise ValueError(f"reduction must be 'sum', 'mean' or 'weighted_mean', got {reduction!r}")
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, K, ...), any float type.
            labels: (B, 1, ...), class numbers.
            weights: (B, 1, ...), 0 or more.

        Raises:
            ValueError: labels or weights of another size.
        """
        size = (len(logits), 1, *logits.shape[2:])
        if tuple(labels.shape) != size or tuple(weights.shape) != size:
            raise ValueError(
                f"logits {tuple(logits.shape)} need labels and weights of {size}, "
                f"got {tuple(labels.shape)} and {tuple(weights.shape)}"
            )
        with torch.autocast(logits.device.type, enabled=False):
            losses = nn.functional.cross_entropy(logits.float(), labels[:, 0].long(), reduction="none")
            weights = weights[:, 0].float()
            total = (losses * weights).sum()
            if self.reduction == "sum":
                return total
            return total / (weights.sum() if self.reduction == "weighted_mean" else weights.numel())
