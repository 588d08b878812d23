"""The verb ``compare``: models, or strategies of one network, on the same cases."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg3d.catalogue import DEFAULT_MODEL
from medseg3d.cli.terminal import DONE, ERROR, SOME_FAILED, Status, UsageError, asked_to_trust, require_folder, say

if TYPE_CHECKING:
    from medseg3d.data.datasets import Case, Dataset


def compare(args: argparse.Namespace) -> int:
    """Compare models on the cases of a data set."""
    from medseg3d.compare import compare, contenders_of, summarise
    from medseg3d.compare.tables import cost_table

    contenders = contenders_of(args.model or [DEFAULT_MODEL], args.strategy or ())
    bundles = {contender.bundle.path: contender.bundle for contender in contenders}  # one in two strategies is one
    for bundle in bundles.values():
        bundle.require_trust(args.trust or asked_to_trust(bundle))
    dataset, cases = _cases(args)
    status = Status(args.quiet, len(cases))
    result = compare(
        contenders,
        cases,
        args.output,
        dataset.labels,
        title=f"{dataset.name}, {args.split}",
        device=args.device,
        precision=args.precision,
        nsd_tolerance_mm=args.nsd_tolerance,
        trust=True,
        progress=lambda model, what, done, of: status.show(f"[{done}/{of}] {model}: {what}"),
    )
    status.clear()
    for note in result.notes:
        say(f"note: {note}")
    for row in result.failures:
        say(f"error: {' on '.join(filter(None, (row['model'], row['case'])))}: {row['error']}")
    if result.clock == "cpu_seconds":
        say("note: the machine was busy with other work; costs.csv has CPU seconds, which tell more than seconds")
    print(cost_table(result, summarise(result)).plain())
    for name in ("comparison.html", "comparison.md", "metrics.csv", "costs.csv", "summary.csv", "pairs.csv"):
        print(Path(args.output) / name)
    if not result.costs:
        return ERROR
    return SOME_FAILED if result.failures else DONE


def _cases(args: argparse.Namespace) -> tuple[Dataset, list[Case]]:
    """The data set with names of its labels, and those of its cases that are wanted and have a reference."""
    from medseg3d.data.manifest import dataset_of
    from medseg3d.io import LabelTable

    require_folder(args.dataset_dir)
    if args.fold is not None and args.split == "test":
        raise UsageError("no fold has the cases of the test split: say --split validation with --fold")
    dataset = dataset_of(args.data, args.dataset_dir)
    if args.labels:
        dataset = replace(dataset, labels=LabelTable.read_json(args.labels).names)
    if not dataset.labels:
        raise UsageError(f'{dataset.name} does not name its labels: say --labels names.json, {{"1": "brainstem", ...}}')
    listed = dataset.of_split(args.split, args.fold)
    cases = [case for case in listed if case.label is not None][: args.limit]
    if not cases:
        raise UsageError(_nothing_in(dataset, args.split))
    return dataset, cases


def _nothing_in(dataset: Dataset, split: str) -> str:
    """That a split has no case to compare on, which have some, and what to say then."""
    cases = [case for case in dataset.cases if case.label is not None]
    splits = Counter(case.split for case in cases)
    folds = sorted({case.fold for case in cases if case.fold is not None and case.split != "test"})
    text = f"{dataset.name} has no case with a reference in the split {split!r}"
    if not splits:
        return f"{text}, nor in another: list a label map for each case to compare on"
    ways = [f"--split {name}" for name in splits if name != split]
    if folds:
        ways.append(f"--split validation --fold N, N one of {', '.join(map(str, folds))}")
    counts = ", ".join(f"{number} in {name}" for name, number in splits.items())
    return f"{text}, but {counts}: say {' or '.join(ways)}"
