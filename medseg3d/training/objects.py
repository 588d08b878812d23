"""Object by object, for ``monai.handlers.IgniteMetricHandler``, which evaluates a split case by case."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric

from medseg3d.metrics import ObjectCounts
from medseg3d.tasks import Instances


class ObjectF1(CumulativeIterationMetric):
    """F1 of numbered objects over all cases together; what is kept of each case is found, false alarms and missed.

    Args:
        threshold: intersection over union from which an object is found, above 0 and up to 1.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """(B, 3) counts of numbered objects (B, 1, *spatial), 0 for the background."""
        if y is None or y_pred.shape != y.shape or y.shape[1] != 1:
            shapes = [None if one is None else tuple(one.shape) for one in (y_pred, y)]
            raise ValueError(f"both must number their objects, (B, 1, *spatial), got the shapes {shapes}")
        pairs = zip(y_pred[:, 0].cpu().numpy(), y[:, 0].cpu().numpy(), strict=True)
        counts = [self._counts(*(Instances.from_label_map(one.astype("int64")) for one in pair)) for pair in pairs]
        return torch.tensor([[c.found, c.false_alarms, c.missed] for c in counts], device=y_pred.device)

    def _counts(self, predicted: Instances, reference: Instances) -> ObjectCounts:
        return ObjectCounts.of(predicted, reference, self.threshold)

    def aggregate(self) -> torch.Tensor:
        """The F1 of all cases so far; nan where there is no object at all."""
        found, false_alarms, missed = self.get_buffer().sum(0).tolist()
        return torch.tensor(ObjectCounts(int(found), int(false_alarms), int(missed)).f1)
