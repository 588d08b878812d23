"""What the command line takes: its verbs, their options and what the help says of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from medseg3d.catalogue import DEFAULT_MODEL
from medseg3d.cli.options import (
    add_bundle,
    add_device,
    add_tolerance,
    add_trust,
    add_verb,
    number_or_word,
    positive,
    setting,
    size_in_bytes,
)
from medseg3d.version import __version__

# As in recipe, outputs and inference.precision, which import what only a verb that runs needs.
STRATEGIES = ("sub-volumes", "slices", "downsampled")
UNCERTAINTIES = ("entropy", "margin")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OUTPUT_TYPES = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "mha": ".mha"}


def argument_parser(functions: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        functions: what carries each verb out; the parsed arguments hold it as ``function``, and as ``verb`` the verb's
            own parser.
    """
    parser = argparse.ArgumentParser(
        prog="medseg3d",
        description="Segment 3D medical images. Research software: not for clinical decisions.",
        epilog="Exit codes: 0 done, 1 error, 2 usage or nothing matched, 3 review needed (--strict), "
        "4 some cases failed, 5 out of memory.",
    )
    parser.add_argument("--version", action="version", version=f"medseg3d {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_predict(verbs)
    _add_evaluate(verbs)
    _add_compare(verbs)
    _add_adapt(verbs)
    _add_train(verbs)
    one = add_verb(verbs, "models", "list the models that ship, or tell about one")
    one.add_argument("action", nargs="?", default="list", help="list, info, or the name itself (default: list)")
    one.add_argument("name", nargs="?", help="for info: a model's name, or a bundle's folder or zip")
    one.add_argument("--json", action="store_true", help="print JSON")
    _add_check(verbs)
    _add_flops(verbs)
    one = add_verb(verbs, "doctor", "check this installation: versions, devices, known bad combinations")
    one.add_argument("--json", action="store_true", help="print JSON")
    for name, verb in verbs.choices.items():
        verb.set_defaults(function=functions[name], verb=verb)
    return parser


def _add_predict(verbs: Any) -> None:
    verb = add_verb(verbs, "predict", "segment CT scans, or pictures with a model of pictures")
    verb.add_argument(
        "-i", "--input", nargs="+", required=True, metavar="SCAN",
        help="NIfTI, NRRD or MHA file, DICOM folder or zip, folder of these, or pattern; several are taken; PNG, JPEG, "
        "TIFF and BMP files for a model of pictures",
    )  # fmt: skip
    verb.add_argument(
        "--series", metavar="NAME",
        help="which series of DICOM files: its SeriesInstanceUID or description (default: the largest CT)",
    )  # fmt: skip
    verb.add_argument(
        "-o", "--output", metavar="PATH",
        help="file (.nii.gz, .nii, .nrrd, .mha; .png, .tif of a picture) for one scan, else a folder; files there are "
        "named <scan>_seg",
    )  # fmt: skip
    verb.add_argument(
        "-m", "--model", nargs="+", default=[DEFAULT_MODEL],
        help="name, or folder or zip of a MONAI bundle; earlier ones of several have priority (default: "
        f"{DEFAULT_MODEL})",
    )  # fmt: skip
    verb.add_argument("--unite", action="store_true", help="labels of one name in several models become one label")
    verb.add_argument(
        "--weights", nargs="+", metavar="FILE",
        help="weights of the network instead of the model's own, each a path or a file of the bundle's models folder; "
        "the logits of several are averaged",
    )  # fmt: skip
    add_device(verb)
    verb.add_argument(
        "-s",
        "--statistics",
        action="store_true",
        help="write volume, HU and place of each organ, or of each object in pictures, as JSON and CSV",
    )
    verb.add_argument(
        "-p", "--preview", action="store_true",
        help="write a PNG of three planes with the organs in colour, or of the picture with its objects",
    )  # fmt: skip
    verb.add_argument(
        "--masks", action="store_true", help="write each label as a mask of its own too, <scan>_masks/<label>.nii.gz"
    )
    verb.add_argument(
        "--uncertainty", choices=UNCERTAINTIES,
        help="write how sure the network is of each voxel, 0 to 1, as <scan>.entropy.nii.gz (high where it is unsure) "
        "or <scan>.margin.nii.gz (low there)",
    )  # fmt: skip
    verb.add_argument("-rp", "--report", nargs="?", const="", metavar="PATH", help="write a JSON record of the run")
    verb.add_argument(
        "-ot",
        "--output-type",
        choices=sorted(OUTPUT_TYPES),
        default="nifti",
        help="format in a folder of scans (default: nifti)",
    )
    verb.add_argument(
        "--resume", action="store_true", help="pass over cases in the output folder that an earlier run finished"
    )
    _add_running(verb)
    verb.add_argument("--allow-non-hu", action="store_true", help="go on where intensities cannot be Hounsfield units")
    add_trust(verb)


def _add_running(verb: Any) -> None:
    """How a model runs: what it computes with, what its network sees, what memory it may take."""
    verb.add_argument(
        "--compile",
        action="store_true",
        help="compile the network: minutes at the first scan, for long batches with MONAI's networks; medseg3d's own "
        "may be slower with it",
    )
    verb.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="in which numbers the network computes; auto: bf16 where the bundle allows it, the hardware is fast in it "
        "and a window of the first scan agrees with fp32 (default: auto)",
    )  # fmt: skip
    verb.add_argument(
        "--strategy", choices=STRATEGIES,
        help="what the network sees: windows of the scan (sub-volumes), slice after slice, or the whole scan made "
        "small (downsampled) (default: the bundle's)",
    )  # fmt: skip
    verb.add_argument(
        "--overlap", type=float, metavar="SHARE",
        help="share of a window that neighbours have in common, such as 0.25; less is faster (default: the bundle's)",
    )  # fmt: skip
    verb.add_argument(
        "--mirror", action="store_true",
        help="average over each window and its mirror image, left for right, in twice the time",
    )  # fmt: skip
    verb.add_argument(
        "--crop-body", action="store_true",
        help="lay windows over the box of the body only: faster where there is much air; what is left out is told",
    )  # fmt: skip
    verb.add_argument(
        "--plan", action="store_true",
        help="only tell strategy, windows, time and memory, from one window that is tried; nothing is written",
    )  # fmt: skip
    verb.add_argument(
        "--max-ram", type=size_in_bytes, metavar="SIZE",
        help="memory that may be held, such as 6G or 800M; speed, then fineness is given up for it, and a scan that "
        "still does not fit fails with exit code 5",
    )  # fmt: skip
    verb.add_argument("--max-vram", type=size_in_bytes, metavar="SIZE", help="the same for the memory of the GPU")


