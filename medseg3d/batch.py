"""Many scans through one model: named outputs, failures that stop nobody else, and a run that can be taken up again."""

from __future__ import annotations

import csv
import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medseg3d.errors import in_words, is_out_of_memory
from medseg3d.geometry import Geometry
from medseg3d.io import Case, Inputs, find_inputs, read_dicom
from medseg3d.outputs import FAILURES, MASK, SIDE_FILES, STATISTICS, OutputPlan
from medseg3d.report.ledger import Ledger
from medseg3d.report.records import write_csv
from medseg3d.report.run import Stopwatch, case_record, input_sha256
from medseg3d.report.statistics import write_statistics_json

if TYPE_CHECKING:  # to plan the outputs of a command takes no torch
    from medseg3d.pictures import Picture, PictureSegmentation, PictureSegmenter
    from medseg3d.segmentation import Scan, Segmentation
    from medseg3d.segmenter import Segmenter
    from medseg3d.several import SeveralModels

logger = logging.getLogger(__name__)

_FAILURE = ("case", "input", "error")

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class CaseResult:
    """What became of one scan or picture.

    Attributes:
        case: name, path and kind of the input.
        result: the segmentation; None if it failed or was finished by an earlier run.
        outputs: files written, by kind ("segmentation", "statistics", "preview", "json", "mask 1").
        error: why it failed, in one line; None if it did not.
        resumed: True if an earlier run had finished it.
        out_of_memory: True if that is why it failed.
    """

    case: Case
    result: Segmentation | PictureSegmentation | None = None
    outputs: dict[str, Path] = field(default_factory=dict)
    error: str | None = None
    resumed: bool = False
    out_of_memory: bool = False

    def record(self) -> dict[str, Any]:
        """The case for a run report."""
        geometry: Geometry | None = getattr(self.result.image, "geometry", None) if self.result else None
        return case_record(
            self.case.name,
            self.case.path,
            geometry,
            self.outputs,
            self.result.seconds if self.result else {},
            (
                *(self.result.warnings if self.result else ()),
                *(("finished by an earlier run",) if self.resumed else ()),
            ),
            self.error,
            self.result.crop if self.result else None,
        )


def predict_many(
    segmenter: Segmenter | SeveralModels | PictureSegmenter,
    inputs: Inputs | Sequence[str | Path] | str | Path,
    output: str | Path | OutputPlan,
    resume: bool = False,
    allow_non_hu: bool = False,
    progress: Callable[[Case, str], None] | None = None,
    background_io: bool = True,
    series: str | None = None,
) -> Iterator[CaseResult]:
    """Segment scans, or pictures, one after another and write each as soon as it is done.

    While the network works on one, the next is read and the result before is written, each on a thread. So a case
    is yielded, in order, once its files are on disk, when the network may be done with the next. Whatever ends the run,
    Ctrl-C included, what is being written then is finished first, the threads end, and the folder's tables are written.

    A case that fails is yielded with its error and the next one begins; ``failures.csv`` in the output folder lists
    them. Several runs may write into one folder, at the same time too; its tables are of all that it holds. In a folder
    each finished case is noted, so that ``resume`` passes over those whose input, model and options are what they were.
    A case that is done again by another model, or of another input, loses what lay beside its segmentation and this run
    does not write; so does a single file whose content changes.

    Args:
        segmenter: the loaded model.
        inputs: files, folders, DICOM folders, zips, patterns; see :func:`medseg3d.io.find_inputs`.
        output: a folder, a file for a single case, or an :class:`OutputPlan`. The map of uncertainty that a model makes
            is written too.
        progress: called, always on the caller's thread, with a case and the name of each stage as the run comes to it.
        background_io: read and write beside the network. False takes each case to its end before the next is begun,
            which is slower but keeps one scan in memory; else there are up to three, and two results. A segmenter whose
            memory is limited does so in any case: its plans are of one scan.
        series: which series of DICOM files to read, see :func:`medseg3d.io.read_dicom`; by default the largest CT.

    Raises:
        ValueError, OSError: nothing to read, nowhere to write, or a plan of another map of uncertainty; before the
            first case.
    """
    pictures = segmenter.pictures
    found = inputs if isinstance(inputs, Inputs) else find_inputs(inputs, pictures is not None)
    plan = output if isinstance(output, OutputPlan) else OutputPlan(Path(output), pictures=pictures)
    if plan.masks and pictures is not None:
        raise ValueError("masks are of scans, and the model segments pictures: leave them out")
    plan = plan.of(getattr(segmenter, "uncertainty", None), segmenter.labels if plan.masks else {})
    plan.prepare(found, resume=resume)
    options = {"suffix": plan.suffix or plan.writable[0], "allow_non_hu": allow_non_hu}
    options |= {} if series is None else {"series": series}
    model = {name: segmenter.record.get(name) for name in ("bundle_sha256", "settings")}
    ledger = Ledger(None if plan.is_file else plan.folder, {"model": model, **options})
    run = _Run(segmenter, plan, ledger, resume, allow_non_hu, progress, series)
    overlapped = background_io and not getattr(segmenter, "limited", False)
    return _results(run, found, plan, _overlapped if overlapped else _one_by_one)


