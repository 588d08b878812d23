"""The command line: one verb, one function, one call into the library. Only here is anything printed or exited.

Results go to stdout, logs and progress to stderr. Imports of torch and MONAI wait until a verb needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg3d.catalogue import DEFAULT_MODEL, BundleInfo, find_bundle, shipped_bundles
from medseg3d.cli_arguments import OUTPUT_TYPES, argument_parser
from medseg3d.errors import in_words, is_out_of_memory
from medseg3d.startup import quick_imports

if TYPE_CHECKING:
    from medseg3d.batch import CaseResult
    from medseg3d.io import Case
    from medseg3d.segmenter import Segmenter

DONE, ERROR, USAGE, SOME_FAILED, OVER_MEMORY = 0, 1, 2, 4, 5
INTERRUPTED = 130
_HOW = (
    *("compile", "precision", "mirror", "strategy", "overlap"),
    *("crop_body", "max_ram", "max_vram", "uncertainty", "weights"),
)
_FOR_SCANS = (
    *("statistics", "output_type", "plan", "allow_non_hu"),
    *("strategy", "max_ram", "max_vram", "uncertainty", "crop_body"),
)
_CLEAR_LINE = "\r\x1b[K"  # of a terminal, where progress may stand


class UsageError(Exception):
    """The command cannot be carried out as it was given."""


def predict(args: argparse.Namespace) -> int:
    """Segment scans or pictures and write the results."""
    from medseg3d.batch import OutputPlan
    from medseg3d.io import find_inputs

    if args.output is None and not args.plan:
        raise UsageError("say with -o where the segmentation goes")
    if len(args.model) > 1 and (args.uncertainty or args.weights):
        given = "--uncertainty" if args.uncertainty else "--weights"
        raise UsageError(f"{given} is for one model, got {len(args.model)}: run them one by one")
    bundles = [find_bundle(model) for model in args.model]
    pictures = _pictures(bundles, args)
    target = Path(args.output or ".").expanduser()
    suffix = "" if pictures else OUTPUT_TYPES[args.output_type]
    plan = OutputPlan(target, suffix, args.statistics, args.preview, args.uncertainty, pictures)
    try:
        inputs = find_inputs(args.input, pictures is not None)
        if not args.plan:
            plan.prepare(inputs)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for path, reason in inputs.skipped:
        _say(f"skipped {path}: {reason}")
    trusts = [args.trust or _asked_to_trust(bundle) for bundle in bundles]
    status = _Status(args.quiet, len(inputs.cases))
    status.show(f"loading {', '.join(bundle.name for bundle in bundles)}")

    if args.own_process:
        _import_quickly(bundles)
    from medseg3d.batch import predict_many
    from medseg3d.report.run import Stopwatch
    from medseg3d.several import SeveralModels

    stopwatch = Stopwatch()
    with stopwatch.stage("load model"):
        models = [_load(bundle, trust, args) for bundle, trust in zip(bundles, trusts, strict=True)]
        segmenter = models[0] if len(models) == 1 else SeveralModels(models)
    for note in segmenter.notes:
        _say(f"note: {note}")
    if args.plan:
        return _print_plans(inputs.cases, segmenter, models, args.allow_non_hu)
    outcomes, records = [], []
    with stopwatch.stage("cases"):
        for outcome in predict_many(segmenter, inputs, plan, args.resume, args.allow_non_hu, status.stage):
            status.clear()
            outcomes.append(replace(outcome, result=None))  # one scan at a time is held, not the whole batch
            records.append(outcome.record())
            _tell(outcome)
    if args.report is not None:
        path = Path(args.report) if args.report else plan.report
        print(_write_report(path, segmenter, records, args, stopwatch.seconds))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed and len(outcomes) == 1:
        return OVER_MEMORY if failed[0].out_of_memory else ERROR
    if failed:
        _say(f"{len(failed)} of {len(outcomes)} cases failed; see {plan.folder / 'failures.csv'}")
    unreadable = [path for path, _ in inputs.skipped if not os.access(path, os.R_OK)]
    return SOME_FAILED if failed or unreadable else DONE


def _tell(outcome: CaseResult) -> None:
    """What became of a case: its files on stdout, all else on stderr."""
    if outcome.error is not None:
        place = str(outcome.case.path)
        _say("error: " + (outcome.error if place in outcome.error else f"{place}: {outcome.error}"))
        return
    for warning in outcome.result.warnings if outcome.result else ():
        _say(f"warning: {outcome.case.name}: {warning}")
    if outcome.resumed:
        _say(f"{outcome.case.name}: finished by an earlier run")
    for path in outcome.outputs.values():
        print(path)


def models(args: argparse.Namespace) -> int:
    """List the models, or tell about one."""
    if args.action == "list":
        if args.name is not None:
            raise UsageError(f"models list takes no name: medseg3d models info {args.name}")
        rows = [
            {"name": b.name, "version": b.version, "labels": len(b.labels), "task": b.metadata.get("task", "")}
            for b in shipped_bundles()
        ]
        if args.json:
            print(json.dumps(rows, indent=2))
        else:
            for row in rows:
                print(f"{row['name']}  {row['version']}  {row['labels']} labels  {row['task']}")
        return DONE
    if args.name is None:
        raise UsageError("models info needs a name: medseg3d models info " + DEFAULT_MODEL)
    bundle = find_bundle(args.name)
    metadata = bundle.metadata
    facts = {key: metadata.get(key, "") for key in ("version", "task", "description", "intended_use", "copyright")}
    facts = {"name": bundle.name, **facts, "folder": str(bundle.path), "labels": bundle.labels}
    if args.json:
        print(json.dumps(facts, indent=2))
        return DONE
    for key, value in facts.items():
        if key == "labels":
            print("labels:")
            for number, name in bundle.labels.items():
                print(f"  {number:>3}  {name}")
        elif value:
            print(f"{key.replace('_', ' ')}: {value}")
    return DONE


def evaluate(args: argparse.Namespace) -> int:
    """Compare segmentations with references, per label, or object by object in pictures."""
    if _are_pictures(args.predictions):
        return _evaluate_objects(args)
    from medseg3d.io import LabelTable, read_label_table
    from medseg3d.report.evaluation import evaluate_folders, summary_table, write_evaluation_csv

    if args.labels:
        labels = LabelTable.read_json(args.labels).names
    elif args.model:
        labels = find_bundle(args.model).labels
    else:
        tables = map(read_label_table, _label_maps(args.predictions))
        table = next((table for table in tables if table is not None), None)
        if table is None:
            raise UsageError("the predictions carry no label names: name them with --labels names.json or -m MODEL")
        labels = table.names
    annotated = None
    if args.manifest:
        from medseg3d.data.manifest import load_manifest

        annotated = {Path(case["image"]).name: case["contoured"] for case in load_manifest(args.manifest)["cases"]}
    result = evaluate_folders(args.predictions, args.references, labels, args.nsd_tolerance, annotated)
    for path, reason in result.unpaired:
        _say(f"left out {path}: {reason}")
    print(summary_table(result.rows))
    if args.output:
        print(write_evaluation_csv(args.output, result.rows))
    return DONE


def _are_pictures(path: str) -> bool:
    from medseg3d.report.evaluation import is_label_image

    target = Path(path)
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    return any(map(is_label_image, files)) and not _label_maps(path)


def _evaluate_objects(args: argparse.Namespace) -> int:
    from medseg3d.report.objects import evaluate_objects, objects_table, write_objects_csv

    if args.labels or args.model or args.manifest:
        raise UsageError(
            "in pictures objects are compared, whatever their class: leave --labels, -m and --manifest out"
        )
    result = evaluate_objects(args.predictions, args.references)
    for path, reason in result.unpaired:
        _say(f"left out {path}: {reason}")
    print(objects_table(result))
    if args.output:
        print(write_objects_csv(args.output, result.rows))
    return DONE


def train(args: argparse.Namespace) -> int:
    """Train a bundle's network with its own train.json."""
    bundle = find_bundle(args.model)
    bundle.require_trust(args.trust or _asked_to_trust(bundle))
    with contextlib.redirect_stdout(sys.stderr):  # MONAI's log
        from medseg3d.training.run import train_bundle

        best = train_bundle(bundle.path, args.dataset_dir, args.output, args.device, args.epochs, not args.quiet)
    print(best)
    return DONE


