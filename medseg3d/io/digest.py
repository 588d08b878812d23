"""What tells whether two files hold the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE = 1 << 20  # bytes


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
