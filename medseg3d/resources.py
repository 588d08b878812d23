"""Where the bundles, manifests and sample data that ship with medseg3d lie, and which of them a name may mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Folder ``name`` ("bundles" or "data_manifests"): inside an installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: if this copy of medseg3d has no such folder.
    """
    for folder in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of medseg3d has no folder {name!r}: install it again")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: "; did you mean unet?" if one of the known is close, else ""."""
    close = get_close_matches(str(name).lower(), known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