def doctor(args: argparse.Namespace) -> int:
    """Check this installation."""
    from medseg3d.doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.verdict:<8}{finding.subject}: {finding.text}")
    return ERROR if any(finding.verdict == "problem" for finding in findings) else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(_with_dashes(sys.argv[1:] if argv is None else argv))
    args.own_process = argv is None
    _set_up_messages(args.verbose)
    with contextlib.suppress(ValueError):  # not in the main thread, where signals do not come
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed run cleans up as an interrupted one does
    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("interrupted; nothing half-written was left")
        return INTERRUPTED
    except UsageError as error:
        _say(f"error: {error}")
        return USAGE
    except BrokenPipeError:  # such as `| head`; Python would flush and complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if args.verbose:
            raise
        _say(f"error: {in_words(error)}")
        return OVER_MEMORY if is_out_of_memory(error) else ERROR


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

    options = {name: getattr(args, name) for name in _HOW}
    # A relative path could be the name of a model that ships.
    return load_model(bundle.path.absolute(), trust=trust, device=args.device, **options)


def _print_plans(cases: Sequence[Case], segmenter: Any, models: Sequence[Segmenter], allow_non_hu: bool) -> int:
    """Print what each case will take with each model; the exit code is that of the worst case."""
    code = DONE
    for case in cases:
        try:
            scan = segmenter.read(case.path, allow_non_hu)
            for model in models:
                print(f"{case.name}, {model.name}\n{textwrap.indent(str(model.plan(scan)), '  ')}")
        except Exception as error:  # one bad case must not stop the others, whatever is wrong with it
            _say(f"error: {case.path}: {in_words(error)}")
            failed = OVER_MEMORY if is_out_of_memory(error) else ERROR
            code = failed if len(cases) == 1 else SOME_FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    functions = (predict, evaluate, train, models, doctor)
    return argument_parser({function.__name__: function for function in functions})


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """Options may be spelled with underscores: --allow_non_hu is --allow-non-hu."""
    return [
        "=".join([arg.split("=", 1)[0].replace("_", "-"), *arg.split("=", 1)[1:]]) if arg.startswith("--") else arg
        for arg in argv
    ]


