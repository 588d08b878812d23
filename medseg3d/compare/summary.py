"""Means with their intervals, and models in pairs: which differences are more than chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from medseg3d.compare.result import Comparison
from medseg3d.report.significance import (
    holm,
    interval,
    mean_of_known,
    organ_means,
    paired_p,
    resampled_patients,
)

MEAN = ""  # in place of an organ: the mean of the organs that all models have


@dataclass(frozen=True)
class Measure:
    """A column of figures: its heading, unit, digits after the point and which end is the better one."""

    heading: str
    unit: str
    digits: int
    higher_is_better: bool


MEASURES: Mapping[str, Measure] = {
    "dice": Measure("Dice", "", 3, True),
    "nsd": Measure("NSD", "", 3, True),
    "hd95_mm": Measure("HD95", "mm", 1, False),
    "volume_error": Measure("Volume error", "%", 1, False),
}


@dataclass(frozen=True)
class Estimate:
    """A mean over patients with its 95 % interval; NaN where nobody has a value. ``patients`` have one."""

    mean: float
    low: float
    high: float
    patients: int


@dataclass(frozen=True)
class Pair:
    """``first`` minus ``second`` of a measure, over the patients for whom both have it.

    ``p`` is of the Wilcoxon signed rank test, ``p_holm`` adjusted for all pairs of the measure's table: of all organs,
    or of the means.
    """

    measure: str
    organ: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    patients: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Summary:
    """`estimates` by (measure, model, organ); `pairs` of models. The organ is `MEAN` for the mean of the shared."""

    estimates: Mapping[tuple[str, str, str], Estimate]
    pairs: tuple[Pair, ...]

    def best(self, measure: str, organ: str = MEAN) -> str | None:
        """The model with the best mean; None where no model has one."""
        sign = 1 if MEASURES[measure].higher_is_better else -1
        known = {
            model: sign * one.mean
            for (of, model, which), one in self.estimates.items()
            if (of, which) == (measure, organ) and np.isfinite(one.mean)
        }
        return max(known, key=lambda model: known[model]) if known else None

    def pair(self, measure: str, organ: str, first: str, second: str) -> Pair | None:
        """Two models, in whatever order they are kept; None for a model and itself."""
        wanted = {first, second}
        ours = (pair for pair in self.pairs if (pair.measure, pair.organ) == (measure, organ))
        return next((pair for pair in ours if {pair.first, pair.second} == wanted), None)


def summarise(comparison: Comparison, seed: int = 0) -> Summary:
    """Means of all measures with percentile intervals of a bootstrap over patients, and models in pairs.

    A mean is over patients, organ by organ; `MEAN` is the mean of the shared organs' means. In each round the same
    patients are drawn for all models.
    """
    names = [model.name for model in comparison.models]
    organs = [*comparison.organs, MEAN]
    weights_RP = resampled_patients(len(comparison.patients), seed=seed)
    estimates, pairs = {}, []
    for measure in MEASURES:
        values_MPO = comparison.values(measure)
        shared = np.isin(comparison.organs, comparison.shared)
        for name, values_PO in zip(names, values_MPO, strict=True):
            means = _with_mean(values_PO, weights_RP, shared)
            for organ, mean, samples, patients in zip(organs, *means, strict=True):
                estimates[measure, name, organ] = Estimate(float(mean), *interval(samples, patients), int(patients))
        found = list(_pairs(measure, names, organs, values_MPO, weights_RP, shared))
        for table in ([pair for pair in found if pair.organ != MEAN], [pair for pair in found if pair.organ == MEAN]):
            adjusted = holm([pair.p for pair in table])
            pairs += [replace(pair, p_holm=p) for pair, p in zip(table, adjusted, strict=True)]
    return Summary(estimates, tuple(pairs))


def _with_mean(
    values_PO: np.ndarray, weights_RP: np.ndarray, shared: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each organ, and of the mean of the shared ones: mean, samples (O + 1, R), patients with a value."""
    once = np.ones((1, len(values_PO)))
    means_RO = np.concatenate([organ_means(values_PO, once), organ_means(values_PO, weights_RP)])
    of_shared = mean_of_known(means_RO[:, shared])
    known_PO = np.isfinite(values_PO)
    patients = [*known_PO.sum(axis=0), known_PO[:, shared].any(axis=1).sum()]
    columns = np.concatenate([means_RO, of_shared[:, None]], axis=1)
    return columns[0], columns[1:].T, np.array(patients)


def _pairs(
    measure: str,
    names: list[str],
    organs: list[str],
    values_MPO: np.ndarray,
    weights_RP: np.ndarray,
    shared: np.ndarray,
) -> Iterator[Pair]:
    for a, b in combinations(range(len(names)), 2):
        differences_PO = values_MPO[a] - values_MPO[b]  # NaN where one of them has no value
        per_patient = mean_of_known(differences_PO[:, shared])
        tested = [*differences_PO.T, per_patient]
        means = _with_mean(differences_PO, weights_RP, shared)
        for organ, mean, samples, patients, values in zip(organs, *means, tested, strict=True):
            p = paired_p(values)
            low, high = interval(samples, patients)
            yield Pair(measure, organ, names[a], names[b], float(mean), low, high, int(patients), p, p)
