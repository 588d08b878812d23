"""Predictions against references: a row per case and label, means per label."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg3d.errors import in_words
from medseg3d.io import read_label_table, read_volume
from medseg3d.io.labels import count_labels, label_numbers, plain_name
from medseg3d.metrics.evaluate import COLUMNS, Row, evaluate_case
from medseg3d.report.pairing import Files, case_name, pair_cases
from medseg3d.report.records import require_same_grid, write_csv
from medseg3d.volume import Volume


@dataclass(frozen=True)
class Evaluation:
    """`rows`: those of `evaluate_case` with the "case" in front. `unpaired`: files that were left out, and why.

    `failures`: cases that could not be measured, and why. `unnamed`: numbers in the label maps that have no name, which
    do not count.
    """

    rows: Sequence[Row]
    unpaired: Sequence[tuple[Path, str]]
    failures: Sequence[tuple[str, str]] = ()
    unnamed: Sequence[int] = ()


def evaluate_volumes(
    predicted: Volume,
    expected: Volume,
    labels: Mapping[int, str],
    nsd_tolerance_mm: float = 2.0,
    annotated: Collection[int] | None = None,
    names: tuple[str, str] = ("the prediction", "the reference"),
) -> list[Row]:
    """`evaluate_case` of two label maps, in true mm also on a sheared grid.

    The reference may be stored with its axes in another order. `annotated`: the labels that were contoured in this
    case; others are not counted. None means all. `names` are for the error.

    Raises ValueError when the two are not on the same grid.
    """
    expected = expected.reoriented(predicted.orientation)
    require_same_grid(predicted.geometry, expected.geometry, names)
    ignore = () if annotated is None else set(labels) - set(annotated)
    steps = predicted.affine[:3, :3]
    return evaluate_case(predicted.array, expected.array, steps, labels, nsd_tolerance_mm, ignore)


def evaluate_folders(
    predictions: Files,
    references: Files,
    labels: Mapping[int, str],
    nsd_tolerance_mm: float = 2.0,
    annotated: Mapping[str, Collection[int]] | None = None,
    named_by: str | Path | None = None,
) -> Evaluation:
    """Every prediction against the reference of its case; see `pair_cases` and `evaluate_volumes`.

    `annotated`: case (a `case_name`, or the name of one of its files) -> the labels that were contoured in it; a case
    that is not named there has all. `named_by`: the file or model that `labels` are from; None where they are the
    caller's own, which may differ from the names in the files. A case fails where a file is no label map, its own table
    contradicts the labels (see `require_numbers`), or the two are not on one grid; it does not stop the others.

    Raises ValueError as `pair_cases` does, and the error of the first case if all fail.
    """
    found = pair_cases(predictions, references)
    contoured = {case_name(name): organs for name, organs in (annotated or {}).items()}
    rows: list[Row] = []
    errors: dict[str, Exception] = {}
    unnamed: set[int] = set()
    for case, files in found.pairs.items():
        try:
            sides = read_label_map(files[0]), read_label_map(files[1])
            for file in files:
                require_numbers(file, labels, named_by)
            names = str(files[0]), str(files[1])
            measured = evaluate_volumes(*sides, labels, nsd_tolerance_mm, contoured.get(case), names)
        except (ValueError, OSError) as error:
            errors[case] = error
            continue
        rows += [{"case": case, **row} for row in measured]
        unnamed.update(*(count_labels(side.array) for side in sides))
    if errors and not rows:
        raise next(iter(errors.values()))
    failures = [(case, in_words(error)) for case, error in errors.items()]
    return Evaluation(rows, found.unpaired, failures, sorted(unnamed - {0, *labels}))


def require_numbers(path: str | Path, labels: Mapping[int, str], named_by: str | Path | None = None) -> None:
    """ValueError if a label map file's own table has another number for one of the labels.

    So it is for another name of one of the numbers if `named_by` says where the labels are from. Capitals and
    punctuation count for nothing in a name.
    """
    table = read_label_table(path)
    numbers = {plain_name(name): number for number, name in labels.items()}
    for number, name in table.names.items() if table is not None else ():
        wanted = numbers.get(plain_name(name), number)
        if wanted != number:
            raise ValueError(
                f"{path} calls {name} label {number}, but here it is {wanted}: numbers are compared, so both sides "
                "must use the same for an organ; renumber one of them"
            )
        if named_by is not None and number in labels and plain_name(labels[number]) != plain_name(name):
            raise ValueError(
                f"{path} calls label {number} {name}, but {named_by} calls it {labels[number]}: numbers are compared, "
                "so both sides must use the same for an organ; renumber one of them, or if these are names of one "
                "organ, give names for all files: --labels names.json (in Python: named_by=None)"
            )


def write_evaluation_csv(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write one line per case and label, atomically; where a cell is empty, the note says why."""
    return write_csv(path, rows, ("case", *COLUMNS))


# Measure -> its heading in the summary and the digits after the point.
_SUMMARY = {
    "dice": ("Dice", 3),
    "nsd": ("NSD", 3),
    "hd95_mm": ("HD95 mm", 2),
    "volume_error_percent": ("volume error %", 1),
}


def summarise(rows: Iterable[Row]) -> list[Row]:
    """A row per label, as they first appear: label, name, cases (with a reference), missed (those not predicted).

    Further, of dice, nsd, hd95_mm and volume_error_percent the mean over cases and the standard deviation of the sample
    ("dice_std", by n - 1). A value that is not defined is left out; the mean of nothing is None, and so is the
    deviation of one case. A missed label counts with Dice and NSD 0 but has no HD95: read that beside "missed".
    """
    by_label: dict[int, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    summary = []
    for label, all_cases in by_label.items():
        cases = [row for row in all_cases if row["dice"] is not None]
        line = {"label": label, "name": all_cases[0]["name"], "cases": len(cases)}
        line["missed"] = sum(row["volume_ml"] == 0 for row in cases)
        for measure in _SUMMARY:
            values = [row[measure] for row in cases if row[measure] is not None]
            line[measure] = float(np.mean(values)) if values else None
            line[f"{measure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary.append(line)
    return summary


def summary_table(rows: Iterable[Row]) -> str:
    """The summary as text: mean ± standard deviation per label, and at the end the mean of the labels' means."""
    summary = summarise(rows)
    lines = [["label", "cases", "missed", *(heading for heading, _ in _SUMMARY.values())]]
    for row in summary:
        cells = (_mean_and_std(row[m], row[f"{m}_std"], digits) for m, (_, digits) in _SUMMARY.items())
        lines.append([row["name"], str(row["cases"]), str(row["missed"]), *cells])
    lines.append(["mean of labels", "", ""])
    for measure, (_, digits) in _SUMMARY.items():
        means = [row[measure] for row in summary if row[measure] is not None]
        lines[-1].append(f"{np.mean(means):.{digits}f}" if means else "n/a")
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in lines
    )


def _mean_and_std(mean: float | None, std: float | None, digits: int) -> str:
    if mean is None:
        return "n/a"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def read_label_map(path: str | Path) -> Volume:
    """A label map file; whole numbers stored as floating point, as many tools do, become integers."""
    volume = read_volume(path)
    return volume.with_array(label_numbers(volume.array, path))
