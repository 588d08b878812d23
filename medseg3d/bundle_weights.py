"""Which file of weights a bundle's network gets, and how it is filled."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from torch import nn

from medseg3d.catalogue import BundleInfo
from medseg3d.checkpoints import CheckpointMismatch, load_checkpoint
from medseg3d.checkpoints.files import read_weights
from medseg3d.checkpoints.merging import mergings, order_of
from medseg3d.inference.ensemble import Ensemble


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights: which of its entries is meant, if it has several, and what there is to tell about it."""

    file: Path
    entry: str | None = None
    notes: tuple[str, ...] = ()


def own_weights(bundle: BundleInfo, parser: ConfigParser) -> WeightsFile:
    """What a bundle's config loads into its network, with MONAI's ``CheckpointLoader`` or as ``ckpt_path``.

    Where it names no file, or one that is not there, it is ``models/model.pt``.
    """
    usual = bundle.path / "models" / "model.pt"
    path, entry = next(_loaders(parser, parser.get(), ""), (_parsed(parser, "ckpt_path"), None))
    if not isinstance(path, (str, Path)):
        return WeightsFile(usual)
    file = bundle.path / path  # an absolute path stays as it is
    if file.is_file() or not usual.is_file():
        return WeightsFile(file, entry)
    return WeightsFile(usual, entry, (f"its config loads {path}, which is not there: models/model.pt is taken",))


def _loaders(parser: ConfigParser, config: Any, name: str) -> Iterator[tuple[Any, str]]:
    """Path and entry of each ``CheckpointLoader`` of the network that a part of the config holds."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    if isinstance(config, Mapping) and str(config.get("_target_", "")).rpartition(".")[2] == "CheckpointLoader":
        entries = config.get("load_dict")
        of_network = [
            entry
            for entry, target in (entries.items() if isinstance(entries, Mapping) else ())
            if target in ("@network", "@network_def")
        ]
        if of_network and not _parsed(parser, f"{name}{ReferenceResolver.sep}_disabled_"):
            yield _parsed(parser, f"{name}{ReferenceResolver.sep}load_path"), of_network[0]
        return
    for key, value in items:
        yield from _loaders(parser, value, f"{name}{ReferenceResolver.sep}{key}" if name else str(key))


def _parsed(parser: ConfigParser, name: str) -> Any:
    """A value of the config; None where there is none, or it needs what is not there, such as a path of its author."""
    value = None
    if name in parser:
        with suppress(Exception):  # whatever its expression raises
            value = parser.get_parsed_content(name)
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def ensemble_of_files(network: nn.Module, files: Sequence[str | Path], average: str = "logits") -> Ensemble:
    """One network for each file of weights, and their mean: what a bundle's config has as its network.

    Args:
        network: of their architecture; it becomes the first, the others are copies.
        files: in any layout that :mod:`medseg3d.checkpoints` knows.
        average: "logits", as nnU-Net does it with the folds of one network, or "probabilities"; see
            :class:`medseg3d.inference.ensemble.Ensemble`.

    Raises:
        ValueError: there are no files, or one does not fit; FileNotFoundError: one is missing.
    """
    paths = [Path(file) for file in files]
    networks = [network, *(copy.deepcopy(network) for _ in paths[1:])]
    if not paths:
        raise ValueError("an ensemble needs a file of weights or more, got none")
    for one, path in zip(networks, paths, strict=True):
        _load_weights(one, path, path.name)
    return Ensemble(networks, average=average)


def with_weights(
    network: nn.Module, weights: Sequence[str | Path] | None, bundle: BundleInfo, parser: ConfigParser
) -> tuple[nn.Module, list[Path], list[str]]:
    """The network with these weights, or its own; the files they are from, and what there is to tell about them.

    Raises:
        ValueError: a file does not fit or cannot be read, or an ensemble is given other files than its own.
        FileNotFoundError: one is missing.
    """
    models = bundle.path / "models"
    if isinstance(network, Ensemble):
        if weights:
            raise ValueError(f"{bundle.name} is an ensemble whose config names its weights: leave weights out")
        return network, [], []
    given = [WeightsFile(_weights_file(name, models)) for name in weights or ()]
    files = given or [own_weights(bundle, parser)]
    networks = [network, *(copy.deepcopy(network) for _ in files[1:])]
    notes = [note for file in files for note in file.notes]
    for one, file in zip(networks, files, strict=True):
        notes += _load_weights(one, file.file, bundle.name, file.entry)
    filled = network if len(files) == 1 else Ensemble(networks, average="logits")
    return filled, [file.file for file in files], list(dict.fromkeys(notes))


def _weights_file(name: str | Path, models: Path) -> Path:
    path = Path(name).expanduser()
    return models / path if not path.exists() and (models / path).is_file() else path


def _load_weights(network: nn.Module, path: Path, name: str, entry: str | None = None) -> list[str]:
    """Fill the whole network from a file of any layout that is known; what there is to tell about it."""
    if not path.is_file():
        raise FileNotFoundError(f"the weights of {name} are missing: there is no {path}")
    try:
        # How a network merges patches, its config and the metadata say, unless the file itself does.
        built = order_of(network)
        recorded = read_weights(path, entry).record.get("merging_order") if mergings(network) else None
        order = "auto" if recorded else built or "legacy"
        report = load_checkpoint(network, path, scope="", merging_order=order, entry=entry)
    except CheckpointMismatch as error:
        reason = "; ".join([*error.report.problems(), *error.report.advice]) or str(error)
        raise ValueError(f"the weights of {name} do not fit its {error.report.network}: {reason}") from error
    except ValueError as error:
        raise ValueError(f"the weights of {name} cannot be read: {error}") from error
    notes = [note for note in report.notes if not note.endswith(": as asked")]
    if recorded not in (None, built):
        notes.append(
            f"the bundle's config and the MONAI release that its metadata names mean the order {built!r}, but the "
            "weights were saved with another, which is used"
        )
    return notes
