"""Run a bundle's ``train.json`` as ``python -m monai.bundle run`` does, from any folder and with a progress bar."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from medseg3d.catalogue import BundleInfo
from medseg3d.data.manifest import dataset_of, shipped_manifests
from medseg3d.inference.device import resolve_device
from medseg3d.io import write_text
from medseg3d.io.labels import plain_name

EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # id of a train.json -> module and extra that it needs

_KINDS: dict[type, tuple[str, Any]] = {
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", int | float),
    list: ("a list", list | tuple),
}
_LOGGERS = (
    "monai.handlers.StatsHandler",
    *(f"ignite.engine.engine.Supervised{part}" for part in ("Trainer", "Evaluator")),
)


_FLAGS = {
    "bundle_root": "-m (bundle)",
    "dataset_dir": "--dataset-dir (dataset_dir)",
    "output_dir": "-o (output_dir)",
    "device": "-d (device)",
}  # ids of a train.json that have an argument of their own


def train_bundle(
    bundle: Path,
    dataset_dir: str | Path | None,
    output_dir: str | Path,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Train, or go on where an earlier run in ``output_dir`` was stopped.

    Under ``torchrun`` each process trains on its share of the data, by the bundle's multi_gpu_train.json.

    Args:
        bundle: its folder.
        dataset_dir: the folder that the paths of the data set start from; None for that of a list in ``settings``
            ("manifest"), or else the train.json's.
        output_dir: where checkpoints, curves and logs go.
        device: "auto", "cpu", "cuda:0", ...
        settings: values for ids of train.json, such as ``{"epochs": 10, "network_def::norm": "instance"}``.
        progress: whether to show a bar.

    Returns:
        The checkpoint with the best validation (or the last one if no epoch was validated).

    Raises:
        FileNotFoundError: the bundle has no train.json, or the dataset folder lacks a file that the manifest names.
        ModuleNotFoundError: an extra is not installed; the message names the command.
        ValueError: a setting that the train.json does not have, a value of another kind than it has there, data whose
            labels are not the bundle's, or a run to be resumed that was on other cases.
    """
    settings = dict(settings or {})
    _require_modules(settings)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    configs = _configs(bundle, several)
    if flags := [flag for name, flag in _FLAGS.items() if name in settings]:
        raise ValueError(f"what {' and '.join(flags)} says cannot be set besides: give that in place of the setting")
    parser = ConfigParser()
    parser.read_config(configs)
    _require_ids(parser, settings)
    parser.update({"bundle_root": str(bundle), **settings})
    dataset_dir = _dataset_dir(parser, settings, dataset_dir)
    _require_labels(BundleInfo(bundle, shipped=False), parser.get("manifest"), dataset_dir)
    settings |= {"bundle_root": str(bundle), "dataset_dir": str(dataset_dir), "output_dir": str(output_dir)}
    if not several or device != "auto":  # each of several processes finds its own
        settings["device"] = resolve_device(device)
    workflow = ConfigWorkflow(
        config_file=configs,
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=str(bundle / "configs" / "logging.conf"),
        workflow_type="train",
        **settings,
    )
    workflow.initialize()
    from tqdm.contrib.logging import logging_redirect_tqdm

    if progress:
        from medseg3d.training.progress import Progress

        evaluator = workflow.parser.get_parsed_content("validate::evaluator")
        Progress(evaluator).attach(workflow.parser.get_parsed_content("train::trainer"))
    _require_same_data(Path(output_dir), workflow.parser)
    with errors_left_to_the_caller(), logging_redirect_tqdm():  # lines of the log go above the bar
        workflow.run()
    workflow.finalize()
    folder = Path(workflow.parser.get_parsed_content("checkpoint_dir"))
    best = folder / "best.pt"
    return best if best.is_file() else folder / "last.pt"


