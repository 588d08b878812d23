"""All models on all cases; what is done stays done, and what fails is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from medseg3d.compare.contenders import Conditions, Contender, contenders_of, numbers_of
from medseg3d.compare.page import write_page
from medseg3d.compare.result import Comparison, Model, Row
from medseg3d.compare.summary import summarise
from medseg3d.compare.tables import write_tables
from medseg3d.compare.worker import Failed, Worker
from medseg3d.data.datasets import Case
from medseg3d.errors import in_words
from medseg3d.io.labels import plain_name
from medseg3d.report.records import write_json
from medseg3d.report.run import input_sha256
from medseg3d.version import __version__

Progress = Callable[[str, str, int, int], None]  # model, what goes on, cases done, all cases


def compare(
    models: Iterable[str | Path | Contender],
    cases: Sequence[Case],
    output_dir: str | Path,
    labels: Mapping[int, str],
    strategies: Sequence[str] = (),
    title: str = "",
    device: str = "auto",
    precision: str = "auto",
    nsd_tolerance_mm: float = 2.0,
    trust: bool = False,
    progress: Progress | None = None,
    own_process: bool = True,
) -> Comparison:
    """Run models on cases with references, measure, and write tables and a page.

    In ``output_dir`` are then ``comparison.html``, ``comparison.md``, ``metrics.csv``, ``costs.csv``, ``summary.csv``,
    ``pairs.csv``, ``failures.csv`` if there are any, and a folder for each model with its segmentations and what was
    measured. A case is not done again unless its files, the model's or a setting changed.

    Args:
        models: bundles by name, folder or zip, or :class:`Contender` values.
        cases: of :func:`medseg3d.data.datasets.read_dataset`, each with one image and a label.
        labels: number -> name in the references. Models have theirs by name: numbers may differ.
        strategies: each model in each of these ("sub-volumes", "slices", "downsampled"); in its own if there are none.
        title: of the data.
        device, precision, trust: see :func:`medseg3d.load_model`.
        nsd_tolerance_mm: of the surface Dice.
        progress: called as ``progress(model, case, done, of)`` before each case.
        own_process: measure each model in a process of its own, so that its memory is. A script that calls this needs
            Python's ``if __name__ == "__main__":`` then.

    Raises:
        ValueError: no models or cases, a case without a label or with several images, two of one name, or no organ
            that a reference and a model both name.
        UntrustedBundle: a foreign bundle without ``trust``.
    """
    contenders = contenders_of(models, strategies)
    named = {number: name for number, name in labels.items() if number != 0}
    _check(cases, contenders, named, trust)
    conditions = Conditions(named, device, precision, nsd_tolerance_mm, trust)
    run = _Run(Path(output_dir), conditions, progress, own_process)
    for contender in contenders:
        run.do(contender, cases)
    result = run.result(contenders, cases, title)
    summary = summarise(result)
    write_tables(result, summary, run.folder)
    write_page(result, summary, run.folder / "comparison.html")
    return result


def _check(cases: Sequence[Case], contenders: Sequence[Contender], labels: Mapping[int, str], trust: bool) -> None:
    if not cases:
        raise ValueError("a comparison is on one case or more, got none")
    for case in cases:
        if case.label is None or len(case.images) != 1:
            has = f"{len(case.images)} images" if case.label is not None else "no label"
            raise ValueError(f"a case of a comparison has one image and a label, but {case.name} has {has}")
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise ValueError(f"each case needs a name of its own, got two called {twice[0]}")
    for contender in contenders:
        contender.bundle.require_trust(trust)
        if not numbers_of(contender.bundle.labels, labels):
            raise ValueError(
                f"{contender.title} has no label of the references: it has "
                f"{', '.join(contender.bundle.labels.values())}; they have {', '.join(labels.values()) or 'no names'}"
            )


@dataclass
class _Run:
    """Records of all models so far: (model, case) -> what :meth:`Bench.measure` gave, or how it failed."""

    folder: Path
    conditions: Conditions
    progress: Progress | None
    own_process: bool
    records: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    failures: list[Row] = field(default_factory=list)

    def do(self, contender: Contender, cases: Sequence[Case]) -> None:
        """The cases that are not done."""
        left = [case for case in cases if not self._is_done(contender, case)]
        if not left:
            return
        own = self._own(contender)
        own.mkdir(parents=True, exist_ok=True)
        with Worker(contender, self.conditions, self.own_process) as worker:
            try:
                self._tell(contender, "loading", len(cases) - len(left), len(cases))
                worker.load()
            except Failed as failed:
                self._failed(contender, "", failed)
                return
            for n, case in enumerate(left, start=len(cases) - len(left)):
                self._tell(contender, case.name, n, len(cases))
                try:
                    self._measure(contender, case, worker)
                except Failed as failed:
                    self._failed(contender, case.name, failed)

    def _measure(self, contender: Contender, case: Case, worker: Worker) -> None:
        try:
            key = self._key(contender, case)
        except OSError as error:
            raise Failed(in_words(error)) from error
        prediction, path = self._files(contender, case)
        path.unlink(missing_ok=True)  # a record and its segmentation belong together
        record = {"key": key, **worker.measure(case, prediction)}
        write_json(path, record)
        self.records[contender.title, case.name] = record

    def _is_done(self, contender: Contender, case: Case) -> bool:
        """Whether an earlier run did the case; then its record is taken."""
        prediction, path = self._files(contender, case)
        if prediction.is_file() and path.is_file():
            # A damaged record, or one of before a file was gone: the case is done again.
            with suppress(ValueError, KeyError, TypeError, OSError):
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["key"] == self._key(contender, case):
                    self.records[contender.title, case.name] = record
                    return True
        return False

    def _files(self, contender: Contender, case: Case) -> tuple[Path, Path]:
        own = self._own(contender)
        return own / f"{case.name}_seg.nii.gz", own / f"{case.name}.json"

    def _own(self, contender: Contender) -> Path:
        return self.folder / contender.slug

    def _key(self, contender: Contender, case: Case) -> dict[str, Any]:
        """What a result depends on."""
        settings = self.conditions
        return {
            "medseg3d": __version__,
            "bundle_sha256": contender.sha256,
            "strategy": contender.strategy,
            "device": settings.device,
            "precision": settings.precision,
            "nsd_tolerance_mm": settings.nsd_tolerance_mm,
            "labels": {str(number): name for number, name in settings.labels.items()},
            "annotated": None if case.annotated is None else list(case.annotated),
            "files_sha256": [input_sha256(file) for file in case.files],
        }

    def _tell(self, contender: Contender, what: str, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(contender.title, what, done, of)

    def _failed(self, contender: Contender, case: str, failed: Failed) -> None:
        self.failures.append({"model": contender.title, "case": case, "error": str(failed)})

    def result(self, contenders: Sequence[Contender], cases: Sequence[Case], title: str) -> Comparison:
        labels = self.conditions.labels
        own = {contender: numbers_of(contender.bundle.labels, labels).values() for contender in contenders}
        patients = {case.name: case.patient for case in cases}
        rows, costs = [], []
        for (model, case), record in self.records.items():
            first = {"model": model, "case": case, "patient": patients[case]}
            rows += [{**first, **row} for row in record["rows"]]
            costs.append({**first, **record["costs"]})
        return Comparison(
            title=title,
            models=tuple(map(self._model, contenders)),
            cases=tuple(cases),
            labels=labels,
            shared=tuple(name for number, name in labels.items() if all(number in have for have in own.values())),
            rows=tuple(rows),
            costs=tuple(costs),
            failures=tuple(self.failures),
            predictions={
                (contender.title, case.name): self._files(contender, case)[0]
                for contender in contenders
                for case in cases
                if (contender.title, case.name) in self.records
            },
            notes=tuple(dict.fromkeys(self._notes(contenders, cases))),
            machines=tuple(dict.fromkeys(record["machine"] for record in self.records.values())),
            nsd_tolerance_mm=self.conditions.nsd_tolerance_mm,
        )

    def _model(self, contender: Contender) -> Model:
        model = partial(Model, contender.title, tuple(contender.bundle.labels.values()), contender.sha256)
        own = [record for (title, _), record in self.records.items() if title == contender.title]
        if not own:
            return model()
        names = ("strategy", "parameters", "load_seconds", "precision")
        return model(**{name: own[-1][name] for name in names})

    def _notes(self, contenders: Sequence[Contender], cases: Sequence[Case]) -> Iterator[str]:
        """What is left out of means, and what models told of their cases, a line for each kind."""
        labels = self.conditions.labels
        for contender in contenders:
            have = numbers_of(contender.bundle.labels, labels).values()
            lacking = [name for number, name in labels.items() if number not in have]
            if lacking:
                yield f"{contender.title} has no {', '.join(lacking)}: left out of all means"
            known = {plain_name(name) for name in labels.values()}
            further = [name for name in contender.bundle.labels.values() if plain_name(name) not in known]
            if further:
                yield f"{contender.title} has {', '.join(further)}, which the references do not: not measured"
        partly = sum(case.annotated is not None and bool(labels.keys() - set(case.annotated)) for case in cases)
        if partly:
            yield f"in {partly} of {len(cases)} cases not all organs were annotated; those that were not do not count"
        for (model, _), record in self.records.items():
            yield from (f"{model}: {note}" for note in record["notes"])
