"""Run a bundle's ``train.json`` as ``python -m monai.bundle run`` does, from any folder and with a progress bar."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from medseg3d.inference.device import resolve_device
from medseg3d.io import write_text

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
    dataset_dir: str | Path,
    output_dir: str | Path,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Train, or go on where an earlier run in ``output_dir`` was stopped.

    Under ``torchrun`` each process trains on its share of the data, by the bundle's multi_gpu_train.json.

    Args:
        bundle: its folder.
        dataset_dir: the folder that the bundle's data manifest starts from.
        output_dir: where checkpoints, curves and logs go.
        device: "auto", "cpu", "cuda:0", ...
        settings: values for ids of train.json, such as ``{"epochs": 10, "network_def::norm": "instance"}``.
        progress: whether to show a bar.

    Returns:
        The checkpoint with the best validation (or the last one if no epoch was validated).

    Raises:
        FileNotFoundError: the bundle has no train.json, or the dataset folder lacks a file that the manifest names.
        ModuleNotFoundError: an extra is not installed; the message names the command.
        ValueError: a setting that the train.json does not have, a value of another kind than it has there, or a run to
            be resumed that was on other cases.
    """
    settings = dict(settings or {})
    _require_modules(settings)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    names = ["train.json", *(["multi_gpu_train.json"] if several else [])]
    configs = [str(bundle / "configs" / name) for name in names]
    for config in configs:
        if not Path(config).is_file():
            raise FileNotFoundError(f"{bundle} has no configs/{Path(config).name}, so medseg3d cannot train it")
    if not Path(dataset_dir).is_dir():
        raise FileNotFoundError(f"the dataset folder {dataset_dir} does not exist")
    if flags := [flag for name, flag in _FLAGS.items() if name in settings]:
        raise ValueError(f"what {' and '.join(flags)} says cannot be set besides: give that in place of the setting")
    _require_ids(configs, settings)
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
    leave_errors_to_the_caller()
    from tqdm.contrib.logging import logging_redirect_tqdm

    if progress:
        from medseg3d.training.progress import Progress

        evaluator = workflow.parser.get_parsed_content("validate::evaluator")
        Progress(evaluator).attach(workflow.parser.get_parsed_content("train::trainer"))
    _require_same_data(Path(output_dir), workflow.parser)
    with logging_redirect_tqdm():  # lines of the log go above the bar
        workflow.run()
    workflow.finalize()
    folder = Path(workflow.parser.get_parsed_content("checkpoint_dir"))
    best = folder / "best.pt"
    return best if best.is_file() else folder / "last.pt"


def leave_errors_to_the_caller() -> None:
    """What stops a run, Ctrl-C too, is raised; engines and their handlers do not log its traceback besides."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _require_modules(settings: Mapping[str, Any]) -> None:
    missing = [name for name in ("ignite", "psutil", "tqdm") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"training needs {' and '.join(missing)}: pip install medseg3d[train]")
    for name, module in EXTRAS.items():
        if settings.get(name) and find_spec(module) is None:
            raise ModuleNotFoundError(f"{name} is not installed: pip install medseg3d[{name}]")


def _require_ids(configs: list[str], settings: Mapping[str, Any]) -> None:
    parser = ConfigParser()
    parser.read_config(configs)
    unknown = [name for name in settings if name not in parser and not _is_argument(name, parser)]
    if unknown:
        plain = ", ".join(name for name, value in parser.get().items() if not isinstance(value, dict | list))
        raise ValueError(f"the train.json has no {', '.join(unknown)}; it has {plain} and what lies within the others")
    for name, value in settings.items():
        if name in parser:
            _require_kind(name, value, parser[name])


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