@contextmanager
def errors_left_to_the_caller() -> Iterator[None]:
    """What stops a run, Ctrl-C too, is raised; engines and their handlers do not log its traceback besides."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_no_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _configs(bundle: Path, several: bool) -> list[str]:
    """Its configs for training, by one process or several; FileNotFoundError if it lacks one."""
    configs = [bundle / "configs" / name for name in ("train.json", "multi_gpu_train.json")[: 1 + several]]
    for config in configs:
        if not config.is_file():
            raise FileNotFoundError(f"{bundle} has no configs/{config.name}, so medseg3d cannot train it")
    return [str(config) for config in configs]


def _require_modules(settings: Mapping[str, Any]) -> None:
    missing = [name for name in ("ignite", "psutil", "tqdm") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"training needs {' and '.join(missing)}: pip install medseg3d[train]")
    for name, module in EXTRAS.items():
        if settings.get(name) and find_spec(module) is None:
            raise ModuleNotFoundError(f"{name} is not installed: pip install medseg3d[{name}]")


def _require_ids(parser: ConfigParser, settings: Mapping[str, Any]) -> None:
    unknown = [name for name in settings if name not in parser and not _is_argument(name, parser)]
    if unknown:
        plain = ", ".join(name for name, value in parser.get().items() if not isinstance(value, dict | list))
        raise ValueError(f"the train.json has no {', '.join(unknown)}; it has {plain} and what lies within the others")
    for name, value in settings.items():
        if name in parser:
            _require_kind(name, value, parser[name])


def _dataset_dir(parser: ConfigParser, settings: Mapping[str, Any], asked: str | Path | None) -> Path:
    """The folder that the paths of the data set start from."""
    if asked is not None:
        folder = Path(asked)
    elif settings.get("manifest") and settings["manifest"] not in shipped_manifests():
        folder = dataset_of(settings["manifest"]).root
    else:
        folder = Path(parser.get_parsed_content("dataset_dir"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the dataset folder {folder} does not exist: --dataset-dir says where the paths of the data set start; "
            "for data of your own say --data with a datalist, an nnU-Net folder or a CSV"
        )
    return folder


def _require_labels(bundle: BundleInfo, manifest: Any, dataset_dir: Path) -> None:
    """ValueError unless the data give the labels the numbers that the bundle gives them."""
    names = bundle.labels
    dataset = dataset_of(manifest, dataset_dir) if names and manifest else None
    if dataset is None or not dataset.labels:
        return
    data = {number: name for number, name in dataset.labels.items() if number}
    for number in sorted(names.keys() | data.keys()):
        here, there = data.get(number, "missing"), names.get(number, "missing")
        if plain_name(here) != plain_name(there):
            raise ValueError(
                f"label {number} is {here} in {dataset.name} and {there} in {bundle.name}, so the network would learn "
                "organs under wrong names: renumber the label maps, or make a bundle for these labels: medseg3d adapt "
                f"{manifest} -m {bundle.name} -o my_bundle"
            )


def _require_same_data(folder: Path, parser: ConfigParser) -> None:
    """Note what a run is trained on; ValueError where the one to be resumed was trained on other cases."""
    file = folder / "trained_on.json"
    data = {name: parser.get(name) for name in ("manifest", "fold", "cases") if name in parser}
    if file.is_file() and Path(parser.get_parsed_content("resume_path")).is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name in data if name in before and before[name] != data[name]]
        if other:
            had = " and ".join(f"{name} {before[name]}" for name in other)
            got = " and ".join(f"{name} {data[name]}" for name in other)
            raise ValueError(
                f"the run in {folder} had {had}, so it cannot go on with {got}, or it would be validated on cases that "
                "it has learnt: choose another output folder"
            )
    if os.environ.get("RANK", "0") == "0":
        write_text(file, json.dumps(data, indent=2) + "\n")


def _is_argument(name: str, parser: ConfigParser) -> bool:
    """Whether ``component::argument`` is one that the component's class takes and the train.json leaves as it is."""
    component, _, argument = name.rpartition("::")
    content = parser[component] if component and component in parser else None
    target = locate(str(content.get("_target_"))) if isinstance(content, dict) else None
    if not callable(target):
        return False
    return any(one.name == argument or one.kind is one.VAR_KEYWORD for one in signature(target).parameters.values())


def _require_kind(name: str, value: Any, usual: Any) -> None:
    """A number stays a number and a switch a switch; None, expressions and references may stand for anything."""
    if value is None or (isinstance(value, str) and value[:1] in "$@%"):
        return
    words, kinds = _KINDS.get(type(usual), ("", object))
    if not isinstance(value, kinds) or (words and isinstance(value, bool) != isinstance(usual, bool)):
        raise ValueError(f"{name} is {words} in the train.json, such as {json.dumps(usual)}; got {value!r}")