def _add_evaluate(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "evaluate",
        "compare segmentations with references: Dice, NSD, HD95, volume error; objects of pictures: F1, AP",
    )
    verb.add_argument("-p", "--predictions", required=True, metavar="PATH", help="file or folder of segmentations")
    verb.add_argument(
        "-r", "--references", required=True, metavar="PATH", help="file or folder of reference label maps"
    )
    verb.add_argument("-o", "--output", metavar="CSV", help="write a row for each case and label, or picture")
    verb.add_argument("--labels", metavar="JSON", help='label names, {"1": "brainstem", ...}')
    verb.add_argument("-m", "--model", help="take the label names of this model")
    verb.add_argument("--manifest", help="a data manifest that says which organs each case has; others are not counted")
    add_tolerance(verb)


def _add_compare(verbs: Any) -> None:
    verb = add_verb(
        verbs, "compare", "measure models, or strategies of one network, on the same cases: a table and a page of how "
        "good each is and what it costs",
    )  # fmt: skip
    verb.add_argument(
        "-m", "--model", nargs="+", action="extend",
        help=f"names, or folders or zips of MONAI bundles; -m may be repeated (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    verb.add_argument(
        "--strategy", nargs="+", choices=STRATEGIES,
        help="compare each model in each of these, where its network permits (default: the bundle's own)",
    )  # fmt: skip
    verb.add_argument(
        "--data", required=True, metavar="DATA",
        help="datalist (.json), nnU-Net folder, CSV of image and label, or name of a data manifest",
    )  # fmt: skip
    verb.add_argument("--dataset-dir", metavar="DIR", help="folder that the paths of the data start from")
    verb.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="which cases (default: test)"
    )
    verb.add_argument("--fold", type=int, metavar="N", help="the fold that --split validation takes")
    verb.add_argument("--limit", type=positive, metavar="N", help="only the first N of them")
    verb.add_argument("--labels", metavar="JSON", help="label names, where the data do not give them")
    verb.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the results; run again to go on")
    verb.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="in which numbers networks compute, as for predict (default: auto)",
    )  # fmt: skip
    add_tolerance(verb)
    add_device(verb)
    add_trust(verb)


def _add_train(verbs: Any) -> None:
    verb = add_verb(verbs, "train", "train a bundle's network with its train.json; a stopped run goes on where it was")
    add_bundle(verb, "name or folder of a bundle with configs/train.json")
    verb.add_argument(
        "--data", metavar="LIST",
        help="data of your own: a datalist, nnU-Net folder or CSV (default: the manifest of the bundle's train.json)",
    )  # fmt: skip
    verb.add_argument(
        "--dataset-dir", metavar="DIR", help="folder that the paths of the data start from (default: the list's own)"
    )
    verb.add_argument("--fold", type=int, metavar="N", help="validate with this fold, train on the others")
    verb.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for checkpoints; run again to resume"
    )
    verb.add_argument("--epochs", type=positive, help="train to this epoch (default: the bundle's)")
    verb.add_argument(
        "--patience",
        type=positive,
        metavar="EPOCHS",
        help="end the run after so many epochs without a better validation",
    )
    verb.add_argument(
        "--max-hours", type=float, metavar="HOURS",
        help="begin no epoch that would end later; run again to go on",
    )  # fmt: skip
    verb.add_argument("--tensorboard", action="store_true", help="log to the output folder's tensorboard")
    verb.add_argument("--mlflow", metavar="URI", help="log to an MLflow server or database, such as sqlite:///runs.db")
    verb.add_argument(
        "--set", nargs="+", action="extend", default=[], type=setting, metavar="ID=VALUE",
        help="any other value of the train.json, such as batch_size=4 cases=6 network_def::norm=instance",
    )  # fmt: skip
    add_device(verb)
    add_trust(verb)


