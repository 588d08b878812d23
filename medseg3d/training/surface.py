"""Distances in mm for ``monai.handlers.IgniteMetricHandler``, which evaluates a split case by case."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric, do_metric_reduction

from medseg3d.metrics import SurfaceDistances


class HausdorffInMm(CumulativeIterationMetric):
    """Hausdorff distance of every class, in mm on each case's own grid.

    MONAI's handler knows no spacing, so its distances are in voxels. An organ that the reference or the prediction of
    a case lacks has no distance: nan, which a mean leaves out. That it was missed shows in the Dice, which is 0.

    Args:
        percentile: 100 for the maximum, 95 for HD95; see :meth:`medseg3d.metrics.SurfaceDistances.hausdorff`.
        reduction: how :meth:`aggregate` brings cases and classes together, one of MONAI's names.
    """

    def __init__(self, percentile: float = 95.0, reduction: str = "mean") -> None:
        super().__init__()
        self.percentile = percentile
        self.reduction = reduction

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """(B, K - 1) distances of one-hot (B, K, D, H, W), the background first and left out; ``y`` has the affine."""
        if not isinstance(y, MetaTensor):
            raise ValueError("the reference must be a MetaTensor: distances in mm need the affine of its grid")
        steps = y.affine.reshape(-1, 4, 4)[0, :3, :3].cpu().numpy()
        pairs = zip(y_pred[:, 1:].cpu().numpy() > 0, y[:, 1:].cpu().numpy() > 0, strict=True)
        values = [[self._distance(p, r, steps) for p, r in zip(*case, strict=True)] for case in pairs]
        return torch.tensor(values, device=y_pred.device)

    def _distance(self, predicted: Any, reference: Any, steps: Any) -> float:
        distance = SurfaceDistances.of(predicted, reference, steps).hausdorff(self.percentile)
        return distance if math.isfinite(distance) else math.nan

    def aggregate(self, reduction: str | None = None) -> torch.Tensor:
        """The distances of all cases so far, reduced; what is nan does not count."""
        return do_metric_reduction(self.get_buffer(), reduction or self.reduction)[0]
