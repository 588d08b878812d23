"""Which cases of an output folder are finished, and what they were made from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medseg3d.io import Case
from medseg3d.report.records import write_json
from medseg3d.report.run import input_sha256

NAME = "finished.json"


class Ledger:
    """A file in the output folder that several runs may write to at the same time: case -> what it was made from.

    Args:
        folder: None notes nothing.
        settings: of this run: a case that was made with others is not finished.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.entries = self._read()

    @property
    def finished_cases(self) -> dict[str, set[str]]:
        """Case -> kinds of the files that were written for it, with whatever settings."""
        return {name: set(entry.get("files", ())) for name, entry in self.entries.items() if isinstance(entry, dict)}

    def is_of_this_model(self, name: str) -> bool:
        """Whether a finished case was made by the model, and with the settings, of this run."""
        return {key: self.entries[name].get(key) for key in self.settings} == self.settings

    def finished(self, case: Case, files: dict[str, Path]) -> bool:
        """Whether the ``files`` of a case (kind -> path) are there and this run would make the same."""
        if not all(path.is_file() for path in files.values()):
            return False
        entry = dict(self.entries.get(case.name) or {})
        written = entry.pop("files", ())
        return set(files) <= set(written) and entry == self._key(case)

    def has_labels_of(self, case: Case) -> bool:
        """Whether what lies there has the labels that this run makes of the case, in whatever format."""
        entry = self.entries.get(case.name)
        if not isinstance(entry, dict):
            return False
        return all(entry.get(key) == value for key, value in self._key(case).items() if key != "suffix")

    def is_of_another_input(self, case: Case, files: dict[str, Path]) -> bool:
        """Whether the segmentation that lies there now was made of other voxels."""
        entry = self.entries.get(case.name)
        if not isinstance(entry, dict) or not files["segmentation"].is_file():
            return False
        return entry.get("input_sha256") != input_sha256(case.path)

    def note(self, case: Case, files: Iterable[str]) -> None:
        """The case is finished, with files of these kinds."""
        if self.folder is not None:
            entry = {**self._key(case), "files": sorted(files)}
            with self.read_anew():
                self.entries[case.name] = entry
                write_json(self.folder / NAME, self.entries)

    def forget(self, case: Case) -> set[str]:
        """The case is not finished any more; the kinds of the files that were written for it."""
        if self.folder is None:
            return set()
        with self.read_anew():
            kinds = self.finished_cases.get(case.name, set())
            if self.entries.pop(case.name, None) is not None:
                write_json(self.folder / NAME, self.entries)
        return kinds

    @contextmanager
    def read_anew(self) -> Iterator[None]:
        """The entries as they are now, which no other run changes meanwhile."""
        with _alone_in(self.folder):
            self.entries = self._read()
            yield

    def _read(self) -> dict[str, Any]:
        if self.folder is not None:
            with suppress(OSError, ValueError, TypeError):  # a damaged one only costs the time to do its cases again
                return dict(json.loads((self.folder / NAME).read_text(encoding="utf-8")))
        return {}

    def _key(self, case: Case) -> dict[str, Any]:
        return {"input_sha256": input_sha256(case.path), **self.settings}


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Waits until no other process of this kind is at work in a folder; not on Windows, nor where nothing can lock."""
    try:
        import fcntl
    except ImportError:
        folder = None
    if folder is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
