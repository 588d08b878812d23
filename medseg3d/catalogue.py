"""Which models there are, read from their metadata alone: no torch, no MONAI, so that listing is instant."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medseg3d.resources import did_you_mean, resource_folder

DEFAULT_MODEL = "headneck_ct_unet"


class UntrustedBundle(ValueError):
    """A bundle that does not ship with medseg3d and that nobody has said to trust."""


@dataclass(frozen=True)
class BundleInfo:
    """A MONAI Bundle on disk. ``shipped`` bundles come with medseg3d; all others are somebody else's code."""

    path: Path
    shipped: bool

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """``configs/metadata.json``; ValueError if it is missing or damaged."""
        path = self.path / "configs" / "metadata.json"
        if not path.is_file():
            raise ValueError(f"{self.path} is not a MONAI Bundle: it has no configs/metadata.json")
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): copy the bundle again") from error
        if not isinstance(metadata, dict):
            raise ValueError(f"{path} must hold a JSON object, got a {type(metadata).__name__}: copy the bundle again")
        return metadata

    @property
    def version(self) -> str:
        return str(self.metadata.get("version", "unknown"))

    @property
    def labels(self) -> dict[int, str]:
        """Label number -> name, the background left out; ValueError if the metadata does not say."""
        try:
            channels = self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
            return {int(number): str(name) for number, name in channels.items() if int(number) != 0}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.name}: metadata.json names no labels; it must do so under network_data_format.outputs.pred."
                'channel_def, as {"0": "background", "1": "spleen"}'
            ) from error

    @property
    def input_format(self) -> dict[str, Any]:
        """How the metadata describes the network's input ("modality", "format", "num_channels", ...)."""
        try:
            return dict(self.metadata["network_data_format"]["inputs"]["image"])
        except (KeyError, ValueError, TypeError):
            return {}

    @property
    def pictures(self) -> str | None:
        """What the bundle makes of pictures: "semantic", "instances" or "panoptic"; None for a bundle of scans.

        Its metadata says so under network_data_format.post_processed_outputs.pred: two axes in "spatial_shape", and
        in "format" "instances", "panoptic", or anything else for classes.
        """
        output = self._post_processed
        if len(output.get("spatial_shape", ())) != 2:
            return None
        kind = str(output.get("format"))
        return kind if kind in ("instances", "panoptic") else "semantic"

    @property
    def stuff(self) -> list[int]:
        """The numbers of classes that are not counted, of a bundle of pictures; "stuff" beside its "format"."""
        return [int(number) for number in self._post_processed.get("stuff", ())]

    @property
    def _post_processed(self) -> dict[str, Any]:
        try:
            return dict(self.metadata["network_data_format"]["post_processed_outputs"]["pred"])
        except (KeyError, ValueError, TypeError):
            return {}

    @property
    def has_code(self) -> bool:
        """Whether there are Python files in it, beside the expressions in its configs."""
        return any(self.path.rglob("*.py"))

    def require_trust(self, trusted: bool) -> None:
        """UntrustedBundle unless the bundle ships with medseg3d or somebody trusts it: its configs run as code."""
        if not self.shipped and not trusted:
            raise UntrustedBundle(
                f"the bundle {self.path} does not ship with medseg3d, and a bundle's configs and scripts run as code "
                "on this machine; if you trust where it comes from, say --trust (in Python: trust=True)"
            )


def shipped_bundles() -> list[BundleInfo]:
    """The bundles that come with medseg3d, by name."""
    folders = sorted(path.parent.parent for path in resource_folder("bundles").glob("*/configs/metadata.json"))
    return [BundleInfo(folder, shipped=True) for folder in folders]


def find_bundle(name_or_path: str | Path) -> BundleInfo:
    """A shipped bundle by its name, or any bundle by its folder or zip file.

    Raises:
        ValueError: there is none (the message lists the names that ship), or that folder or zip holds no bundle.
    """
    shipped = shipped_bundles()
    for bundle in shipped:
        if str(name_or_path) == bundle.name:
            return bundle
    path = Path(name_or_path).expanduser()
    if path.is_file() and zipfile.is_zipfile(path):
        path = _extracted(path)
    if path.is_dir():
        known = {bundle.path.resolve() for bundle in shipped}
        bundle = BundleInfo(path, shipped=path.resolve() in known)
        _ = bundle.metadata  # before anybody is asked to trust it
        return bundle
    names = [bundle.name for bundle in shipped]
    raise ValueError(
        f"unknown model {str(name_or_path)!r}: it is neither a shipped model ({', '.join(names)}) nor a bundle's "
        f"folder or zip{did_you_mean(name_or_path, names)}"
    )


def _extracted(archive: Path) -> Path:
    """The bundle in a zip, unpacked until this process ends."""
    scratch = Path(tempfile.mkdtemp(prefix="medseg3d-bundle-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folder = scratch / archive.stem  # the bundle's name if it lies at the root of the zip
    try:
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
    except (zipfile.BadZipFile, RuntimeError) as error:  # damaged, or locked with a password
        raise ValueError(f"{archive} cannot be unpacked ({error}): copy it again") from error
    roots = sorted(path.parent.parent for path in folder.rglob("configs/metadata.json"))
    if not roots:
        raise ValueError(f"{archive} holds no MONAI Bundle: there is no configs/metadata.json in it")
    return roots[0]
