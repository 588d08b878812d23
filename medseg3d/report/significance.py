"""How sure a mean is, and a difference of means: bootstrap over patients, paired tests, and many tests at once.

Shape legend: values_PO (patients, organs), NaN where a patient has no value; R rounds of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

ROUNDS = 5000
LEVEL = 0.95


def resampled_patients(patients: int, rounds: int = ROUNDS, seed: int = 0) -> np.ndarray:
    """(R, P) how often each patient is drawn in each round, with replacement."""
    drawn = np.random.default_rng(seed).integers(0, patients, (rounds, patients))
    return np.stack([np.bincount(one, minlength=patients) for one in drawn]).astype(float)


def organ_means(values_PO: np.ndarray, weights_RP: np.ndarray) -> np.ndarray:
    """(R, O) mean over patients with these weights; NaN where no patient that was drawn has a value."""
    known_PO = np.isfinite(values_PO)
    sums = weights_RP @ np.where(known_PO, values_PO, 0.0)
    counts = weights_RP @ known_PO
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean along the last axis of the values that are there; NaN where none is."""
    known = np.isfinite(values)
    counts = known.sum(axis=-1)
    sums = np.where(known, values, 0.0).sum(axis=-1)
    return np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def interval(samples: np.ndarray, patients: int, level: float = LEVEL) -> tuple[float, float]:
    """The percentiles of bootstrap samples (R,) between which ``level`` of them lie.

    NaN where there are none, and of a single patient, who tells nothing of others.
    """
    known = samples[np.isfinite(samples)]
    if patients < 2 or not len(known):
        return np.nan, np.nan
    low, high = np.percentile(known, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def paired_p(differences: np.ndarray) -> float:
    """p of the two-sided Wilcoxon signed rank test of a difference for each patient (P,); NaN ones are left out.

    Patients without a difference are left out too, as Wilcoxon has it: p cannot be less than 2 / 2^n of the n others.
    1 where all are 0; NaN where there is none.
    """
    known = differences[np.isfinite(differences)]
    if not len(known):
        return np.nan
    changed = known[known != 0]  # with zeros SciPy would take the normal distribution, however few are left
    return float(stats.wilcoxon(changed).pvalue) if len(changed) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being several (Holm 1979), in the order given; a NaN stays, and is no test."""
    known = [n for n, p in enumerate(p_values) if np.isfinite(p)]
    adjusted = [float("nan")] * len(p_values)
    highest = 0.0
    for rank, n in enumerate(sorted(known, key=lambda n: p_values[n])):
        highest = max(highest, min(1.0, (len(known) - rank) * p_values[n]))
        adjusted[n] = highest
    return adjusted
