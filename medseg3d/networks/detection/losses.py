"""Losses of the detectors. All work in float32 and give one number, but for the focal loss.

Shape legend: N sampled boxes, C classes with background as class 0, M the side of a mask.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from medseg3d.networks.detection.boxes import in_full_precision


def smooth_l1_per_sample(
    codes_P4: torch.Tensor, targets_P4: torch.Tensor, samples: int, beta: float = 1 / 9
) -> torch.Tensor:
    """Smooth L1, summed over the boxes with an object and divided by the number of *all* sampled boxes.

    Args:
        codes_P4, targets_P4: regression of the boxes with an object.
        samples: boxes with and without an object.
        beta: where the square becomes linear: 1 / sigma^2 in the notation of Fast R-CNN.
    """
    loss = F.smooth_l1_loss(in_full_precision(codes_P4), targets_P4, beta=beta, reduction="sum")
    return loss / max(1, samples)


def box_head_loss(
    logits_NC: torch.Tensor,
    codes_NX: torch.Tensor,
    labels_N: torch.Tensor,
    targets_N4: torch.Tensor,
    beta: float = 1 / 9,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of all boxes, and smooth L1 of those with an object (Girshick, "Fast R-CNN", ICCV 2015, eq. 1).

    Args:
        logits_NC: scores of the classes.
        codes_NX: (N, 4 C), codes of a box for each class, or (N, 4) for all.
        labels_N: classes, 0 for background.
        targets_N4: codes that the boxes with an object should have.
        beta: as for ``smooth_l1_per_sample``.
    """
    if not len(labels_N):
        return logits_NC.sum() * 0, codes_NX.sum() * 0
    objects = torch.where(labels_N > 0)[0]
    codes_NK4 = codes_NX.unflatten(1, (-1, 4))
    classes = labels_N[objects] if codes_NK4.shape[1] > 1 else torch.zeros_like(objects)
    classification = F.cross_entropy(in_full_precision(logits_NC), labels_N)
    return classification, smooth_l1_per_sample(codes_NK4[objects, classes], targets_N4[objects], len(labels_N), beta)


def mask_loss(logits_NCMM: torch.Tensor, labels_N: torch.Tensor, targets_NMM: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the mask of each object's own class (He et al., "Mask R-CNN", section 3); 0 of none."""
    if not len(labels_N):
        return logits_NCMM.sum() * 0
    own = logits_NCMM[torch.arange(len(labels_N), device=labels_N.device), labels_N]
    return F.binary_cross_entropy_with_logits(in_full_precision(own), targets_NMM)


def sigmoid_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Binary cross-entropy that fades for what is well classified, element by element (Lin et al., ICCV 2017, eq. 5).

    Args:
        logits, targets: of one shape; targets from 0 to 1.
        alpha: weight of objects, 1 - alpha that of background; negative for no weights.
        gamma: 0 for plain cross-entropy.
    """
    logits, targets = in_full_precision(logits), targets.to(in_full_precision(logits).dtype)
    probability = logits.sigmoid()
    error = 1 - (probability * targets + (1 - probability) * (1 - targets))
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * error**gamma
    return loss if alpha < 0 else (alpha * targets + (1 - alpha) * (1 - targets)) * loss
