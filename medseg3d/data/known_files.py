"""The files of a data set compared with a manifest's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from medseg3d.data.datasets import Case
from medseg3d.data.manifest import checksums
from medseg3d.io.digest import file_sha256


class KnownFiles:
    """Files of a manifest, by path from the data set's folder or, where that is not known, by the end of the path.

    Raises ValueError if the manifest lists no cases.
    """

    def __init__(self, manifest: Mapping[str, Any], root: Path) -> None:
        self.by_path = {root / file: digest for file, digest in checksums(manifest).items()}
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for file in self.by_path:
            self.by_name[file.name].append(file)
        self.seen: set[Path] = set()

    def differences(self, case: Case) -> Iterator[tuple[str, bool]]:
        """What is to be said of the files of a case, and whether it makes the case unfit."""
        for file in case.files:
            known = self._entry(file)
            if known is None:
                yield f"{file.name}: not in the manifest", False
                continue
            self.seen.add(known)
            wanted = self.by_path[known]
            with suppress(OSError):  # a file that cannot be read is told of by whoever looks at its voxels
                if wanted is not None and file_sha256(file) != wanted:
                    yield f"{file.name}: its sha256 differs from the manifest's", True

    def unlisted(self) -> list[str]:
        """The names of the manifest's other files."""
        return sorted(file.name for file in self.by_path.keys() - self.seen)

    def _entry(self, file: Path) -> Path | None:
        if file in self.by_path:
            return file
        return max(self.by_name.get(file.name, ()), key=lambda known: _common_end(file, known), default=None)


def _common_end(a: Path, b: Path) -> int:
    """How many parts of two paths are the same, counted from the end."""
    same = (one == other for one, other in zip(reversed(a.parts), reversed(b.parts), strict=False))
    return sum(1 for _ in takewhile(bool, same))
