"""The verb ``check``: a data set looked at before it is trained on, dealt into folds, and written as a datalist."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from medseg3d.cli.terminal import DONE, REVIEW, SOME_FAILED, Status, UsageError, require_folder, require_suffix
from medseg3d.sizes import counted

if TYPE_CHECKING:
    from medseg3d.data.check import Report
    from medseg3d.data.datasets import Dataset

_WHOLE = "(data set)"  # in the place of a case
_ROWS = 50  # of a table, but for names that the data set gives


def check(args: argparse.Namespace) -> int:
    """Look at a data set, and write it as a datalist."""
    from medseg3d.data.check import check_dataset
    from medseg3d.data.datasets import write_datalist
    from medseg3d.data.manifest import load_manifest

    if args.make_folds is not None and args.output is None:
        raise UsageError("say with -o where the datalist with the folds goes")
    manifest = load_manifest(args.manifest) if args.manifest else None
    dataset = _dataset(args, manifest)
    if args.output:
        _require_new(args, dataset)
    status = Status(args.quiet, len(dataset.cases))
    report = check_dataset(
        dataset, manifest, args.quick, lambda case: status.stage(case, "check"), args.make_folds, args.seed
    )
    status.clear()
    dataset = report.dataset
    if args.json:
        print(json.dumps(_as_json(dataset, report), indent=2, ensure_ascii=False))
    else:
        for line in _lines(dataset, report):
            print(line)
    if args.output:
        written = write_datalist(dataset, args.output)
        if not args.json:
            print(written)
    if report.of_grade("fault"):
        return SOME_FAILED
    return REVIEW if args.strict and report.findings else DONE


def _dataset(args: argparse.Namespace, manifest: Mapping[str, Any] | None) -> Dataset:
    from medseg3d.data.datasets import read_dataset, with_patients
    from medseg3d.data.manifest import manifest_dataset
    from medseg3d.io import LabelTable

    path = Path(args.data).expanduser()
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    require_folder(args.dataset_dir)
    if args.dataset_dir and path.is_dir():
        raise UsageError(f"--dataset-dir is for the paths in a list; {path} is a folder, in which they start: drop it")
    listed = path.is_file() or (path / "dataset.json").is_file() or (path / "imagesTr").is_dir()
    dataset = manifest_dataset(manifest, path) if manifest and not listed else read_dataset(path, args.dataset_dir)
    if args.labels:
        dataset = replace(dataset, labels={0: "background", **LabelTable.read_json(args.labels).names})
    if args.objects:
        dataset = replace(dataset, objects=True)
    return with_patients(dataset, args.patients) if args.patients else dataset


def _require_new(args: argparse.Namespace, dataset: Dataset) -> None:
    """UsageError if the output is no datalist by its name, or a file that is read."""
    require_suffix(args.output, ".json", "datalist")
    source = Path(args.data).expanduser()
    given = (Path(file).expanduser() for file in (args.labels, args.manifest) if file)
    read = (source, source / "dataset.json", *given, *(file for case in dataset.cases for file in case.files))
    if Path(args.output).resolve() in (file.resolve() for file in read):
        raise UsageError(f"the output {args.output} is a file that is read: give another name")


def _lines(dataset: Dataset, report: Report) -> Iterator[str]:
    """Findings first, then what there is."""
    if report.findings:
        rows = [(finding.case or _WHOLE, finding.grade, finding.text) for finding in report.findings]
        yield from _table(("case", "grade", "finding"), rows, _ROWS)
        yield ""
    yield _cases(dataset)
    yield from _grids(report)
    if labels := _labels(dataset, report):
        columns = ("label", "name", "cases", "median", *(f"fold {n}" for n in _folds(dataset)))
        named = sum(name != f"label_{n}" for n, name in dataset.labels.items())
        yield from _table(columns, labels, max(_ROWS, named))
    yield f"{counted(len(report.of_grade('fault')), 'fault')}, {counted(len(report.of_grade('doubt')), 'doubt')}"


def _cases(dataset: Dataset) -> str:
    from medseg3d.data.datasets import SPLITS

    splits = Counter(case.split for case in dataset.cases)
    patients = len({case.patient for case in dataset.cases})
    text = f"{counted(len(dataset.cases), 'case')} of {counted(patients, 'patient')}: " + ", ".join(
        f"{splits[name]} {name}" for name in SPLITS if splits[name]
    )
    folds = Counter(case.fold for case in dataset.cases if case.fold is not None)
    return text + (f"; folds of {', '.join(str(folds[n]) for n in sorted(folds))}" if folds else "")


def _grids(report: Report) -> Iterator[str]:
    from medseg3d.geometry import Geometry

    grids = [facts.grid for facts in report.facts.values()]
    scans = [grid for grid in grids if isinstance(grid, Geometry)]
    shapes = [grid.shape if isinstance(grid, Geometry) else grid for grid in grids]
    if shapes and len({len(shape) for shape in shapes}) == 1:
        yield f"size {_ranges(shapes)}" + (f", spacing {_ranges([scan.spacing for scan in scans])} mm" if scans else "")
    if scans:
        axes = Counter(scan.orientation for scan in scans).most_common()
        yield "axes " + ", ".join(f"{code} ({n})" for code, n in axes)


def _labels(dataset: Dataset, report: Report) -> list[tuple[str, ...]]:
    """A row a label: in how many cases it is, its median size, and in how many cases of each fold."""
    from medseg3d.geometry import Geometry

    sizes: dict[int, list[float]] = defaultdict(list)
    scans = False
    for facts in report.facts.values():
        scans = scans or isinstance(facts.grid, Geometry)
        size = facts.grid.voxel_volume / 1000 if isinstance(facts.grid, Geometry) else 1
        for label, voxels in (facts.voxels or {}).items():
            sizes[label].append(voxels * size)
    if dataset.objects or not sizes:
        return []
    unit = "ml" if scans else "pixels"
    folds = {case.name: case.fold for case in dataset.cases}
    rows = []
    for label in sorted({*dataset.labels, *sizes} - {0}):
        of_fold = Counter(folds[name] for name, present in report.present.items() if label in present)
        middle = f"{median(sizes[label]):.3g} {unit}" if label in sizes else "-"
        counts = (str(of_fold[n]) for n in _folds(dataset))
        rows.append((str(label), dataset.labels.get(label, "?"), str(len(sizes[label])), middle, *counts))
    return rows


def _folds(dataset: Dataset) -> list[int]:
    return sorted({case.fold for case in dataset.cases if case.fold is not None})


def _as_json(dataset: Dataset, report: Report) -> dict[str, Any]:
    present = Counter(label for labels in report.present.values() for label in labels)
    return {
        "name": dataset.name,
        "cases": len(dataset.cases),
        "patients": len({case.patient for case in dataset.cases}),
        "splits": Counter(case.split for case in dataset.cases),
        "folds": Counter(case.fold for case in dataset.cases if case.fold is not None),
        "labels": {
            n: {"name": name, "cases": present[n] if report.present else None}
            for n, name in dataset.labels.items()
            if n != 0
        },
        "findings": [finding.__dict__ for finding in report.findings],
    }


def _ranges(rows: Collection[Collection[float]]) -> str:
    """The least and the greatest of each column: 128 x 128 x 60-90."""
    ends = [(f"{min(column):.4g}", f"{max(column):.4g}") for column in zip(*rows, strict=True)]
    return " x ".join(low if low == high else f"{low}-{high}" for low, high in ends)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], most: int) -> Iterator[str]:
    """So many rows at most, and how many there are beyond: --json has all."""
    shown = rows[:most]
    widths = [max(map(len, column)) for column in zip(columns, *shown, strict=True)]
    for row in (columns, *shown):
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(rows) > most:
        yield f"… and {len(rows) - most} more; --json prints all"
