"""Where the bundles, manifests and sample data that ship with medseg3d lie."""

from __future__ import annotations

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