def _add_adapt(verbs: Any) -> None:
    verb = add_verb(verbs, "adapt", "make a bundle for the labels of your own data, to be trained")
    verb.add_argument("data", metavar="LIST", help="datalist, nnU-Net folder, CSV or manifest, with named labels")
    verb.add_argument("-o", "--output", required=True, metavar="DIR", help="the new bundle's folder")
    add_bundle(verb, "name or folder of the bundle to copy")
    verb.add_argument(
        "--dataset-dir", metavar="DIR", help="where relative paths start from (default: the list's folder)"
    )
    verb.add_argument(
        "--spacing",
        nargs="+",
        type=float,
        metavar="MM",
        help="the network's voxels, one size or three (default: as -m)",
    )


def _add_check(verbs: Any) -> None:
    verb = add_verb(verbs, "check", "look for faults in a data set before training; make folds, write a MONAI datalist")
    verb.add_argument(
        "data", help="MONAI or MSD datalist (.json), nnU-Net or MSD folder, or CSV of image, label and patient"
    )
    verb.add_argument(
        "-o", "--output", metavar="JSON", help="write the data set as a MONAI datalist, with folds if they are made"
    )
    verb.add_argument("--make-folds", type=int, metavar="N", help="deal the patients into N balanced folds")
    verb.add_argument("--seed", type=int, default=0, help="deal them otherwise (default: 0)")
    verb.add_argument(
        "--manifest", metavar="NAME",
        help="compare the files with the checksums of this data manifest; it lists the cases of a plain folder",
    )  # fmt: skip
    verb.add_argument(
        "--dataset-dir", metavar="DIR", help="where relative paths start from (default: the list's folder)"
    )
    verb.add_argument(
        "--patients", metavar="REGEX",
        help="what in a case's name is the patient, such as '^[^_]+'; a group of it, if it has one",
    )  # fmt: skip
    verb.add_argument("--labels", metavar="JSON", help='label names, {"1": "liver", ...}, in place of the data set\'s')
    verb.add_argument("--objects", action="store_true", help="label maps number objects of one class, not classes")
    verb.add_argument("--quick", action="store_true", help="look at headers only, not at voxels and labels")
    verb.add_argument("--strict", action="store_true", help="exit with code 3 where there are doubts but no faults")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_flops(verbs: Any) -> None:
    verb = add_verb(
        verbs, "flops", "count what a network takes: operations (FLOPs and MACs), parameters, receptive field; or by "
        "formula",
    )  # fmt: skip
    verb.add_argument(
        "what", nargs="?", metavar="WHAT",
        help="a network such as swin_unetr (a name that is unknown lists them), or a formula: conv, attention, patches",
    )  # fmt: skip
    verb.add_argument(
        "--size", nargs="+", type=int, metavar="N",
        help="voxels along each axis: of a network's input, a scan (with -m), a convolution's input, a volume of "
        "patches; one number is for every axis of a network",
    )  # fmt: skip
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, in single operations")
    form.add_argument("--csv", action="store_true", help="print CSV, in single operations")
    network = verb.add_argument_group("a network")
    network.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="arguments of its class, such as feature_size=48 out_channels=14",
    )
    network.add_argument(
        "--depth", type=int, default=1, metavar="N", help="levels of modules in the table (default: 1)"
    )
    bundle = verb.add_argument_group("a bundle on a scan")
    bundle.add_argument(
        "-m", "--model", help="name, or folder or zip of a MONAI bundle: its strategy beside the other two"
    )
    bundle.add_argument("--spacing", nargs="+", type=float, metavar="MM", help="mm along each axis of the scan")
    add_trust(bundle)
    formula = verb.add_argument_group("a formula")
    formula.add_argument("--in", dest="in_channels", type=int, metavar="N", help="channels that go in")
    formula.add_argument("--out", dest="out_channels", type=int, metavar="N", help="channels that come out")
    formula.add_argument("--kernel", nargs="+", type=int, metavar="N", help="taps along each axis")
    formula.add_argument("--stride", nargs="+", type=int, metavar="N", help="along each axis (default: 1)")
    formula.add_argument(
        "--padding",
        nargs="+",
        type=number_or_word,
        metavar="N",
        help="on both sides of each axis, or same (default: 0)",
    )
    formula.add_argument("--dilation", nargs="+", type=int, metavar="N", help="along each axis (default: 1)")
    formula.add_argument("--groups", type=int, default=1, metavar="N", help="of channels (default: 1)")
    formula.add_argument("--transposed", action="store_true", help="the convolution makes its input larger")
    formula.add_argument("--dim", type=int, metavar="N", help="width of a token")
    formula.add_argument("--tokens", nargs="+", type=int, metavar="N", help="along each axis, or how many")
    formula.add_argument("--window", nargs="+", type=int, metavar="N", help="tokens of a window along each axis")
    formula.add_argument("--patch", type=int, metavar="N", help="edge of a patch in voxels")
