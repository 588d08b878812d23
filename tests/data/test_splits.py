"""Which cases are trained on, which are for validation, and whose they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medseg3d.data.datasets import Case, Dataset, with_patients


class TestSplits:
    DATASET = Dataset(
        "d",
        Path(),
        tuple(
            Case(name, (Path(name),), Path("label"), name, split, fold)
            for name, split, fold in [("a", "train", 0), ("b", "train", 1), ("c", "train", None), ("t", "test", None)]
        ),
    )

    def names(self, split, fold=None, dataset=DATASET):
        return [case.name for case in dataset.of_split(split, fold)]

    def test_the_first_fold_is_for_validation_unless_another_is_asked_for(self):
        assert (self.names("train"), self.names("validation"), self.names("test")) == (["b", "c"], ["a"], ["t"])
        assert (self.names("train", 1), self.names("validation", 1), self.names("test", 1)) == (
            ["a", "c"],
            ["b"],
            ["t"],
        )

    def test_a_validation_split_comes_before_folds(self):
        cases = tuple(replace(c, split="validation") if c.name == "c" else c for c in self.DATASET.cases)
        dataset = replace(self.DATASET, cases=cases)
        assert (self.names("train", None, dataset), self.names("validation", None, dataset)) == (["a", "b"], ["c"])
        assert (self.names("train", 1, dataset), self.names("validation", 1, dataset)) == (["a", "c"], ["b"])

    def test_errors(self):
        with pytest.raises(ValueError, match="no case in split 'val'"):
            self.names("val")
        with pytest.raises(ValueError, match=r"d has no fold 5; it has \[0, 1\]"):
            self.names("train", 5)


def test_patients_are_found_in_names():
    cases = tuple(Case(name, (Path(name),), None, name) for name in ("GLI-005-000", "GLI-005-001"))
    dataset = Dataset("d", Path(), cases)
    assert {case.patient for case in with_patients(dataset, r"^(\w+-\d+)-").cases} == {"GLI-005"}
    assert {case.patient for case in with_patients(dataset, r"\d+$").cases} == {"000", "001"}
    for pattern in ("BraTS", "[0-9]*", "(BraTS)?GLI"):  # none, an empty one, a group that takes no part
        with pytest.raises(ValueError, match="finds no patient in the name of the case 'GLI-005-000'"):
            with_patients(dataset, pattern)
    with pytest.raises(ValueError, match="is no regular expression"):
        with_patients(dataset, "(")
