"""What the command line takes: its verbs, their options and what the help says of them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from medseg3d.catalogue import DEFAULT_MODEL
from medseg3d.version import __version__

OUTPUT_TYPES = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "mha": ".mha"}


def argument_parser(functions: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        functions: what carries each verb out; the parsed arguments hold it as ``function``.
    """
    parser = argparse.ArgumentParser(
        prog="medseg3d",
        description="Segment 3D medical images. Research software: not for clinical decisions.",
        epilog="Exit codes: 0 done, 1 error, 2 usage or nothing matched, 4 some cases failed, 5 out of memory.",
    )
    parser.add_argument("--version", action="version", version=f"medseg3d {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_predict(verbs)
    _add_evaluate(verbs)
    _add_train(verbs)
    one = _verb(verbs, "models", "list the models that ship, or tell about one")
    one.add_argument("action", nargs="?", choices=("list", "info"), default="list", help="what to do (default: list)")
    one.add_argument("name", nargs="?", help="for info: a model's name, or a bundle's folder or zip")
    one.add_argument("--json", action="store_true", help="print JSON")
    one = _verb(verbs, "doctor", "check this installation: versions, devices, known bad combinations")
    one.add_argument("--json", action="store_true", help="print JSON")
    for name, verb in verbs.choices.items():
        verb.set_defaults(function=functions[name])
    return parser


def _add_predict(verbs: Any) -> None:
    verb = _verb(verbs, "predict", "segment CT scans, or pictures with a model of pictures")
    verb.add_argument(
        "-i", "--input", nargs="+", required=True, metavar="SCAN",
        help="NIfTI, NRRD or MHA file, DICOM folder or zip, folder of these, or pattern; several are taken; PNG, JPEG, "
        "TIFF and BMP files for a model of pictures",
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
    verb.add_argument(
        "--weights", nargs="+", metavar="FILE",
        help="weights of the network instead of the model's own, each a path or a file of the bundle's models folder; "
        "the logits of several are averaged",
    )  # fmt: skip
    _add_device(verb)
    verb.add_argument(
        "-s", "--statistics", action="store_true", help="write volume, HU and place of each organ, as JSON and CSV"
    )
    verb.add_argument(
        "-p", "--preview", action="store_true",
        help="write a PNG of three planes with the organs in colour, or of the picture with its objects",
    )  # fmt: skip
    verb.add_argument(
        "--uncertainty", choices=("entropy", "margin"),
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
    _add_trust(verb)


def _add_running(verb: Any) -> None:
    """How a model runs: what it computes with, what its network sees, what memory it may take."""
    verb.add_argument(
        "--compile",
        action="store_true",
        help="compile the network: minutes at the first scan, for long batches with MONAI's networks; medseg3d's own "
        "may be slower with it",
    )
    verb.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="in which numbers the network computes; auto: bf16 where the bundle allows it, the hardware is fast in it "
        "and a window of the first scan agrees with fp32 (default: auto)",
    )  # fmt: skip
    verb.add_argument(
        "--strategy", choices=("sub-volumes", "slices", "downsampled"),
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
        "--max-ram", type=_bytes, metavar="SIZE",
        help="memory that may be held, such as 6G or 800M; speed, then fineness is given up for it, and a scan that "
        "still does not fit fails with exit code 5",
    )  # fmt: skip
    verb.add_argument("--max-vram", type=_bytes, metavar="SIZE", help="the same for the memory of the GPU")


def _add_evaluate(verbs: Any) -> None:
    verb = _verb(
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
    verb.add_argument(
        "--nsd-tolerance",
        type=float,
        default=2.0,
        metavar="MM",
        help="tolerance of the surface Dice in mm (default: 2)",
    )


def _add_train(verbs: Any) -> None:
    verb = _verb(verbs, "train", "train a bundle's network with its train.json; a stopped run goes on where it was")
    verb.add_argument("-m", "--model", default=DEFAULT_MODEL, help="name or folder of a bundle with configs/train.json")
    verb.add_argument(
        "--dataset-dir", required=True, metavar="DIR", help="folder that the bundle's data manifest starts from"
    )
    verb.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for checkpoints; run again to resume"
    )
    verb.add_argument("--epochs", type=int, help="train to this epoch (default: the bundle's)")
    _add_device(verb)
    _add_trust(verb)


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.add_argument("-q", "--quiet", action="store_true", help="no progress")
    verb.add_argument("-v", "--verbose", action="store_true", help="more messages, and the traceback of an error")
    return verb


def _add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-d",
        "--device",
        default=os.environ.get("MEDSEG3D_DEVICE", "auto"),
        help="auto, cpu, gpu, gpu:N, cuda:N or mps (default: auto)",
    )


def _add_trust(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--trust", action="store_true", help="run a bundle that does not ship with medseg3d; its code runs here"
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is a number with K, M, G or T, such as 6G or 800M; got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
