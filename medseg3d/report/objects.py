"""Numbered objects in label images against those of references: a row for each picture, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg3d.errors import in_words
from medseg3d.io import read_coco, read_label_image, sidecar_path
from medseg3d.io.formats import split_name
from medseg3d.metrics import CocoPrecision, CocoRules, ObjectCounts
from medseg3d.metrics.average_precision import MANY_OBJECTS
from medseg3d.report.pairing import Files, pair_cases
from medseg3d.report.records import write_csv
from medseg3d.tasks import Instances

COLUMNS = ("case", "predicted", "reference", "found", "false_alarms", "missed", "precision", "recall", "f1")


@dataclass(frozen=True)
class ObjectEvaluation:
    """``rows``: a dictionary of ``COLUMNS`` for each picture. ``total``: the counts of all. ``precision``: the ranking
    of all detections; None where no prediction has scores. ``unpaired``: files left out, and why. ``failures``:
    pictures that could not be compared, and why."""

    rows: Sequence[dict[str, Any]]
    total: ObjectCounts
    precision: CocoPrecision | None
    unpaired: Sequence[tuple[Path, str]]
    failures: Sequence[tuple[str, str]] = ()


def evaluate_objects(predictions: Files, references: Files, threshold: float = 0.5) -> ObjectEvaluation:
    """Every label image against the reference of its picture, object by object and whatever their class.

    Files are paired by name as those of scans are, see :func:`medseg3d.report.pairing.pair_cases`. Where a COCO file
    `<stem>.json` lies beside a prediction, its objects are taken, with their scores. A picture that fails does not stop
    the others.

    Args:
        threshold: intersection over union from which an object is found.

    Raises:
        ValueError, OSError: nothing to compare; or all pictures fail, such as files that are no label images, or two of
            different size.
    """
    found = pair_cases(predictions, references, pictures=True)
    rows, total, ranked = [], ObjectCounts(), []
    rules = CocoRules(limits=(MANY_OBJECTS,))
    errors: dict[str, Exception] = {}
    scored = False
    for case, (prediction, reference) in found.pairs.items():
        try:
            predicted, expected = _predicted(prediction), Instances.from_label_map(read_label_image(reference))
            if predicted.shape != expected.shape:
                raise ValueError(f"{prediction} has {predicted.shape} pixels and {reference} {expected.shape}")
        except (ValueError, OSError) as error:
            errors[case] = error
            continue
        counts = ObjectCounts.of(predicted, expected, threshold)
        scored = scored or bool((predicted.scores != 1).any())
        ranked.append(CocoPrecision.of(predicted, expected, rules=rules))
        rows.append({"case": case, "predicted": len(predicted), "reference": len(expected), **_record(counts)})
        total += counts
    if errors and not rows:
        raise next(iter(errors.values()))
    precision = CocoPrecision.joined(ranked, rules) if scored else None
    failures = [(case, in_words(error)) for case, error in errors.items()]
    return ObjectEvaluation(rows, total, precision, found.unpaired, failures)


def write_objects_csv(path: str | Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one line per picture, atomically; what is not defined is left empty."""
    return write_csv(path, rows, COLUMNS)


def objects_table(evaluation: ObjectEvaluation, threshold: float = 0.5) -> str:
    """The counts of all pictures and what follows from them, as text."""
    total = evaluation.total
    lines = [
        f"pictures      {len(evaluation.rows)}",
        f"found         {total.found}",
        f"false alarms  {total.false_alarms}",
        f"missed        {total.missed}",
        f"precision     {_digits(total.precision)}",
        f"recall        {_digits(total.recall)}",
        f"F1            {_digits(total.f1)}  at an intersection over union of {threshold:g}",
    ]
    if evaluation.precision is not None:
        lines.append(f"AP50          {_digits(evaluation.precision.average_precision(0.5))}")
        lines.append(f"AP            {_digits(evaluation.precision.average_precision())}  mean of 0.5 to 0.95")
    return "\n".join(lines)


def _predicted(path: Path) -> Instances:
    if sidecar_path(path).is_file():
        raise ValueError(
            f"the numbers in {path} are classes, not objects: compare them with medseg3d.metrics.Confusion"
        )
    document = path.with_name(f"{split_name(path)[0]}.json")
    if not document.is_file():
        return Instances.from_label_map(read_label_image(path))
    found = read_coco(document).instances(1)
    return Instances(found.shape, found.regions, scores=found.scores)


def _record(counts: ObjectCounts) -> dict[str, Any]:
    record = {name: getattr(counts, name) for name in COLUMNS[3:]}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}


def _digits(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
