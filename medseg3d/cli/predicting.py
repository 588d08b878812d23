"""The verb ``predict``: scans or pictures in, segmentations out."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg3d.catalogue import BundleInfo, find_bundle
from medseg3d.cli.arguments import OUTPUT_TYPES
from medseg3d.cli.terminal import DONE, ERROR, OVER_MEMORY, SOME_FAILED, Status, UsageError, asked_to_trust, say
from medseg3d.errors import in_words, is_out_of_memory
from medseg3d.startup import quick_imports

if TYPE_CHECKING:
    from medseg3d.batch import CaseResult
    from medseg3d.io import Case, Inputs
    from medseg3d.outputs import OutputPlan
    from medseg3d.segmenter import Segmenter

HOW = (
    *("compile", "precision", "mirror", "strategy", "overlap"),
    *("crop_body", "max_ram", "max_vram", "uncertainty", "weights"),
)
_FOR_SCANS = (
    *("output_type", "plan", "allow_non_hu", "masks", "series"),
    *("strategy", "max_ram", "max_vram", "uncertainty", "crop_body"),
)


def predict(args: argparse.Namespace) -> int:
    """Segment scans or pictures and write the results."""
    from medseg3d.outputs import FAILURES, OutputPlan

    if args.output is None and not args.plan:
        raise UsageError("say with -o where the segmentation goes")
    if len(args.model) > 1 and (args.uncertainty or args.weights):
        given = "--uncertainty" if args.uncertainty else "--weights"
        raise UsageError(f"{given} is for one model, got {len(args.model)}: run them one by one")
    bundles = [find_bundle(model) for model in args.model]
    pictures = _pictures(bundles, args)
    target = Path(args.output or ".").expanduser()
    suffix = "" if pictures else OUTPUT_TYPES[args.output_type]
    plan = OutputPlan(target, suffix, args.statistics, args.preview, args.uncertainty, pictures, args.masks)
    report = None if args.report is None else Path(args.report).expanduser() if args.report else plan.report
    inputs = _inputs(args, plan, report)
    for path, reason in inputs.skipped:
        say(f"skipped {path}: {reason}")
    trusts = [args.trust or asked_to_trust(bundle) for bundle in bundles]
    status = Status(args.quiet, len(inputs.cases))
    status.show(f"loading {', '.join(bundle.name for bundle in bundles)}")

    if args.own_process:
        _import_quickly(bundles)
    from medseg3d.batch import predict_many
    from medseg3d.report.run import Stopwatch
    from medseg3d.several import SeveralModels

    stopwatch = Stopwatch()
    with stopwatch.stage("load model"):
        models = [_load(bundle, trust, args) for bundle, trust in zip(bundles, trusts, strict=True)]
        segmenter = models[0] if len(models) == 1 else SeveralModels(models, args.unite)
    for note in segmenter.notes:
        say(f"note: {note}")
    if args.plan:
        status.clear()
        return _print_plans(inputs.cases, segmenter, models, args)
    # Found before the run, which may remove what an earlier one left.
    unreadable = [path for path, _ in inputs.skipped if not os.access(path, os.R_OK)]
    outcomes: list[CaseResult] = []
    records: list[dict[str, Any]] = []
    try:
        with stopwatch.stage("cases"):
            how = (args.resume, args.allow_non_hu, status.stage)
            for outcome in predict_many(segmenter, inputs, plan, *how, series=args.series):
                status.clear()
                outcomes.append(replace(outcome, result=None))  # one scan at a time is held, not the whole batch
                records.append(outcome.record())
                _tell(outcome)
                del outcome
    finally:  # after Ctrl-C too, what is finished is in the report
        if report is not None:
            print(_write_report(report, segmenter, records, args, stopwatch.seconds))
    return _exit_code(outcomes, bool(unreadable), plan.folder / FAILURES)


def _inputs(args: argparse.Namespace, plan: OutputPlan, report: Path | None) -> Inputs:
    """The cases; UsageError if there are none, or what is made of them has no place."""
    from medseg3d.io import find_inputs

    try:
        inputs = find_inputs(args.input, plan.pictures is not None)
        if args.series is not None and all(case.kind != "dicom" for case in inputs.cases):
            raise ValueError("--series is for DICOM files, and none is among the inputs: leave it out")
        if not args.plan:
            plan.prepare(inputs, report, args.resume)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return inputs


def _exit_code(outcomes: Sequence[CaseResult], unreadable: bool, failures: Path) -> int:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed and len(outcomes) == 1:
        return OVER_MEMORY if failed[0].out_of_memory else ERROR
    if failed:
        say(f"{len(failed)} of {len(outcomes)} cases failed; see {failures}")
    return SOME_FAILED if failed or unreadable else DONE


def _tell(outcome: CaseResult) -> None:
    """What became of a case: its files on stdout, all else on stderr."""
    if outcome.error is not None:
        place = str(outcome.case.path)
        say("error: " + (outcome.error if place in outcome.error else f"{place}: {outcome.error}"))
        return
    for warning in outcome.result.warnings if outcome.result else ():
        say(f"warning: {outcome.case.name}: {warning}")
    if outcome.resumed:
        say(f"{outcome.case.name}: finished by an earlier run")
    from medseg3d.outputs import MASK

    for path in dict.fromkeys(path.parent if kind.startswith(MASK) else path for kind, path in outcome.outputs.items()):
        print(path)


def _pictures(bundles: Sequence[BundleInfo], args: argparse.Namespace) -> str | None:
    """What the models make of pictures; None where they segment scans. UsageError for options that do not go along."""
    bundle = next((bundle for bundle in bundles if bundle.pictures is not None), None)
    if bundle is None:
        return None
    what = f"{bundle.name} segments pictures"
    if len(bundles) > 1:
        raise UsageError(f"several models at once are for scans, and {what}: run them one by one")
    given = [name for name in _FOR_SCANS if getattr(args, name) not in (None, False, "nifti")]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for scans, and {what}: leave it out")
    return bundle.pictures


def _import_quickly(bundles: Sequence[BundleInfo]) -> None:
    """Import what segments. A bundle that is configs alone names no engine in the parts that are built of it."""
    with quick_imports(engines=any(bundle.has_code for bundle in bundles)):
        import medseg3d.bundle
        import medseg3d.several  # noqa: F401


def _load(bundle: BundleInfo, trust: bool, args: argparse.Namespace) -> Any:
    from medseg3d.bundle import load_model

    options = {name: getattr(args, name) for name in HOW}
    # A relative path could be the name of a model that ships.
    return load_model(bundle.path.absolute(), trust=trust, device=args.device, **options)


def _print_plans(cases: Sequence[Case], segmenter: Any, models: Sequence[Segmenter], args: argparse.Namespace) -> int:
    """Print what each case will take with each model; the exit code is that of the worst case."""
    from medseg3d.batch import read_case

    code = DONE
    for case in cases:
        try:
            scan = read_case(segmenter, case, args.allow_non_hu, args.series)
            for model in models:
                print(f"{case.name}, {model.name}\n{textwrap.indent(str(model.plan(scan)), '  ')}")
        except Exception as error:  # one bad case must not stop the others, whatever is wrong with it
            say(f"error: {case.path}: {in_words(error)}")
            failed = OVER_MEMORY if is_out_of_memory(error) else ERROR
            code = failed if len(cases) == 1 else SOME_FAILED
    return code


def _write_report(
    path: Path, segmenter: Any, records: list[dict[str, Any]], args: argparse.Namespace, seconds: dict[str, float]
) -> Path:
    import torch

    from medseg3d.report.run import run_report, write_run_report

    cuda = segmenter.device.type == "cuda"
    options = {name: getattr(args, name) for name in ("allow_non_hu", "resume", "series", *HOW)}
    report = run_report(
        model=segmenter.record,
        cases=records,
        device=segmenter.describe_device(),
        threads=torch.get_num_threads(),
        options=options | {"precision": segmenter.precision},
        seconds=seconds,
        device_peak_memory_mb=torch.cuda.max_memory_allocated(segmenter.device) / 2**20 if cuda else None,
        warnings=segmenter.notes,
    )
    return write_run_report(path, report)