def _results(run: _Run, inputs: Inputs, plan: OutputPlan, each: Callable[..., Generator]) -> Iterator[CaseResult]:
    failures: list[dict[str, Any]] = []
    tried: set[str] = set()
    try:
        with (
            closing(each(run.read, inputs.cases)) as scans,
            closing(each(run.write, run.segmented(inputs.cases, scans))) as outcomes,
        ):
            for outcome in outcomes:
                tried.add(outcome.case.name)
                if outcome.error is not None:
                    row = outcome.case.name, str(outcome.case.path), outcome.error
                    failures.append(dict(zip(_FAILURE, row, strict=True)))
                yield outcome
                del outcome  # its arrays are not ours to keep while the next one is made
    finally:  # after Ctrl-C too, what is finished is in the tables
        if not plan.is_file:
            with run.ledger.read_anew():
                _write_tables(plan, run.ledger, run.replaced)
                _write_failures(plan.folder / FAILURES, failures, tried, run.ledger)


def _write_tables(plan: OutputPlan, ledger: Ledger, replaced: Collection[str]) -> None:
    """What is in one file for all finished cases of a folder, those of earlier runs too.

    ``replaced`` are the kinds of files that cases of this run had from another model or input.
    """
    figures, documents = {}, []
    counted = replace(plan, statistics=plan.statistics or "statistics" in replaced)
    for name, kinds in sorted(ledger.finished_cases.items()):
        files = {kind: path for kind, path in counted.files(name).items() if kind in kinds and path.is_file()}
        if "statistics" in files:
            with suppress(ValueError):  # somebody else's file of that name
                figures[name] = json.loads(files["statistics"].read_text(encoding="utf-8"))
        if "json" in files and ledger.is_of_this_model(name):  # others may have other classes
            documents.append(files["json"])
    if figures:
        plan.write_table(plan.folder / STATISTICS, figures)
    elif "statistics" in replaced:
        (plan.folder / STATISTICS).unlink(missing_ok=True)
    if documents:
        from medseg3d.io.results import join_results

        join_results(plan.folder / f"{plan.pictures}.json", documents)


def _write_failures(path: Path, failures: list[dict[str, Any]], tried: Collection[str], ledger: Ledger) -> None:
    """The cases that failed, with those of earlier runs that nobody has tried again."""
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            earlier = [row for row in csv.DictReader(file) if row.get("case") not in {*tried, *ledger.finished_cases}]
        failures = [{name: row.get(name) for name in _FAILURE} for row in earlier] + failures
    if failures:
        write_csv(path, failures, _FAILURE)
    else:
        path.unlink(missing_ok=True)


def _one_by_one(function: Callable[[S], T], items: Iterable[S]) -> Generator[T, None, None]:
    for item in items:
        made = function(item)
        del item  # nor are the arrays of these to be kept while the next one is made
        yield made
        del made


