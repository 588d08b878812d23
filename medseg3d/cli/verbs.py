"""The verbs beside ``predict``: one verb, one function, one call into the library."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from medseg3d.catalogue import DEFAULT_MODEL, find_bundle, shipped_bundles
from medseg3d.cli.terminal import DONE, ERROR, SOME_FAILED, UsageError, asked_to_trust, require_suffix, say


def evaluate(args: argparse.Namespace) -> int:
    """Compare segmentations with references, per label, or object by object in pictures."""
    if args.output:
        require_suffix(args.output, ".csv", "table")  # so that it is no scan, no picture and no table of labels
    if _are_pictures(args.predictions):
        return _evaluate_objects(args)
    from medseg3d.report.evaluation import evaluate_folders, summary_table, write_evaluation_csv

    labels, named_by = _names(args)
    annotated = _contoured(args.manifest) if args.manifest else None
    result = evaluate_folders(args.predictions, args.references, labels, args.nsd_tolerance, annotated, named_by)
    for path, reason in result.unpaired:
        say(f"left out {path}: {reason}")
    for case, reason in result.failures:
        say(f"error: {case}: {reason}")
    if result.unnamed:
        more = ", ..." * (len(result.unnamed) > 5)
        say(f"note: labels without a name do not count: {', '.join(map(str, result.unnamed[:5]))}{more}")
    print(summary_table(result.rows))
    if args.output:
        print(write_evaluation_csv(args.output, result.rows))
    return SOME_FAILED if result.failures else DONE


def _names(args: argparse.Namespace) -> tuple[Mapping[int, str], str | Path | None]:
    """Number -> name of the labels, and where they are from; None for the user's own, which no file contradicts."""
    from medseg3d.io import LabelTable, read_label_table
    from medseg3d.io.formats import WRITABLE

    if args.labels:
        return LabelTable.read_json(args.labels).names, None
    if args.model:
        bundle = find_bundle(args.model)
        return bundle.labels, f"the model {bundle.name}"
    files = _label_maps(args.predictions)
    if not files:
        raise UsageError(
            f"there is no label map ({', '.join(WRITABLE)}) directly in {args.predictions}; subfolders are not searched"
        )
    for file in files:
        if (table := read_label_table(file)) is not None:
            return table.names, file
    raise UsageError("the predictions carry no label names: name them with --labels names.json or -m MODEL")


def _contoured(manifest: str) -> dict[str, list[int]]:
    """File name of an image -> the labels that were looked for in it."""
    from medseg3d.data.manifest import load_manifest, manifest_cases

    found: dict[str, list[int]] = {}
    for case in manifest_cases(load_manifest(manifest)):
        if "contoured" in case:
            name = Path(case["image"]).name
            if found.setdefault(name, case["contoured"]) != case["contoured"]:
                raise ValueError(
                    f"{manifest} has several images called {name} with different labels that were looked for, so the "
                    "files to evaluate cannot be told apart; evaluate them without --manifest, or rename the images"
                )
    return found


def _are_pictures(path: str) -> bool:
    from medseg3d.report.pairing import is_label_image

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
        say(f"left out {path}: {reason}")
    for case, reason in result.failures:
        say(f"error: {case}: {reason}")
    print(objects_table(result))
    if args.output:
        print(write_objects_csv(args.output, result.rows))
    return SOME_FAILED if result.failures else DONE


def _label_maps(path: str) -> list[Path]:
    from medseg3d.io.formats import WRITABLE, split_name

    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(target))
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    return [file for file in files if split_name(file)[1] in WRITABLE and not file.name.startswith(".")]


def train(args: argparse.Namespace) -> int:
    """Train a bundle's network with its own train.json."""
    bundle = find_bundle(args.model)
    bundle.require_trust(args.trust or asked_to_trust(bundle))
    with contextlib.redirect_stdout(sys.stderr):  # MONAI's log
        from medseg3d.training.run import train_bundle

        asked = {name: getattr(args, name) for name in ("epochs", "patience", "max_hours", "tensorboard", "mlflow")}
        settings = {name: value for name, value in asked.items() if value is not None and value is not False}
        settings |= {name: value for name, value in (("manifest", args.data), ("fold", args.fold)) if value is not None}
        settings |= dict(args.set)
        best = train_bundle(bundle.path, args.dataset_dir, args.output, args.device, settings, not args.quiet)
    if os.environ.get("RANK", "0") == "0":  # the first of several processes
        print(best)
    return DONE


def models(args: argparse.Namespace) -> int:
    """List the models, or tell about one."""
    action, name = args.action, args.name
    if action not in ("list", "info") and name is None:
        action, name = "info", action
    if action != "info":
        if name is not None:
            raise UsageError(f"models {action} takes no name: medseg3d models info {name}")
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
    if name is None:
        raise UsageError("models info needs a name: medseg3d models info " + DEFAULT_MODEL)
    bundle = find_bundle(name)
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
