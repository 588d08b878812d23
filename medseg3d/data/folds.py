"""Folds for cross-validation: by patient, balanced, the same for everybody who gives the same seed."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from medseg3d.data.datasets import Case, Dataset


def make_folds(
    dataset: Dataset, count: int, seed: int = 0, present: Mapping[str, Collection[int]] | None = None
) -> Dataset:
    """The same data set with a fold, 0 to `count` - 1, for every case that is not for the test.

    All cases of a patient are in one fold. Patients with many cases are dealt first, then those with rare labels, as
    cards are, forth and back: so folds differ by one patient at most, and cases and labels are spread over them.
    Patients who are alike in this are ordered by a hash of seed and name: the order of the list does not matter.

    The validation cases join the others as "train": with folds, each is for validation once.

    Args:
        dataset: cases with patients; those without a label get no fold.
        count: number of folds, at least 2.
        seed: another one deals otherwise.
        present: the labels that each case, by its name, has in its label map.

    Raises:
        ValueError: there are fewer patients than folds, or fewer than 2 folds.
    """
    patients: dict[str, list[Case]] = defaultdict(list)
    for case in dataset.cases:
        if _to_deal(case):
            patients[case.patient].append(case)
    if not 2 <= count <= len(patients):
        most = f"2 to {len(patients)}" if len(patients) > 1 else "no"
        raise ValueError(
            f"there can be {most} folds, one patient each at least, got {count}; {dataset.name} has "
            f"{len(patients)} patients with labels that are not for the test"
        )
    labels = {
        patient: {label for case in cases for label in (present or {}).get(case.name, ())}
        for patient, cases in patients.items()
    }
    patients_with = Counter(label for found in labels.values() for label in found)
    rarest_first = sorted(patients_with, key=lambda label: (patients_with[label], label))

    def place(patient: str) -> tuple[int, list[bool], str]:
        signature = [label not in labels[patient] for label in rarest_first]
        return -len(patients[patient]), signature, hashlib.sha256(f"{seed} {patient}".encode()).hexdigest()

    fold_of = {patient: _dealt(n, count) for n, patient in enumerate(sorted(patients, key=place))}
    cases = [
        replace(case, fold=fold_of[case.patient], split="train") if _to_deal(case) else case for case in dataset.cases
    ]
    return replace(dataset, cases=tuple(cases))


def _to_deal(case: Case) -> bool:
    return case.split != "test" and case.label is not None


def _dealt(n: int, count: int) -> int:
    """0 1 2 2 1 0 0 1 2 ... for a count of 3."""
    lap, place = divmod(n, count)
    return count - 1 - place if lap % 2 else place
