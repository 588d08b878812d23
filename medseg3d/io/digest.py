"""What tells whether two files hold the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

_PIECE = 1 << 20  # bytes


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def voxels_sha256(array: np.ndarray) -> str:
    """The sha256 of shape and voxels, in hexadecimal digits, whatever type and order they are stored in."""
    digest = hashlib.sha256(repr(array.shape).encode())
    for plane in np.moveaxis(array, -1, 0):  # a copy of the whole in float32 would take its memory once more
        digest.update(plane.astype(np.float32, order="F").ravel(order="F").data)
    return digest.hexdigest()
