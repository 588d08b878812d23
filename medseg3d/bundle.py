"""A MONAI Bundle becomes a Segmenter, of scans or pictures: network, preprocessing, strategy and post-processing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged, SaveImage, SaveImaged
from torch import nn

from medseg3d.bundle_weights import ensemble_of_files, own_weights, with_weights
from medseg3d.catalogue import DEFAULT_MODEL, BundleInfo, find_bundle
from medseg3d.compatibility import adapt_network
from medseg3d.errors import in_words
from medseg3d.inference import SubVolumes
from medseg3d.inference.device import resolve_device
from medseg3d.inference.precision import check_precision
from medseg3d.io import LabelTable
from medseg3d.recipe import as_strategy, steps_of, strategy_named
from medseg3d.report.run import file_sha256, model_record
from medseg3d.runner import Runner
from medseg3d.segmenter import Segmenter

if TYPE_CHECKING:
    from medseg3d.pictures import PictureSegmenter

__all__ = ["ensemble_of_files", "load_model", "parts_of"]

_PREPROCESSING = ("preprocessing", "pre_transforms")
# Never hidden for a module of a bundle: they are in use, and twice they would not go together.
_EVERYBODYS = {"__main__", "medseg3d", "monai", "numpy", "torch"}
_POSTPROCESSING = ("postprocessing", "post_transforms")
FOR_SCANS = ("strategy", "max_ram", "max_vram", "uncertainty", "crop_body")  # of load_model's arguments


def load_model(
    model: str | Path = DEFAULT_MODEL,
    device: str | torch.device = "auto",
    trust: bool = False,
    compile: bool = False,
    precision: str = "auto",
    mirror: bool = False,
    strategy: str | None = None,
    overlap: float | None = None,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    uncertainty: str | None = None,
    weights: Sequence[str | Path] | str | Path | None = None,
    crop_body: bool = False,
) -> Segmenter | PictureSegmenter:
    """Load a model once, to segment many scans with it, or pictures if that is what its bundle is made for.

    Args:
        model: name of a model that ships with medseg3d, or the folder or zip of any MONAI segmentation bundle.
        device: "auto", "cpu", "gpu", "gpu:N", "cuda:N" or "mps".
        trust: a bundle's configs and scripts are code that runs here. Models that ship with medseg3d run without
            asking; for every other one say ``trust=True`` once you know where it comes from.
        compile, max_ram, max_vram, uncertainty, crop_body: see :class:`medseg3d.segmenter.Segmenter`.
        weights: a file of the bundle's network instead of the one that its config loads, or several: each a path or the
            name of one in the bundle's ``models`` folder; several are averaged, see :func:`ensemble_of_files`.
        mirror: average over mirror images: of left and right, or along the ``"mirror_axes"`` (of the network's grid,
            counted from 0) that the inference config names because its network was trained on them.
        strategy: "sub-volumes", "slices" or "downsampled" instead of the bundle's own, where its network permits.
        overlap: share of a window that neighbours have in common, instead of the bundle's.
        precision: "fp32", "bf16", "fp16" or "auto", which is bfloat16 where the bundle allows a lower precision, the
            hardware is fast in it and a window of the first scan agrees with float32. A bundle allows it by
            ``"precision": "auto"`` in its inference config, or by ``amp`` of its evaluator.

    Returns:
        A :class:`medseg3d.pictures.PictureSegmenter` if the bundle's metadata says that its output has two axes (see
        :attr:`medseg3d.catalogue.BundleInfo.pictures`), else a :class:`medseg3d.segmenter.Segmenter`.

    Raises:
        ValueError: no such model, no such device, a bundle that cannot segment, or, for pictures, an argument that is
            for scans alone.
        UntrustedBundle: a foreign bundle without ``trust``.
        FileNotFoundError: the bundle has no weights.
    """
    bundle = find_bundle(model)
    bundle.require_trust(trust)
    if not bundle.labels:
        raise ValueError(
            f"{bundle.name} does not segment: {bundle.metadata.get('task', 'its metadata names no labels')}"
        )
    torch_device = resolve_device(device)
    check_precision(precision, torch_device)
    table = LabelTable(bundle.labels)
    own = OwnModules(bundle.path)
    importing = own.importable if bundle.has_code else nullcontext
    with own.importable():
        parser = _parser(bundle, torch_device)
        network, notes = _network(parser, bundle)
        preprocessing = _resolved(parser, bundle, *_PREPROCESSING)
        postprocessing = _resolved(parser, bundle, *_POSTPROCESSING)
        inferer = _resolved(parser, bundle, "inferer")
    settings = {"precision": precision, "mirror": mirror, "strategy": strategy, "overlap": overlap}
    settings |= {"max_ram": max_ram, "max_vram": max_vram, "crop_body": crop_body}
    if bundle.pictures is not None:
        _refuse_for_pictures(bundle, {**settings, "uncertainty": uncertainty})
    inferer = _changed(inferer, network, strategy, overlap)
    given = [weights] if isinstance(weights, (str, Path)) else weights
    network, files, more_notes = with_weights(network, given, bundle, parser)
    if weights:
        settings["weights"] = [file_sha256(file) for file in files]
    network = network.to(torch_device).eval()
    record = {**_record(bundle, files), "settings": settings}
    precision = "fp32" if precision == "auto" and not _allows_lower_precision(parser) else precision
    mirror = mirror and (parser.get("mirror_axes") or True)
    if bundle.pictures is not None:
        runner = Runner(network, torch_device, precision, compile, mirror)
        parts = preprocessing, inferer, postprocessing
        return _of_pictures(bundle, runner, *parts, record, notes + more_notes, importing)
    return Segmenter(
        network=network,
        preprocessing=_from_memory(preprocessing, bundle, inferer),
        inferer=inferer,
        postprocessing=_keep(postprocessing, lambda step: not isinstance(step, SaveImage | SaveImaged)),
        table=table,
        device=torch_device,
        name=f"{bundle.name} {bundle.version}",
        expects_hu=bundle.input_format.get("format") == "hounsfield",
        record=record,
        notes=notes + more_notes + _unheeded(max_vram, torch_device),
        compile=compile,
        precision=precision,
        mirror=mirror,
        max_ram=max_ram,
        max_vram=max_vram,
        uncertainty=uncertainty,
        crop_body=crop_body,
        importing=importing,
    )


def _unheeded(max_vram: int | str | None, device: torch.device) -> list[str]:
    if max_vram is None or device.type == "cuda":
        return []
    return [f"max_vram is of the memory of a CUDA device, and the network runs on {device.type}: it limits nothing"]


def _refuse_for_pictures(bundle: BundleInfo, given: Mapping[str, Any]) -> None:
    for name in FOR_SCANS:
        if given[name] not in (None, False):
            raise ValueError(f"{name} is for scans, and {bundle.name} segments pictures: leave it out")


def _of_pictures(
    bundle: BundleInfo,
    runner: Runner,
    preprocessing: Any,
    inferer: Callable,
    postprocessing: Any,
    record: Mapping[str, Any],
    notes: Sequence[str],
    importing: Callable[[], AbstractContextManager],
) -> PictureSegmenter:
    from medseg3d.data.pictures import LoadPictured
    from medseg3d.data.results import SaveResultd, named
    from medseg3d.pictures import PictureSegmenter

    if not any(isinstance(step, LoadPictured) for step in steps_of(preprocessing)):
        raise ValueError(
            f"{bundle.name}: its preprocessing must load with medseg3d.data.pictures.LoadPictured: MONAI's turns "
            "rows into columns"
        )
    assert bundle.pictures is not None
    channels = bundle.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return PictureSegmenter(
        runner=runner,
        preprocessing=_keep(preprocessing, lambda step: not isinstance(step, LoadPictured)),
        inferer=inferer,
        postprocessing=_keep(postprocessing, lambda step: not isinstance(step, SaveResultd | SaveImage | SaveImaged)),
        kind=bundle.pictures,
        categories=named(channels, bundle.stuff),
        name=f"{bundle.name} {bundle.version}",
        record=record,
        notes=notes,
        importing=importing,
    )


def parts_of(model: str | Path, trust: bool = False, **changes: Any) -> tuple[nn.Module, Compose, Any]:
    """Network, preprocessing and inferer of a bundle, to count what they do; the weights need not be there.

    A network of pictures gets its weights if they are: what a detector does depends on them. All others are random, the
    same each time.

    Args:
        model, trust: as for :func:`load_model`.
        changes: arguments of the network's class in place of those in the config.

    Raises:
        ValueError, UntrustedBundle: as :func:`load_model`, or the class does not take the ``changes``.
    """
    bundle = find_bundle(model)
    bundle.require_trust(trust)
    with OwnModules(bundle.path).importable():
        parser = _parser(bundle, torch.device("cpu"))
        if changes:
            parser["network_def"] = {**parser.get("network_def"), **changes}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, _ = _network(parser, bundle)
        if bundle.pictures and not changes and own_weights(bundle, parser).file.is_file():
            network, *_ = with_weights(network, None, bundle, parser)
        preprocessing = Compose([]) if bundle.pictures else _resolved(parser, bundle, *_PREPROCESSING)
        inferer = _resolved(parser, bundle, "inferer")
    return network, preprocessing if bundle.pictures else _from_memory(preprocessing, bundle, inferer), inferer


def _record(bundle: BundleInfo, files: Sequence[Path]) -> dict[str, Any]:
    """What a run report says of the model; several files of weights each with their own sha256."""
    record = model_record(bundle.name, bundle.version, bundle.path, files[0] if len(files) == 1 else None)
    if len(files) > 1:
        record |= {"weights": [*map(str, files)], "weights_sha256": [*map(file_sha256, files)]}
    return record


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


def _network(parser: ConfigParser, bundle: BundleInfo) -> tuple[nn.Module, list[str]]:
    """The network without its weights, and what was adapted to build it."""
    config = parser.get("network_def")
    if not isinstance(config, Mapping):
        return _resolved(parser, bundle, "network", "network_def"), []
    version = str(bundle.metadata.get("monai_version", ""))
    parser["network_def"], notes = adapt_network(config, version)
    try:
        return _resolved(parser, bundle, "network", "network_def"), notes
    except ValueError as refusal:
        as_in_monai, notes = adapt_network(config, version, prefer_own=False)
        if parser["network_def"]["_target_"] == as_in_monai["_target_"]:
            raise
        # MONAI's class takes what ours does not know, such as rarer norms and activations.
        parser["network_def"] = as_in_monai
        notes.append(f"MONAI's network is used; medseg3d's own cannot be: {in_words(refusal.__cause__ or refusal)}")
        return _resolved(parser, bundle, "network", "network_def"), notes


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


def _changed(inferer: Any, network: nn.Module, strategy: str | None, overlap: float | None) -> Any:
    """The inferer, or what was asked for in its place."""
    if strategy is not None:
        inferer = strategy_named(strategy, network, as_strategy(inferer))
    if overlap is not None:
        own = as_strategy(inferer)
        if not isinstance(own, SubVolumes) or isinstance(inferer, SimpleInferer):
            raise ValueError(f"overlap is of windows, which {type(inferer).__name__} does not have: leave it out")
        inferer = own.changed(overlap=overlap)
    return inferer


def _allows_lower_precision(parser: ConfigParser) -> bool:
    if parser.get("precision") == "auto":
        return True
    evaluator = parser.get("evaluator")
    amp = evaluator.get("amp", False) if isinstance(evaluator, Mapping) else False
    if isinstance(amp, str) and amp.startswith("@"):
        amp = parser.get(amp[1:])
    return amp is True


def _from_memory(preprocessing: Any, bundle: BundleInfo, inferer: Any) -> Compose:
    """The preprocessing for an image that is already read: without its loader, with a channel axis all the same."""
    loaders = [step for step in steps_of(preprocessing) if isinstance(step, LoadImage | LoadImaged)]
    for loader in loaders:
        if "image" not in getattr(loader, "keys", ()):
            raise ValueError(f"{bundle.name}: its preprocessing does not load the key 'image'")
    slices = 2 * getattr(inferer, "neighbours", 0) + 1  # of one image, which a 2D network gets as its channels
    channels = int(bundle.input_format.get("num_channels", slices))
    if channels not in (1, slices):
        raise ValueError(
            f"the network of {bundle.name} takes {channels} channels, but from one image it gets {slices}: medseg3d "
            "segments cases of one image"
        )
    rest = _keep(preprocessing, lambda step: not isinstance(step, LoadImage | LoadImaged))
    if any(getattr(getattr(loader, "_loader", loader), "ensure_channel_first", False) for loader in loaders):
        rest = Compose([EnsureChannelFirstd(keys="image"), *rest.transforms])
    return rest


def _keep(transform: Any, wanted: Callable[[Any], bool]) -> Compose:
    """The same steps, the very objects, without the unwanted ones: an Invertd finds them by identity."""
    return Compose([step for step in steps_of(transform) if wanted(step)])


class OwnModules:
    """A bundle's own ``scripts``: they can be imported within ``importable``, as in ``python -m monai.bundle run``.

    Others of the same names, of a program that segments or of another bundle, are out of sight meanwhile and back
    afterwards. So one bundle with code runs at a time.
    """

    _alone = RLock()

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        files = {path.stem for path in root.glob("*.py")}
        folders = {path.name for path in root.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
        self.names = (files | folders) - sys.stdlib_module_names - _EVERYBODYS
        self.modules: dict[str, ModuleType] = {}

    @contextmanager
    def importable(self) -> Iterator[None]:
        with self._alone:
            hidden = self._taken_out()
            sys.modules.update(self.modules)
            sys.path.insert(0, self.root)
            try:
                yield
            finally:
                sys.path.remove(self.root)
                self.modules = self._taken_out()
                sys.modules.update(hidden)

    def _taken_out(self) -> dict[str, ModuleType]:
        """All modules of the bundle's names, no longer among those that are imported."""
        names = [name for name in sys.modules if name.partition(".")[0] in self.names]
        return {name: sys.modules.pop(name) for name in names}
