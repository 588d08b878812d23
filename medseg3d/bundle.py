"""A MONAI Bundle becomes a Segmenter: network, preprocessing, strategy and post-processing, read from its configs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged, SaveImage, SaveImaged

from medseg3d.catalogue import DEFAULT_MODEL, BundleInfo, find_bundle
from medseg3d.compatibility import adapt_network
from medseg3d.errors import in_words
from medseg3d.inference.device import resolve_device
from medseg3d.io import LabelTable
from medseg3d.report.run import model_record
from medseg3d.segmenter import Segmenter

_PREPROCESSING = ("preprocessing", "pre_transforms")
_POSTPROCESSING = ("postprocessing", "post_transforms")


def load_model(
    model: str | Path = DEFAULT_MODEL, device: str | torch.device = "auto", trust: bool = False
) -> Segmenter:
    """Load a model once, to segment many scans with it.

    Args:
        model: name of a model that ships with medseg3d, or the folder or zip of any MONAI segmentation bundle.
        device: "auto", "cpu", "gpu", "gpu:N", "cuda:N" or "mps".
        trust: a bundle's configs and scripts are code that runs here. Models that ship with medseg3d run without
            asking; for every other one say ``trust=True`` once you know where it comes from.

    Raises:
        ValueError: no such model, no such device, or a bundle that cannot segment.
        UntrustedBundle: a foreign bundle without ``trust``.
        FileNotFoundError: the bundle has no weights.
    """
    bundle = find_bundle(model)
    bundle.require_trust(trust)
    torch_device = resolve_device(device)
    table = LabelTable(bundle.labels)
    with _importable(bundle.path):
        parser = _parser(bundle, torch_device)
        notes = _adapt(parser, bundle)
        network = _resolved(parser, bundle, "network", "network_def")
        preprocessing = _resolved(parser, bundle, *_PREPROCESSING)
        postprocessing = _resolved(parser, bundle, *_POSTPROCESSING)
        inferer = _resolved(parser, bundle, "inferer")
    weights = _load_weights(network, bundle)
    return Segmenter(
        network=network.to(torch_device).eval(),
        preprocessing=_from_memory(preprocessing, bundle),
        inferer=inferer,
        postprocessing=_keep(postprocessing, lambda step: not isinstance(step, SaveImage | SaveImaged)),
        table=table,
        device=torch_device,
        name=f"{bundle.name} {bundle.version}",
        expects_hu=bundle.input_format.get("format") == "hounsfield",
        record=model_record(bundle.name, bundle.version, bundle.path, weights),
        notes=notes,
    )


def _parser(bundle: BundleInfo, device: torch.device) -> ConfigParser:
    configs = [bundle.path / "configs" / f"inference.{suffix}" for suffix in ("json", "yaml", "yml")]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise ValueError(f"{bundle.path} has no configs/inference.json or inference.yaml, which says how to run it")
    parser = ConfigParser()
    try:
        parser.read_config(str(config))
    except Exception as error:  # of the JSON or YAML reader
        raise ValueError(f"{config} cannot be read: {in_words(error)}") from error
    parser.read_meta(bundle.metadata)
    parser["bundle_root"] = str(bundle.path)
    parser["device"] = device
    return parser


def _adapt(parser: ConfigParser, bundle: BundleInfo) -> list[str]:
    network = parser.get("network_def")
    if not isinstance(network, Mapping):
        return []
    adapted, notes = adapt_network(network, str(bundle.metadata.get("monai_version", "")))
    parser["network_def"] = adapted
    return notes


def _resolved(parser: ConfigParser, bundle: BundleInfo, *names: str) -> Any:
    """The object that the config defines under the first of ``names`` that is there."""
    for name in names:
        if name in parser:
            try:
                return parser.get_parsed_content(name)
            except Exception as error:
                raise ValueError(
                    f"{bundle.name}: {name!r} of its inference config cannot be built: {in_words(error)}"
                ) from error
    wanted = " or ".join(map(repr, names))
    raise ValueError(f"{bundle.name}: its inference config defines no {wanted}, which medseg3d needs")


def _load_weights(network: torch.nn.Module, bundle: BundleInfo) -> Path:
    """Fill the network from models/model.pt: a plain state_dict, or one under "model" or "state_dict"."""
    path = bundle.path / "models" / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"the weights of {bundle.name} are missing: there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each raise their own
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it must be a dictionary of plain tensors, whole, and not "
            "a Git LFS pointer"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors (a state_dict), got a {type(state).__name__}")
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    state = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = network.state_dict()
    missing, left = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    if missing or left or shapes:
        raise ValueError(
            f"the weights of {bundle.name} do not fit its network: {len(missing)} parameters are missing "
            f"(such as {missing[:1]}), {len(left)} are left over (such as {left[:1]}), "
            f"{len(shapes)} have another shape (such as {shapes[:1]}); they belong to another network or MONAI version"
        )
    network.load_state_dict(state)
    return path


def _from_memory(preprocessing: Any, bundle: BundleInfo) -> Compose:
    """The preprocessing for an image that is already read: without its loader, with a channel axis all the same."""
    loaders = [step for step in _steps(preprocessing) if isinstance(step, LoadImage | LoadImaged)]
    for loader in loaders:
        if "image" not in getattr(loader, "keys", ()):
            raise ValueError(f"{bundle.name}: its preprocessing does not load the key 'image'")
    channels = int(bundle.input_format.get("num_channels", 1))
    if channels != 1:
        raise ValueError(f"{bundle.name} needs {channels} images a case; medseg3d predict gives a network one")
    rest = _keep(preprocessing, lambda step: not isinstance(step, LoadImage | LoadImaged))
    if any(getattr(getattr(loader, "_loader", loader), "ensure_channel_first", False) for loader in loaders):
        rest = Compose([EnsureChannelFirstd(keys="image"), *rest.transforms])
    return rest


def _steps(transform: Any) -> Iterator[Callable]:
    if isinstance(transform, Compose):
        for step in transform.transforms:
            yield from _steps(step)
    else:
        yield transform


def _keep(transform: Any, wanted: Callable[[Any], bool]) -> Compose:
    """The same steps, the very objects, without the unwanted ones: an Invertd finds them by identity."""
    return Compose([step for step in _steps(transform) if wanted(step)])


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """A bundle's own ``scripts`` can be imported while it is built, as ``python -m monai.bundle run`` allows.

    Afterwards they are forgotten, since the next bundle has other modules of the same names.
    """
    known, own = set(sys.modules), {path.stem for path in root.iterdir()}
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - known:
            if name.split(".")[0] in own:
                del sys.modules[name]
