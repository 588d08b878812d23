"""Average precision and F1 of objects over the cases of a split, as MONAI's handler counts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg3d.training import ObjectAP, ObjectF1


def detection(scores, *masks):
    masks = torch.stack(masks)[:, None] if masks else torch.zeros(0, 1, 20, 30)
    boxes = torch.zeros(len(scores), 4)
    return {"boxes": boxes, "labels": torch.ones(len(scores)).long(), "scores": torch.tensor(scores), "masks": masks}


@pytest.fixture
def discs():
    """Three objects (1, 20, 30)."""
    numbers = torch.zeros(1, 20, 30, dtype=torch.int32)
    for number, column in enumerate((2, 12, 22), start=1):
        numbers[0, 3:9, column : column + 6] = number
    return numbers


def test_average_precision_over_all_cases(discs):
    masks = [(discs[0] == number).float() for number in (1, 2, 3)]
    wrong = torch.zeros(20, 30)
    wrong[15:] = 1
    metric = ObjectAP(0.5)
    metric([detection([0.9, 0.8], masks[0], wrong)], discs[None])
    metric([detection([0.7, 0.6, 0.5], *masks)], discs[None])
    # Hits in the order of scores: yes, no, yes, yes, yes; six objects.
    steps = [(1 / 6, 1.0), (4 / 6, 4 / 5)]
    points = np.linspace(0, 1, 101)
    expected = np.mean([next((p for r, p in steps if point <= r), 0.0) for point in points])
    assert metric.aggregate() == pytest.approx(expected)
    metric.reset()
    metric([detection([])], discs[None])
    assert metric.aggregate() == 0.0
    metric.reset()
    metric([detection([])], torch.zeros_like(discs)[None])
    assert np.isnan(metric.aggregate())


def test_f1_of_the_surest_detections(discs):
    masks = [(discs[0] == number).float() for number in (1, 2)]
    metric = ObjectF1(least_score=0.5)
    metric([detection([0.9, 0.4], *masks)], discs[None])
    metric([detection([])], discs[None])
    assert metric.get_buffer().tolist() == [[1, 0, 2], [0, 0, 3]]
    assert float(metric.aggregate()) == pytest.approx(2 / 7)


def test_what_cannot_be_compared_is_refused(discs):
    with pytest.raises(ValueError, match="as many"):
        ObjectAP()([detection([])] * 2, discs[None])
    with pytest.raises(ValueError, match="on one grid"):
        ObjectAP()([detection([])], discs[None, :, :10])
    with pytest.raises(ValueError, match="lacks masks"):
        ObjectAP()([{name: value for name, value in detection([]).items() if name != "masks"}], discs[None])
