"""Means, intervals and tests against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medseg3d.report.significance import holm, interval, mean_of_known, organ_means, paired_p, resampled_patients

NAN = float("nan")


def test_a_round_draws_as_many_patients_as_there_are():
    weights_RP = resampled_patients(7, rounds=200, seed=3)
    assert weights_RP.shape == (200, 7) and (weights_RP.sum(axis=1) == 7).all()
    assert (weights_RP == resampled_patients(7, 200, 3)).all()
    assert (weights_RP != resampled_patients(7, 200, 4)).any()


def test_means_are_over_patients_that_have_a_value():
    values_PO = np.array([[1.0, NAN], [3.0, 5.0]])
    means_RO = organ_means(values_PO, np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_array_equal(means_RO, [[2, 5], [1, NAN], [3, 5]])
    np.testing.assert_array_equal(mean_of_known(np.array([[1.0, NAN, 3.0], [NAN, NAN, NAN]])), [2, NAN])


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    """Of many normal values both agree; a bootstrap of patients is no narrower because they have many organs."""
    values_P1 = np.random.default_rng(0).normal(10, 2, (400, 1))
    samples = organ_means(values_P1, resampled_patients(400, rounds=4000))[:, 0]
    low, high = interval(samples, 400)
    half = 1.96 * values_P1.std() / 20
    assert low == pytest.approx(values_P1.mean() - half, abs=0.02)
    assert high == pytest.approx(values_P1.mean() + half, abs=0.02)
    twice = np.hstack([values_P1, values_P1])
    same = organ_means(twice, resampled_patients(400, rounds=4000)).mean(axis=1)
    assert interval(same, 400) == pytest.approx((low, high))


def test_the_interval_of_nothing_is_none():
    assert np.isnan(interval(np.array([NAN, NAN]), 3)).all()
    assert interval(np.array([NAN, 2.0, 2.0]), 2) == (2, 2)
    assert np.isnan(interval(np.array([2.0, 2.0]), 1)).all()


def test_p_of_pairs():
    assert paired_p(np.arange(1.0, 7)) == 2 / 2**6  # the first is the better one in all of six
    assert paired_p(np.array([1.0, NAN, 2, 3, 4, 5, 6])) == 2 / 2**6
    assert paired_p(np.zeros(5)) == 1
    assert np.isnan(paired_p(np.array([NAN])))
    few = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert paired_p(np.concatenate([np.zeros(15), few])) == paired_p(few) == 2 / 2**5  # ties tell nothing
    mixed = np.array([0.3, -0.1, 0.4, 0.2, -0.25, 0.6, 0.5])
    assert paired_p(mixed) == paired_p(-mixed) == stats.wilcoxon(mixed).pvalue


def test_holm_by_hand():
    # Of four: 0.005 x 4, 0.01 x 3, 0.03 x 2 and 0.04 x 1, which is no less than the one before.
    assert holm([0.01, 0.04, 0.03, NAN, 0.005]) == pytest.approx([0.03, 0.06, 0.06, NAN, 0.02], nan_ok=True)
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == [] and holm([0.04]) == [0.04]
