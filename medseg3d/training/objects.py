"""Object by object, for ``monai.handlers.IgniteMetricHandler``, which evaluates a split case by case.

A prediction numbers its objects, (1, *spatial) with 0 for the background, or is what a detector returns for a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric

from medseg3d.data.results import as_result
from medseg3d.metrics import CocoPrecision, CocoRules, ObjectCounts
from medseg3d.metrics.average_precision import MANY_OBJECTS
from medseg3d.tasks import Category, Instances

_OBJECT = {1: Category("object")}


class ObjectF1(CumulativeIterationMetric):
    """F1 of objects of one class over all cases together; of each case found, false alarms and missed are kept.

    Args:
        threshold: intersection over union from which an object is found, above 0 and up to 1.
        least_score: a detector's objects of a lower score do not count.
    """

    def __init__(self, threshold: float = 0.5, least_score: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.least_score = least_score

    def _compute_list(self, y_pred: Any, y: Any = None, **kwargs: Any) -> torch.Tensor:
        counts = [self._counts(*pair) for pair in _pairs(y_pred, y)]
        return torch.tensor([[c.found, c.false_alarms, c.missed] for c in counts])

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """(B, 3) counts of objects (B, 1, *spatial)."""
        return self._compute_list(y_pred, y).to(y_pred.device)

    def _counts(self, predicted: Instances, reference: Instances) -> ObjectCounts:
        return ObjectCounts.of(predicted[predicted.scores >= self.least_score], reference, self.threshold)

    def aggregate(self) -> torch.Tensor:
        """The F1 of all cases so far; nan where there is no object at all."""
        found, false_alarms, missed = self.get_buffer().sum(0).tolist()
        return torch.tensor(ObjectCounts(int(found), int(false_alarms), int(missed)).f1)


class ObjectAP:
    """Average precision of a detector's masks, of objects of one class over all cases, by the rules of COCO but without
    its limit of 100 detections. It keeps no numbers of single cases: give the handler ``save_details`` false.

    Args:
        threshold: intersection over union from which an object is found, above 0 and up to 1.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.rules = CocoRules(thresholds=(threshold,), limits=(MANY_OBJECTS,), areas={"all": (0, 1e10)})
        self.reset()

    def reset(self) -> None:
        """Forget all cases."""
        self.precision = CocoPrecision(rules=self.rules)

    def __call__(self, y_pred: Any, y: Any) -> None:
        """Count cases: a list of predictions or a batch of them, and references (B, 1, *spatial) with numbers."""
        for predicted, reference in _pairs(y_pred, y):
            self.precision += CocoPrecision.of(predicted, reference, rules=self.rules)

    def aggregate(self) -> float:
        """AP of all cases so far, those of other processes included; nan where the references hold no object."""
        parts: Any = idist.all_gather(self.precision) if idist.get_world_size() > 1 else [self.precision]
        return CocoPrecision.joined(parts, self.rules).average_precision()


def _pairs(y_pred: Any, y: Any) -> Iterator[tuple[Instances, Instances]]:
    """Each prediction with its reference; ValueError where one of them numbers no objects, or they differ in size."""
    if y is None or len(y) != len(y_pred):
        counts = [None if one is None else len(one) for one in (y_pred, y)]
        raise ValueError(f"predictions and references must be as many, and number their objects, got {counts}")
    for prediction, reference in zip(y_pred, y, strict=True):
        predicted = _instances(prediction)
        expected = _instances(reference)
        if predicted.shape != expected.shape:
            raise ValueError(
                f"both must number their objects on one grid, got the shapes {predicted.shape} and {expected.shape}"
            )
        yield predicted, expected


def _instances(objects: Any) -> Instances:
    if isinstance(objects, Mapping):
        found = as_result(objects, "instances", _OBJECT)
        assert isinstance(found, Instances)
        return found
    if len(objects) != 1:
        raise ValueError(
            f"both must number their objects, (1, *spatial) for each, got the shape {tuple(objects.shape)}"
        )
    return Instances.from_label_map(objects[0].cpu().numpy().astype(np.int64))
