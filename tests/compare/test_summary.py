"""Means, intervals and pairs of made-up figures whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from medseg3d.compare import summarise
from medseg3d.compare.summary import MEAN, MEASURES
from tests.compare.made_up import ORGANS, made_up, row


def test_means_are_of_patients_then_of_organs():
    comparison = made_up(patients=4)
    summary = summarise(comparison)
    own = [r for r in comparison.rows if r["model"] == "ct_unet"]
    for organ in ORGANS.values():
        dice = [r["dice"] for r in own if r["name"] == organ]
        estimate = summary.estimates["dice", "ct_unet", organ]
        assert estimate.mean == pytest.approx(np.mean(dice)) and estimate.patients == 4
        assert min(dice) <= estimate.low <= estimate.mean <= estimate.high <= max(dice)
    mean = summary.estimates["dice", "ct_unet", MEAN]
    assert mean.mean == pytest.approx(np.mean([r["dice"] for r in own]))


def test_a_real_difference_is_found_and_chance_is_not():
    found = summarise(made_up(better=0.05))
    assert all(found.best(measure) == "ct_unet" for measure in ("dice", "nsd", "hd95_mm"))
    pair = found.pair("dice", MEAN, "ct_vnet", "ct_unet")
    assert pair.p == pytest.approx(2 / 2**12) and pair.p_holm == pair.p, "one pair alone"
    assert pair.first == "ct_unet" and 0.045 < pair.low < pair.difference < pair.high < 0.055
    assert summarise(made_up(better=0)).pair("dice", MEAN, "ct_unet", "ct_vnet").p > 0.05


def test_p_is_adjusted_for_the_pairs_and_organs_of_a_measure():
    summary = summarise(made_up(("a", "b", "c"), better=0.05))
    means = [pair for pair in summary.pairs if pair.measure == "dice" and pair.organ == MEAN]
    organs = [pair for pair in summary.pairs if pair.measure == "dice" and pair.organ != MEAN]
    assert (len(means), len(organs)) == (3, 3 * len(ORGANS))
    assert min(pair.p_holm for pair in means) == pytest.approx(3 * min(pair.p for pair in means))
    assert min(pair.p_holm for pair in organs) == pytest.approx(21 * min(pair.p for pair in organs))


def test_pairs_are_of_patients_that_both_have():
    """Cases that one model failed on are hard ones; they must not make it look better."""
    whole = made_up()
    dice = {case.name: sum(r["dice"] for r in whole.rows if r["case"] == case.name) for case in whole.cases}
    partly = made_up(drop={("ct_vnet", case) for case in sorted(dice, key=dice.get)[:4]})
    pair = summarise(partly).pair("dice", MEAN, "ct_unet", "ct_vnet")
    assert pair.patients == 8 and pair.difference == pytest.approx(0.05, abs=0.01)
    means = [summarise(partly).estimates["dice", m, MEAN].mean for m in ("ct_unet", "ct_vnet")]
    assert means[0] - means[1] < pair.difference
    assert partly.failed("ct_vnet") == 4 and partly.failed("ct_unet") == 0


def test_organs_that_only_one_has_are_no_part_of_the_mean():
    comparison = made_up(patients=3)
    rows = tuple(r for r in comparison.rows if not (r["model"] == "ct_vnet" and r["name"] == "jaw"))
    shared = tuple(name for name in ORGANS.values() if name != "jaw")
    summary = summarise(replace(comparison, rows=rows, shared=shared))
    own = [r["dice"] for r in rows if r["model"] == "ct_unet" and r["name"] != "jaw"]
    assert summary.estimates["dice", "ct_unet", MEAN].mean == pytest.approx(np.mean(own))
    assert math.isfinite(summary.estimates["dice", "ct_unet", "jaw"].mean)
    lacking = summary.estimates["dice", "ct_vnet", "jaw"]
    assert math.isnan(lacking.mean) and lacking.patients == 0
    assert math.isnan(summary.pair("dice", "jaw", "ct_unet", "ct_vnet").p)


def test_cases_of_one_patient_count_as_one():
    comparison = made_up(("ct_unet",), patients=2)
    cases = (*comparison.cases, replace(comparison.cases[0], name="again"))
    again = [{**r, "case": "again", "dice": 0.1} for r in comparison.rows if r["case"] == "case0"]
    both = replace(comparison, cases=cases, rows=(*comparison.rows, *again))
    values_MPO = both.values("dice")
    assert values_MPO.shape == (1, 2, len(ORGANS))
    first = next(r["dice"] for r in comparison.rows if r["case"] == "case0" and r["name"] == "jaw")
    assert values_MPO[0, 0, -1] == pytest.approx((first + 0.1) / 2)


def test_the_volume_error_has_no_sign():
    errors = (-30.0, 10.0)
    rows = tuple(
        {"model": "m", "case": f"case{n}", "patient": f"patient{n}"} | row(1, "brainstem", 0.5, 20.0, error)
        for n, error in enumerate(errors)
    )
    comparison = made_up(("m",), patients=2, rows=rows, shared=("brainstem",))
    assert summarise(comparison).estimates["volume_error", "m", MEAN].mean == 20


def test_a_missed_organ_counts_for_dice_and_not_for_hd95():
    missed = row(1, "brainstem", 0.0) | {"hd95_mm": None, "volume_ml": 0.0}
    rows = [
        {"model": "m", "case": "case0", "patient": "patient0"} | missed,
        {"model": "m", "case": "case1", "patient": "patient1"} | row(1, "brainstem", 0.8),
    ]
    comparison = made_up(("m",), patients=2, rows=tuple(rows), shared=("brainstem",))
    summary = summarise(comparison)
    assert summary.estimates["dice", "m", "brainstem"].mean == 0.4
    distance = summary.estimates["hd95_mm", "m", "brainstem"]
    assert distance.patients == 1 and distance.mean == pytest.approx(4)
    assert comparison.missed("m") == comparison.missed("m", "brainstem") == 1


def test_the_same_figures_give_the_same_summary():
    assert summarise(made_up()) == summarise(made_up())
    assert summarise(made_up(), seed=1) != summarise(made_up())


def test_nothing_finished_gives_no_figures():
    summary = summarise(made_up(("a", "b"), patients=2, rows=(), costs=()))
    assert all(math.isnan(one.mean) for one in summary.estimates.values())
    assert all(summary.best(measure) is None for measure in MEASURES)


def test_names_without_what_they_have_in_common():
    def short(*names):
        return [*made_up(names, patients=1).short.values()]

    assert short("ct_unet", "ct_unet_small", "ct_vnet") == ["unet", "unet_small", "vnet"]
    assert short("ct_unet sub-volumes", "ct_unet downsampled") == ["sub-volumes", "downsampled"]
    assert short("unet", "vnet") == ["unet", "vnet"] and short("ct_unet") == ["ct_unet"]


def test_the_clock_of_a_busy_machine():
    quiet = made_up(patients=3)
    busy = replace(quiet, costs=tuple({**one, "seconds": 5 * one["seconds"]} for one in quiet.costs))
    assert (quiet.clock, busy.clock) == ("seconds", "cpu_seconds")
    on_gpu = tuple({**one, "device_peak_mb": 900.0} for one in busy.costs)
    assert replace(busy, costs=on_gpu).clock == "seconds", "a CPU waits for a GPU"
    assert quiet.cost("ct_unet", "gflop") == 100 and quiet.cost("nobody", "gflop") is None
