"""Run a bundle's ``train.json`` as ``python -m monai.bundle run`` does, from any folder and with a progress bar."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from medseg3d.inference.device import resolve_device


def train_bundle(
    bundle: Path,
    dataset_dir: str | Path,
    output_dir: str | Path,
    device: str = "auto",
    epochs: int | None = None,
    progress: bool = True,
) -> Path:
    """Train, or go on where an earlier run in ``output_dir`` was stopped.

    Returns:
        The checkpoint with the best validation Dice (or the last one if no epoch was validated).

    Raises:
        FileNotFoundError: the bundle has no train.json, or the dataset folder lacks a file that the manifest names.
        ModuleNotFoundError: the ``train`` extra is not installed; the message names the command.
    """
    missing = [name for name in ("ignite", "tqdm") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"training needs {' and '.join(missing)}: pip install medseg3d[train]")
    config = bundle / "configs" / "train.json"
    if not config.is_file():
        raise FileNotFoundError(f"{bundle} has no configs/train.json, so medseg3d cannot train it")
    if not Path(dataset_dir).is_dir():
        raise FileNotFoundError(f"the dataset folder {dataset_dir} does not exist")
    overrides: dict[str, Any] = {
        "bundle_root": str(bundle),
        "dataset_dir": str(dataset_dir),
        "output_dir": str(output_dir),
        "device": resolve_device(device),
    }
    if epochs is not None:
        overrides["epochs"] = epochs
    workflow = ConfigWorkflow(
        config_file=str(config),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=str(bundle / "configs" / "logging.conf"),
        workflow_type="train",
        **overrides,
    )
    workflow.initialize()
    if progress:
        from ignite.handlers import ProgressBar

        trainer = workflow.parser.get_parsed_content("train::trainer")
        ProgressBar(desc="training").attach(trainer, output_transform=lambda output: {"loss": float(output["loss"])})
    workflow.run()
    workflow.finalize()
    folder = Path(workflow.parser.get_parsed_content("checkpoint_dir"))
    best = folder / "best.pt"
    return best if best.is_file() else folder / "last.pt"
