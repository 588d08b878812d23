"""Panoptic quality: Kirillov, He, Girshick, Rother and Dollár, "Panoptic segmentation", CVPR 2019, with COCO's rules.

A predicted and a reference segment of one category match if their IoU is above 0.5, so no segment has two matches.
Void of the reference does not count against a prediction, nor does a crowd of its category: a background on which
false alarms shall count must be a stuff category of the reference. Any number of axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from medseg3d.metrics.counting import joint_counts
from medseg3d.metrics.summing import Summable
from medseg3d.tasks import Categories, Category, Panoptic


@dataclass(frozen=True)
class SegmentCounts(Summable):
    """Of one category: the sum of IoU over matched segments, how many matched, and how many of either side did not."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: SegmentCounts) -> SegmentCounts:
        return SegmentCounts(self.iou + other.iou, self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def quality(self) -> Quality:
        """PQ, SQ and RQ of the category; nan where neither side has a segment of it."""
        segments = self.tp + 0.5 * self.fp + 0.5 * self.fn
        if not segments:
            return Quality(float("nan"), float("nan"), float("nan"), 0)
        return Quality(self.iou / segments, self.iou / self.tp if self.tp else 0.0, self.tp / segments, 1)


@dataclass(frozen=True)
class Quality:
    """Panoptic, segmentation and recognition quality, each in [0, 1], as means over ``categories`` categories."""

    pq: float
    sq: float
    rq: float
    categories: int


@dataclass(frozen=True)
class PanopticQuality(Summable):
    """Counts of segments by category. A value; ``+`` adds images, data sets and processes up.

    Over a data set: ``sum((PanopticQuality.of(p, r) for p, r in pairs), PanopticQuality())``.
    """

    counts: Mapping[int, SegmentCounts] = field(default_factory=dict)
    categories: Categories = field(default_factory=dict)

    @classmethod
    def of(cls, prediction: Panoptic, reference: Panoptic) -> PanopticQuality:
        """The counts of one image or scan; ValueError where the shapes differ.

        The reference says which categories there are, and which are things; those that only the prediction names are
        added. A segment of either side without a pixel is a miss or a false alarm.
        """
        if prediction.shape != reference.shape:
            raise ValueError(
                f"prediction and reference lie on one grid, got the shapes {prediction.shape} and {reference.shape}"
            )
        counts = _counts(prediction, reference)
        return cls(counts, {**prediction.categories, **reference.categories})

    def __add__(self, other: PanopticQuality) -> PanopticQuality:
        numbers = sorted({*self.counts, *other.counts})
        nothing = SegmentCounts()
        counts = {n: self.counts.get(n, nothing) + other.counts.get(n, nothing) for n in numbers}
        return PanopticQuality(counts, {**other.categories, **self.categories})

    @property
    def per_category(self) -> dict[int, Quality]:
        """The quality of every category that has a segment on either side."""
        return {n: counts.quality for n, counts in sorted(self.counts.items()) if counts.quality.categories}

    @property
    def all(self) -> Quality:
        """The mean over the categories that have a segment on either side; nan if there is none."""
        return self._mean(lambda category: True)

    @property
    def things(self) -> Quality:
        """The mean over thing categories."""
        return self._mean(lambda category: category.is_thing)

    @property
    def stuff(self) -> Quality:
        """The mean over stuff categories."""
        return self._mean(lambda category: not category.is_thing)

    def _mean(self, wanted: Callable[[Category], bool]) -> Quality:
        found = [quality for n, quality in self.per_category.items() if wanted(self.categories[n])]
        if not found:
            return Quality(float("nan"), float("nan"), float("nan"), 0)
        pq, sq, rq = np.mean([(quality.pq, quality.sq, quality.rq) for quality in found], axis=0).tolist()
        return Quality(pq, sq, rq, len(found))


def _counts(prediction: Panoptic, reference: Panoptic) -> dict[int, SegmentCounts]:
    predicted, expected = list(prediction.segments), list(reference.segments)
    joint = joint_counts(reference.ids, prediction.ids, expected, predicted)  # the last row and column are void
    common, on_void = joint[:-1, :-1], joint[-1, :-1]
    sizes, areas = joint[:-1].sum(axis=1), joint[:, :-1].sum(axis=0)
    rows = [reference.segments[n] for n in expected]
    columns = [prediction.segments[n] for n in predicted]
    kinds = np.array([s.category for s in rows], int), np.array([s.category for s in columns], int)
    crowd = np.array([s.crowd for s in rows], bool)

    unions = sizes[:, None] + areas - common - on_void
    same = (kinds[0][:, None] == kinds[1]) & ~crowd[:, None] & (common > 0)
    iou = np.divide(common, unions, out=np.zeros(common.shape), where=same)
    matched = iou > 0.5

    # Of several crowds of a category the last counts, as in COCO's program.
    crowd_of = {s.category: n for n, s in enumerate(rows) if s.crowd}
    on_crowd = [common[crowd_of[s.category], j] if s.category in crowd_of else 0 for j, s in enumerate(columns)]
    ignored = (on_void + np.array(on_crowd, int)) > 0.5 * areas

    missed = ~matched.any(axis=1) & ~crowd
    alarms = ~matched.any(axis=0) & ~ignored
    result: dict[int, SegmentCounts] = {}
    for number in sorted({*kinds[0].tolist(), *kinds[1].tolist()}):
        ours, theirs = kinds[1] == number, kinds[0] == number
        pairs = iou[matched & theirs[:, None] & ours]
        result[number] = SegmentCounts(
            float(pairs.sum()), len(pairs), int((alarms & ours).sum()), int((missed & theirs).sum())
        )
    return result