def _asked_to_trust(bundle: BundleInfo) -> bool:
    """Ask at a terminal before foreign code runs; without one the answer is no."""
    if bundle.shipped or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        f"The bundle {bundle.path} does not ship with medseg3d; its configs and scripts run as code here.",
        file=sys.stderr,
    )
    print("Run it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _set_up_messages(verbose: bool) -> None:
    """Other libraries speak only of errors; of medseg3d itself all is told on request."""
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(message)s")
    logging.getLogger("medseg3d").setLevel(logging.DEBUG if verbose else logging.ERROR)
    if not verbose:
        warnings.filterwarnings("ignore")


def _label_maps(path: str) -> list[Path]:
    from medseg3d.io.formats import WRITABLE, split_name

    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(target))
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    return [file for file in files if split_name(file)[1] in WRITABLE]


def _write_report(
    path: Path, segmenter: Any, records: list[dict[str, Any]], args: argparse.Namespace, seconds: dict[str, float]
) -> Path:
    import torch

    from medseg3d.report.run import run_report, write_run_report

    cuda = segmenter.device.type == "cuda"
    options = {name: getattr(args, name) for name in ("allow_non_hu", "resume", *_HOW)}
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


def _say(text: str) -> None:
    print(_CLEAR_LINE + text if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class _Status:
    """One line on stderr that says what is going on; silent when quiet or not at a terminal."""

    def __init__(self, quiet: bool, total: int) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self.total = total
        self.names: list[str] = []

    def show(self, text: str) -> None:
        if self.shown:
            print(_CLEAR_LINE + text, end="", file=sys.stderr, flush=True)

    def stage(self, case: Any, stage: str) -> None:
        if case.name not in self.names:
            self.names.append(case.name)
        self.show(f"[{len(self.names)}/{self.total}] {case.name}: {stage}")

    def clear(self) -> None:
        self.show("")
