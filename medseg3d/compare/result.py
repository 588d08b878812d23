"""What a comparison found: a row for each model, case and organ, and what each case cost each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from medseg3d.data.datasets import Case

Row = Mapping[str, Any]


def spaced(name: str) -> str:
    """An organ's name as it is read, not as it is stored."""
    return name.replace("_", " ")


@dataclass(frozen=True)
class Model:
    """What tables say of a model.

    Attributes:
        name: as the contender is called.
        strategy: name of its strategy's class; with parameters None where no case was finished.
        labels: names of its labels, background left out.
        sha256: of the bundle's configs, scripts and weights.
    """

    name: str
    labels: tuple[str, ...]
    sha256: str
    strategy: str | None = None
    parameters: int | None = None
    load_seconds: float | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Models on the same cases.

    Attributes:
        title: of the data.
        models: in the order given.
        cases: that were to be done, with their patients.
        labels: the references' label number -> name, background left out.
        shared: the names of those that every model has: means are over these.
        rows: of `evaluate_case`, with "model", "case" and "patient" in front.
        costs: "model", "case", "seconds", "cpu_seconds", "network_seconds", "peak_memory_mb", "held_before_mb",
            "device_peak_mb", "windows", "gflop"; None where that is not known.
        failures: "model", "case" and "error"; the case is empty where the model could not be loaded.
        predictions: (model, case) -> file of the segmentation, in the model's own numbers.
        notes: what a reader should know.
        machines: where models ran, in words; several if an earlier run was on another.
        nsd_tolerance_mm: of the surface Dice.
    """

    title: str
    models: tuple[Model, ...]
    cases: tuple[Case, ...]
    labels: Mapping[int, str]
    shared: tuple[str, ...]
    rows: tuple[Row, ...]
    costs: tuple[Row, ...]
    failures: tuple[Row, ...]
    predictions: Mapping[tuple[str, str], Path]
    notes: tuple[str, ...]
    machines: tuple[str, ...]
    nsd_tolerance_mm: float = 2.0

    @cached_property
    def patients(self) -> tuple[str, ...]:
        """Patients of the cases, each once."""
        return tuple(dict.fromkeys(case.patient for case in self.cases))

    @cached_property
    def short(self) -> Mapping[str, str]:
        """Name of a model -> that without what all names begin with."""
        names = sorted(model.name for model in self.models)
        ends = zip(names[0], names[-1], strict=False)  # in order, these differ first
        common = names[0][: next((n for n, (a, b) in enumerate(ends) if a != b), len(names[0]))]
        cut = 1 + max(common.rfind(mark) for mark in " _") if len(names) > 1 else 0
        return {model.name: model.name[cut:] for model in self.models}

    @property
    def clock(self) -> str:
        """The one of `costs` that tells how long a case takes: "seconds", or "cpu_seconds" if others were busy there.

        They were if on a CPU a case waited more than it computed.
        """
        ours = [row for row in self.costs if row["device_peak_mb"] is None]
        waited = sum(row["seconds"] > 2 * row["cpu_seconds"] for row in ours)
        return "cpu_seconds" if waited > len(self.costs) / 2 else "seconds"

    @property
    def organs(self) -> tuple[str, ...]:
        """Names of the references' labels."""
        return tuple(self.labels.values())

    def values(self, measure: str) -> np.ndarray:
        """(models, patients, organs) of a column of `rows`, the mean where a patient has several cases.

        NaN where there is none: not annotated, absent, not defined, failed, or not a label of the model's.
        "volume_error" is the column volume_error_percent without its sign.
        """
        column = "volume_error_percent" if measure == "volume_error" else measure
        places = [{name: n for n, name in enumerate(names)} for names in self._axes]
        sums, counts = np.zeros((2, *map(len, places)))
        for row in self.rows:
            value = row[column]
            if value is not None:
                at = tuple(of[row[key]] for of, key in zip(places, ("model", "patient", "name"), strict=True))
                sums[at] += abs(value) if measure == "volume_error" else value
                counts[at] += 1
        return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)

    @property
    def _axes(self) -> tuple[Sequence[str], ...]:
        return [model.name for model in self.models], self.patients, self.organs

    def cost(self, model: str, name: str) -> float | None:
        """The median over the model's cases of one of `costs`; None where no case has it."""
        values = [row[name] for row in self.costs if row["model"] == model and row[name] is not None]
        return median(values) if values else None

    def worst(self, model: str, name: str) -> float | None:
        """The highest of a model's `costs` of a name."""
        return max((row[name] for row in self.costs if row["model"] == model and row[name] is not None), default=None)

    def missed(self, model: str, organ: str | None = None) -> int:
        """How often the model gave nothing of an organ that is there; of all shared organs by default."""
        organs = self.shared if organ is None else (organ,)
        own = (row for row in self.rows if row["model"] == model and row["name"] in organs)
        return sum(row["dice"] is not None and row["volume_ml"] == 0 for row in own)

    def failed(self, model: str) -> int:
        """Cases that the model did not finish."""
        return len(self.cases) - sum(row["model"] == model for row in self.costs)