def _overlapped(function: Callable[[S], T], items: Iterable[S]) -> Generator[T, None, None]:
    """The same, but each call runs on a thread, meanwhile the item after it is fetched. No more than that is ahead."""
    calls: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "medseg3d") as thread:  # waits for the call that is running, whatever is raised
        try:
            for item in items:
                calls.append(thread.submit(function, item))
                if len(calls) == 2:
                    yield calls.popleft().result()
            for call in calls:
                yield call.result()
        except KeyboardInterrupt:  # what has begun ends, but nothing else begins
            thread.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Run:
    """The steps of each case: read, segment, write. After one that fails the others pass on what it returned."""

    segmenter: Any  # of any kind: each reads what it segments
    plan: OutputPlan
    ledger: Ledger
    resume: bool
    allow_non_hu: bool
    progress: Callable[[Case, str], None] | None
    series: str | None
    replaced: set[str] = field(default_factory=set)  # kinds of files, of another model or input

    def read(self, case: Case) -> Scan | Picture | CaseResult:
        return _attempt(case, self._read, case)

    def segmented(
        self, cases: Sequence[Case], scans: Iterator[Scan | Picture | CaseResult]
    ) -> Iterator[tuple[Case, Segmentation | PictureSegmentation | CaseResult]]:
        """Each case with its result. Runs on the caller's thread, and so does `progress`."""
        for case in cases:
            self._tell(case, "read")
            got: Any = next(scans)
            if not isinstance(got, CaseResult):
                doubts = getattr(got, "warnings", ())  # pictures come without
                got = _attempt(case, self._segment, case, got)
                if isinstance(got, CaseResult) and doubts:  # wrong units, for instance, end in a lack of memory
                    got = replace(got, error=f"{got.error} (of the scan: {'; '.join(doubts)})")
            yield case, got
            del got

    def write(self, item: tuple[Case, Segmentation | PictureSegmentation | CaseResult]) -> CaseResult:
        case, got = item
        return got if isinstance(got, CaseResult) else _attempt(case, self._write, case, got)

    def _tell(self, case: Case, stage: str) -> None:
        if self.progress is not None:
            self.progress(case, stage)

    def _read(self, case: Case) -> Scan | Picture | CaseResult:
        files = self.plan.files(case.name)
        if self.resume and self.ledger.finished(case, files):
            return CaseResult(case, outputs=files, resumed=True)
        return read_case(self.segmenter, case, self.allow_non_hu, self.series)

    def _segment(self, case: Case, scan: Scan | Picture) -> Segmentation | PictureSegmentation:
        result = self.segmenter.segment(scan, progress=partial(self._tell, case))
        self._tell(case, "write")
        return result

    def _write(self, case: Case, result: Segmentation | PictureSegmentation) -> CaseResult:
        files = self.plan.files(case.name)
        if self.ledger.is_of_another_input(case, files):
            words = f"{files['segmentation'].name} of another input was replaced: that had the same name, {case.name}"
            result = replace(result, warnings=(*result.warnings, words))
        same = self.ledger.has_labels_of(case)
        had = self.ledger.forget(case)  # the files of an earlier run are about to be replaced, one after another
        if not same:
            self.replaced.update(had)
            self._remove_others(case.name, had)
        target = files["segmentation"]
        earlier = input_sha256(target) if self.plan.is_file and target.is_file() else None
        _write(result, case, files, self.plan)
        if earlier not in (None, input_sha256(target)):  # no ledger tells what the files beside it were made of
            self._remove_others(case.name, (*SIDE_FILES, MASK))
        self.ledger.note(case, had.union(files) if same else files)
        return CaseResult(case, result, files)

    def _remove_others(self, name: str, kinds: Collection[str]) -> None:
        """Remove the files of these kinds that tell of another segmentation, and that this run does not write."""
        masks = self.plan.masks_of_others(name) if any(kind.startswith(MASK) for kind in kinds) else set()
        for path in masks | self.plan.files_of_others(name, kinds):
            path.unlink(missing_ok=True)


def read_case(segmenter: Any, case: Case, allow_non_hu: bool = False, series: str | None = None) -> Any:
    """What a segmenter reads of a case; of DICOM files the series of that name."""
    if series is None or case.kind != "dicom":
        return segmenter.read(case.path, allow_non_hu=allow_non_hu)
    stopwatch = Stopwatch()
    with stopwatch.stage("read"):
        volume = read_dicom(case.path, series)
        scan = segmenter.read(volume, allow_non_hu=allow_non_hu)
    return replace(scan, seconds=dict(stopwatch.seconds))


def _attempt(case: Case, step: Callable[..., T], *arguments: Any) -> T | CaseResult:
    """What a step returns, or how the case failed."""
    try:
        return step(*arguments)
    except Exception as error:  # one bad case must not stop the others, whatever is wrong with it
        logger.debug("%s failed", case.path, exc_info=True)
        return _failed(case, error)


def _write(result: Any, case: Case, files: dict[str, Path], plan: OutputPlan) -> None:
    """All files of a case; if one of them fails, those before it are removed."""
    done: list[Path] = []
    try:
        if "statistics" in files:
            figures = result.statistics()
            done.append(write_statistics_json(files["statistics"], figures))
            if "statistics_csv" in files:
                done.append(plan.write_table(files["statistics_csv"], {case.name: figures}))
        if "preview" in files:
            done.append(result.preview(files["preview"], title=case.name))
        if "uncertainty" in files:
            done.append(result.save_uncertainty(files["uncertainty"]))
        if "json" in files:
            done.append(result.save(files["json"]))
        for kind, path in files.items():
            if kind.startswith(MASK):
                path.parent.mkdir(exist_ok=True)
                done.append(result.save_mask(int(kind.removeprefix(MASK)), path))
        # Last of all, so that a segmentation on disk means that its case is complete.
        result.save(files["segmentation"])
    except BaseException:  # Ctrl-C too
        for path in done:
            path.unlink(missing_ok=True)
        raise


def _failed(case: Case, error: Exception) -> CaseResult:
    out_of_memory = is_out_of_memory(error)
    reason = in_words(error)
    if out_of_memory and not isinstance(error, ValueError):  # that one tells enough
        reason = f"out of memory ({reason}): crop the scan, or use a machine with more"
    return CaseResult(case, error=reason, out_of_memory=out_of_memory)
