"""What a person at a terminal sees and is asked: results go to stdout, logs and progress to stderr; exit codes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from medseg3d.catalogue import BundleInfo

DONE, ERROR, USAGE, REVIEW, SOME_FAILED, OVER_MEMORY = 0, 1, 2, 3, 4, 5
INTERRUPTED = 130
CLEAR_LINE = "\r\x1b[K"  # of a terminal, where progress may stand


class UsageError(Exception):
    """The command cannot be carried out as it was given."""


def say(text: str) -> None:
    print(CLEAR_LINE + text if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def require_folder(path: str | None) -> None:
    if path is not None and not Path(path).expanduser().is_dir():
        raise UsageError(f"the dataset folder {path} does not exist")


def require_suffix(path: str, suffix: str, what: str) -> None:
    """UsageError if the name of an output does not end as that of such a file, but as an image perhaps."""
    if Path(path).suffix.lower() != suffix or Path(path).is_dir():
        raise UsageError(f"the output {path} is to be a {what}: give the name of a file that ends in {suffix}")


def asked_to_trust(bundle: BundleInfo) -> bool:
    """Ask at a terminal before foreign code runs; without one the answer is no."""
    if bundle.shipped or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        f"The bundle {bundle.path} does not ship with medseg3d; its configs and scripts run as code here.",
        file=sys.stderr,
    )
    print("Run it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Status:
    """One line on stderr that says what is going on; silent when quiet or not at a terminal."""

    def __init__(self, quiet: bool, total: int) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self.total = total
        self.names: list[str] = []

    def show(self, text: str) -> None:
        if self.shown:
            print(CLEAR_LINE + text, end="", file=sys.stderr, flush=True)

    def stage(self, case: Any, stage: str) -> None:
        if case.name not in self.names:
            self.names.append(case.name)
        self.show(f"[{len(self.names)}/{self.total}] {case.name}: {stage}")

    def clear(self) -> None:
        self.show("")
