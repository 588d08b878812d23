"""Folds keep patients together, are even, and do not depend on the order of the list."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.data.datasets import Case, Dataset
from medseg3d.data.folds import make_folds


def dataset(patients, split="train"):
    """A case for each patient that is named; a patient may be named several times."""
    cases = (Case(f"{p}_{n}", (Path(f"{n}"),), Path("label"), p, split) for n, p in enumerate(patients))
    return Dataset("d", Path(), tuple(cases))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 3))
def test_patients_stay_together_and_folds_are_even(numbers, count, seed):
    patients = [f"p{n}" for n in numbers]
    if len(set(patients)) < count:
        return
    folds = defaultdict(set)
    for case in make_folds(dataset(patients), count, seed).cases:
        folds[case.patient].add(case.fold)
    assert all(len(found) == 1 for found in folds.values())
    sizes = Counter(fold for (fold,) in folds.values())
    assert set(sizes) == set(range(count)) and max(sizes.values()) - min(sizes.values()) <= 1


def test_the_order_of_the_list_does_not_matter_but_the_seed_does():
    data = dataset([f"p{n}" for n in range(20)])
    shuffled = list(data.cases)
    random.Random(1).shuffle(shuffled)
    first, again = make_folds(data, 4, 7), make_folds(replace(data, cases=tuple(shuffled)), 4, 7)
    assert {c.name: c.fold for c in first.cases} == {c.name: c.fold for c in again.cases}
    assert {c.name: c.fold for c in make_folds(data, 4, 8).cases} != {c.name: c.fold for c in first.cases}


def test_the_same_on_every_machine():
    folds = [case.fold for case in make_folds(dataset([f"p{n}" for n in range(8)]), 3, 0).cases]
    assert folds == [0, 0, 2, 2, 1, 1, 1, 0]


def test_rare_labels_are_spread():
    data = dataset([f"p{n}" for n in range(40)])
    present = {case.name: {1, 2} if n < 5 else {1} for n, case in enumerate(data.cases)}
    present |= {case.name: {1, 3} for case in data.cases[30:]}
    dealt = make_folds(data, 5, 0, present).cases
    assert sorted(case.fold for case in dealt[:5]) == [0, 1, 2, 3, 4]
    assert Counter(case.fold for case in dealt[30:]) == dict.fromkeys(range(5), 2)


def test_patients_with_many_scans_are_spread():
    data = dataset(["a"] * 6 + ["b"] * 6 + [f"p{n}" for n in range(8)])
    sizes = Counter(case.fold for case in make_folds(data, 2).cases)
    assert sizes[0] == sizes[1] == 10


def test_test_cases_and_unlabelled_ones_are_left_and_validation_joins():
    cases = (*dataset("abcd").cases, *dataset("ef", "validation").cases, *dataset("g", "test").cases)
    unlabelled = replace(cases[0], name="u", patient="u", label=None)
    made = make_folds(Dataset("d", Path(), (*cases, unlabelled)), 3)
    assert Counter(case.split for case in made.cases) == {"train": 7, "test": 1}
    assert [case.fold for case in made.cases[-2:]] == [None, None]
    assert Counter(case.fold for case in made.cases[:6]) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("count", [-1, 0, 1, 4])
def test_too_many_or_too_few(count):
    with pytest.raises(ValueError, match=r"there can be 2 to 3 folds, .*; d has 3 patients with labels"):
        make_folds(dataset("aabc"), count)
