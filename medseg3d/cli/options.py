"""Options that several verbs have, and what their values are made of."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any

from medseg3d.catalogue import DEFAULT_MODEL
from medseg3d.sizes import in_bytes


def add_bundle(verb: argparse.ArgumentParser, meaning: str) -> None:
    verb.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{meaning} (default: {DEFAULT_MODEL})")


def add_verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.add_argument("-q", "--quiet", action="store_true", help="no progress")
    verb.add_argument("-v", "--verbose", action="store_true", help="more messages, and the traceback of an error")
    return verb


def add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-d",
        "--device",
        default=os.environ.get("MEDSEG3D_DEVICE") or "auto",
        help="auto, cpu, gpu, gpu:N, cuda:N or mps (default: auto)",
    )


def add_tolerance(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--nsd-tolerance",
        type=millimetres,
        default=2.0,
        metavar="MM",
        help="tolerance of the surface Dice in mm (default: 2)",
    )


def add_trust(verb: Any) -> None:
    verb.add_argument(
        "--trust", action="store_true", help="run a bundle that does not ship with medseg3d; its code runs here"
    )


def millimetres(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"it is a number of mm, 0 or more, got {text!r}")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"it is a whole number of 1 or more, got {text!r}")
    return int(text)


def number_or_word(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def setting(text: str) -> tuple[str, Any]:
    """ID=VALUE with a value in JSON; what is none is taken as text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"a setting is ID=VALUE, such as batch_size=4; got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def size_in_bytes(text: str) -> int:
    try:
        return in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
