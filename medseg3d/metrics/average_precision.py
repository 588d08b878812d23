"""Average precision of instances that carry scores: COCO's twelve numbers and VOC's. Any number of axes.

Both are values to which `+` adds images, data sets and processes; the order of images decides between equal scores.
What is not defined (no object of a class, a size or an area range) is nan, where COCO's program prints -1.

Shape legend: A area ranges, T IoU thresholds, D detections (the highest score first), G objects of the reference,
R points of recall, K categories, M limits of detections per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from medseg3d.metrics.instances import Geometry, pairwise_iou
from medseg3d.metrics.ratios import mean_of_defined
from medseg3d.metrics.summing import Summable
from medseg3d.tasks import Categories, Instances

_TINY = float(np.spacing(1))
_COCO_SIZES = {"small": "s", "medium": "m", "large": "l"}

MANY_OBJECTS = 10_000  # detections of a picture to rank where COCO's 100 are fewer than it shows, as of nuclei


@dataclass(frozen=True)
class CocoRules:
    """What is counted: the thresholds of IoU, the points of recall, how many detections of a class an image may have,
    and the ranges of area in pixels, both ends included, the first of which holds all."""

    thresholds: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
    recall_points: tuple[float, ...] = tuple(np.linspace(0, 1, 101).tolist())
    limits: tuple[int, ...] = (1, 10, 100)
    areas: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "all": (0, 1e10),
            "small": (0, 32**2),
            "medium": (32**2, 96**2),
            "large": (96**2, 1e10),
        }
    )


@dataclass(frozen=True)
class _Ranked:
    """The detections of one category in one image, and how many objects there were to find in each area range."""

    scores_D: np.ndarray
    hit_ATD: np.ndarray
    ignored_ATD: np.ndarray
    objects_A: np.ndarray


@dataclass(frozen=True, eq=False)
class CocoPrecision(Summable):
    """Precision and recall of ranked detections by the rules of COCO.

    Greedy from the highest score, each detection takes the free object of the highest IoU at or above the threshold;
    objects of a crowd or out of the area range are ignored together with what is matched to them.
    """

    records: Mapping[int, tuple[_Ranked, ...]] = field(default_factory=dict)
    categories: Categories = field(default_factory=dict)
    rules: CocoRules = field(default_factory=CocoRules)

    @classmethod
    def of(
        cls,
        prediction: Instances,
        reference: Instances,
        geometry: Geometry = "masks",
        rules: CocoRules | None = None,
    ) -> CocoPrecision:
        """One image or scan; ValueError where the shapes differ, or a score is NaN."""
        rules = rules or CocoRules()
        records = {}
        for number in sorted({*prediction.classes.tolist(), *reference.classes.tolist()}):
            ranked = prediction[prediction.classes == number].by_score()[: max(rules.limits)]
            records[number] = (_matched(ranked, reference[reference.classes == number], geometry, rules),)
        return cls(records, {**prediction.categories, **reference.categories}, rules)

    @classmethod
    def over(
        cls, pairs: Iterable[tuple[Instances, Instances]], geometry: Geometry = "masks", rules: CocoRules | None = None
    ) -> CocoPrecision:
        """A data set: pairs of prediction and reference."""
        return cls.joined((cls.of(p, r, geometry, rules) for p, r in pairs), rules)

    @classmethod
    def joined(cls, parts: Iterable[CocoPrecision], rules: CocoRules | None = None) -> CocoPrecision:
        """All parts in their order; ValueError where their rules differ."""
        rules = rules or CocoRules()
        records: dict[int, list[_Ranked]] = {}
        categories: dict = {}
        for part in parts:
            if part.rules != rules:
                raise ValueError("what is added up has been counted by the same rules; count one of them anew")
            categories.update(part.categories)
            for number, ranked in part.records.items():
                records.setdefault(number, []).extend(ranked)
        return cls({n: tuple(ranked) for n, ranked in records.items()}, dict(sorted(categories.items())), rules)

    def __add__(self, other: CocoPrecision) -> CocoPrecision:
        return self.joined([self, other], self.rules)

    @property
    def precision(self) -> np.ndarray:
        """(T, R, K, A, M) precision at each point of recall, interpolated; categories in ascending order."""
        return self._curves[0]

    @property
    def recall(self) -> np.ndarray:
        """(T, K, A, M) the highest recall."""
        return self._curves[1]

    def average_precision(
        self, threshold: float | None = None, area: str = "all", category: int | None = None
    ) -> float:
        """AP, the mean of the precision over recall points, categories and thresholds; or at one of these."""
        chosen = self.precision[self._thresholds(threshold)][:, :, self._categories(category)]
        return mean_of_defined(chosen[:, :, :, self._area(area), -1])

    def average_recall(self, limit: int | None = None, area: str = "all", category: int | None = None) -> float:
        """AR, the mean of the recall over categories and thresholds, with up to ``limit`` detections an image."""
        if limit is not None and limit not in self.rules.limits:
            raise ValueError(f"the limit of detections is one of {self.rules.limits}, got {limit}")
        column = len(self.rules.limits) - 1 if limit is None else self.rules.limits.index(limit)
        return mean_of_defined(self.recall[:, self._categories(category), self._area(area), column])

    def summary(self) -> dict[str, float]:
        """COCO's twelve numbers by their names, in its order: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs,
        ARm, ARl; each in [0, 1] or nan. Under other rules AR is told for their limits, AP50 and AP75 where they have
        these thresholds, and areas that COCO does not have go by their own names: AP_tiny, AR_tiny."""
        sizes = {_COCO_SIZES.get(area, f"_{area}"): area for area in self.rules.areas if area != "all"}
        numbers = {"AP": self.average_precision()}
        numbers |= {f"AP{percent}": self.average_precision(percent / 100) for percent in self._percents()}
        numbers |= {f"AP{letter}": self.average_precision(area=area) for letter, area in sizes.items()}
        numbers |= {f"AR{limit}": self.average_recall(limit) for limit in self.rules.limits}
        return numbers | {f"AR{letter}": self.average_recall(area=area) for letter, area in sizes.items()}

    def _percents(self) -> list[int]:
        return [percent for percent in (50, 75) if np.isclose(self.rules.thresholds, percent / 100).any()]

    @cached_property
    def _curves(self) -> tuple[np.ndarray, np.ndarray]:
        rules = self.rules
        sizes = len(self.categories), len(rules.areas), len(rules.limits)
        precision = np.full((len(rules.thresholds), len(rules.recall_points), *sizes), np.nan)
        recall = np.full((len(rules.thresholds), *sizes), np.nan)
        for k, number in enumerate(sorted(self.categories)):
            ranked = self.records.get(number, ())
            objects_A = sum((record.objects_A for record in ranked), np.zeros(len(rules.areas), int))
            for m, limit in enumerate(rules.limits):
                scores = np.concatenate([[], *(record.scores_D[:limit] for record in ranked)])
                order = np.argsort(-scores, kind="stable")
                for a in np.flatnonzero(objects_A):
                    hit, ignored = (
                        np.concatenate([getattr(r, name)[a, :, :limit] for r in ranked], axis=-1)[:, order]
                        for name in ("hit_ATD", "ignored_ATD")
                    )
                    curves = _curve(hit & ~ignored, ~hit & ~ignored, int(objects_A[a]), rules.recall_points)
                    precision[:, :, k, a, m], recall[:, k, a, m] = curves
        return precision, recall

    def _thresholds(self, threshold: float | None) -> np.ndarray:
        if threshold is None:
            return np.arange(len(self.rules.thresholds))
        found = np.flatnonzero(np.isclose(self.rules.thresholds, threshold))
        if not len(found):
            raise ValueError(f"the IoU threshold is one of {self.rules.thresholds}, got {threshold}")
        return found

    def _categories(self, category: int | None) -> list[int]:
        numbers = sorted(self.categories)
        if category is not None and category not in numbers:
            raise ValueError(f"the category is one of {numbers}, got {category}")
        return [k for k, number in enumerate(numbers) if category in (None, number)]

    def _area(self, area: str) -> int:
        if area not in self.rules.areas:
            raise ValueError(f"the area range is one of {list(self.rules.areas)}, got {area!r}")
        return list(self.rules.areas).index(area)


@dataclass(frozen=True, eq=False)
class VocPrecision(Summable):
    """Average precision of ranked detections by the rules of PASCAL VOC, at one IoU threshold.

    Each detection is compared with the object of the highest IoU only: it hits if that is at the threshold or above and
    nobody of a higher score has it, and is ignored if the object is marked (difficult in VOC, crowd here).
    """

    records: Mapping[int, tuple[_Ranked, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prediction: Instances,
        reference: Instances,
        threshold: float = 0.5,
        geometry: Geometry = "boxes",
        inclusive: bool = False,
    ) -> VocPrecision:
        """One image; errors as of `CocoPrecision`. ``inclusive``: x1 and y1 are the last pixels inside, as in VOC's own
        files."""
        records = {}
        for number in sorted({*prediction.classes.tolist(), *reference.classes.tolist()}):
            ranked = prediction[prediction.classes == number].by_score()
            objects = reference[reference.classes == number]
            hit, ignored = np.zeros((2, 1, 1, len(ranked)), bool)
            taken = np.zeros(len(objects), bool)
            for d, row in enumerate(pairwise_iou(ranked, objects, geometry, inclusive=inclusive)):
                best = int(np.argmax(row)) if len(row) else 0
                if not len(row) or row[best] < threshold:
                    continue
                ignored[..., d] = objects.crowd[best]
                hit[..., d] = not taken[best]
                taken[best] = True
            records[number] = (_Ranked(ranked.scores, hit, ignored, np.array([(~objects.crowd).sum()])),)
        return cls(records)

    def __add__(self, other: VocPrecision) -> VocPrecision:
        numbers = sorted({*self.records, *other.records})
        return VocPrecision({n: self.records.get(n, ()) + other.records.get(n, ()) for n in numbers})

    def average_precision(self, category: int, points: int | None = None) -> float:
        """AP of a category, in [0, 1]; nan without objects. The area under the interpolated curve as from VOC 2010 on,
        or with ``points=11`` the mean over recalls 0, 0.1, ..., 1 of VOC 2007."""
        ranked = self.records.get(category, ())
        objects = sum(int(record.objects_A[0]) for record in ranked)
        if not objects:
            return math.nan
        order = np.argsort(-np.concatenate([record.scores_D for record in ranked]), kind="stable")
        hit, ignored = (
            np.concatenate([getattr(r, name)[0, 0] for r in ranked])[order] for name in ("hit_ATD", "ignored_ATD")
        )
        tp, fp = np.cumsum(hit & ~ignored), np.cumsum(~hit & ~ignored)
        recall, precision = tp / objects, _falling(tp / np.maximum(tp + fp, 1))
        if points is None:
            return float(np.sum(np.diff(recall, prepend=0) * precision))
        at = np.searchsorted(recall, np.linspace(0, 1, points), side="left")
        return float(np.append(precision, 0)[at].mean())

    def mean_average_precision(self, points: int | None = None) -> float:
        """mAP: the mean of AP over the categories that the reference has."""
        return mean_of_defined(np.array([self.average_precision(number, points) for number in self.records]))


def _matched(ranked: Instances, objects: Instances, geometry: Geometry, rules: CocoRules) -> _Ranked:
    """Which detections of one category hit an object, at every threshold and in every area range at once."""
    ranges = np.array(list(rules.areas.values()))
    thresholds_T1 = np.minimum(np.array(rules.thresholds), 1 - 1e-10)[:, None]
    iou_DG = pairwise_iou(ranked, objects, geometry, crowd=True)
    ignored_AG = objects.crowd | _outside(objects.areas, ranges)
    taken_ATG = np.zeros((len(ranges), len(thresholds_T1), len(objects)), bool)
    hit_ATD, ignored_ATD = np.zeros((2, len(ranges), len(thresholds_T1), len(ranked)), bool)
    for d in range(len(ranked) if len(objects) else 0):
        open_ATG = (iou_DG[d] >= thresholds_T1) & (~taken_ATG | objects.crowd)
        counted_ATG = open_ATG & ~ignored_AG[:, None]
        # An object that counts comes before all that are ignored; of equal IoU the last one is taken.
        open_ATG = np.where(counted_ATG.any(axis=-1, keepdims=True), counted_ATG, open_ATG)
        last_AT = np.where(open_ATG, iou_DG[d], -1)[..., ::-1].argmax(axis=-1)
        best_AT = len(objects) - 1 - last_AT
        hit_ATD[..., d] = open_ATG.any(axis=-1)
        a, t = np.nonzero(hit_ATD[..., d])
        taken_ATG[a, t, best_AT[a, t]] = True
        ignored_ATD[a, t, d] = ignored_AG[a, best_AT[a, t]]
    half = ranked.boxes.shape[1] // 2
    sizes = ranked.areas if geometry == "masks" else np.prod(ranked.boxes[:, half:] - ranked.boxes[:, :half], axis=1)
    ignored_ATD |= ~hit_ATD & _outside(sizes, ranges)[:, None]
    return _Ranked(ranked.scores, hit_ATD, ignored_ATD, (~ignored_AG).sum(axis=1))


def _outside(areas: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """(A, N): whether each area lies outside each range."""
    return (areas < ranges[:, :1]) | (areas > ranges[:, 1:])


def _curve(
    hit_TD: np.ndarray, miss_TD: np.ndarray, objects: int, points: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R) at the points of recall, and the highest recall (T,)."""
    tp_TD, fp_TD = np.cumsum(hit_TD, axis=1), np.cumsum(miss_TD, axis=1)
    recall_TD = tp_TD / objects
    precision_TD = _falling(tp_TD / (tp_TD + fp_TD + _TINY))
    precision_TR = np.zeros((len(hit_TD), len(points)))
    for row, recall, precision in zip(precision_TR, recall_TD, precision_TD, strict=True):
        at = np.searchsorted(recall, points, side="left")
        row[:] = np.append(precision, 0)[at]
    highest_T = recall_TD[:, -1] if recall_TD.shape[1] else np.zeros(len(hit_TD))
    return precision_TR, highest_T


def _falling(precision: np.ndarray) -> np.ndarray:
    """Each value the highest from its place on."""
    return np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
