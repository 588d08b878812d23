"""A bundle for data of one's own: a copy of one that can be trained, with their labels and voxels in its configs."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg3d.catalogue import BundleInfo
from medseg3d.data.datasets import Dataset
from medseg3d.data.manifest import datalist, dataset_of, shipped_manifests
from medseg3d.inference.augmentation import side_pairs
from medseg3d.io import read_geometry

NOT_COPIED = ("models", "docs", "runs", "eval", "__pycache__")
CONFIGS = ("train.json", "inference.json")
# Of organs that are one piece; a bundle for vessels or tumours would lose some of them.
LEFT_OUT = ("DropSmallComponentsd",)
MIRROR = "RandMirrorLateralityd"


@dataclass(frozen=True)
class AdaptedBundle:
    """What `adapt_bundle` made.

    `labels` maps number to name without the background. `cases` counts those with a label map in "train" and
    "validation". `spacing` is that of the network's grid, `median_spacing` that of the scans as they are stored, both
    in mm and in the order of their axes (the network's are those of RAS). `pairs` are labels (left, right) that change
    places in mirrored windows; without one no window is mirrored.
    """

    path: Path
    labels: Mapping[int, str]
    cases: Mapping[str, int]
    spacing: tuple[float, ...]
    median_spacing: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]


def adapt_bundle(
    bundle: BundleInfo,
    data: str | Path,
    output: str | Path,
    dataset_dir: str | Path | None = None,
    spacing: Sequence[float] | None = None,
) -> AdaptedBundle:
    """Copy a bundle and put the labels of a data set into its train.json, inference.json and metadata.json.

    Network, windows, intensities and augmentation stay, but for three things: crops are centred on each class alike,
    left and right are mirrored only where labels come in pairs (which change places), and small components are kept.
    Weights are not copied.

    Args:
        bundle: the one to copy; of scans, with a train.json that has "manifest" and "num_classes".
        data: name or path of a manifest, a datalist, an nnU-Net folder or a CSV, with cases for validation.
        output: the new bundle's folder, which must not exist.
        dataset_dir: the folder that the paths of the data start from; the list's own by default.
        spacing: of the network's grid, in mm, one number or three (left to right, front to back, up); by default the
            bundle's.

    Raises:
        FileNotFoundError: an image or a label map of the list is missing.
        FileExistsError: `output` exists.
        ValueError: the bundle cannot be adapted, or the data lack names of labels, cases for validation or CT.
    """
    output = Path(output).expanduser()
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another folder for the bundle, or remove it")
    configs = {name: _read(bundle.path / "configs" / name) for name in (*CONFIGS, "metadata.json")}
    train = configs["train.json"]
    if bundle.pictures or not {"manifest", "num_classes", "to_grid"} <= set(train):
        raise ValueError(f"{bundle.name} cannot be adapted: its train.json does not segment scans by a list of labels")
    dataset = dataset_of(data, dataset_dir)
    manifest = str(data) if str(data) in shipped_manifests() else str(Path(data).expanduser().resolve())
    cases = {split: datalist(data, dataset.root, split) for split in ("train", "validation")}
    _require_ct(dataset)
    voxels = _spacing(spacing, train["to_grid"]["spacing"])
    pairs = side_pairs(dataset.labels)
    for name in CONFIGS:
        configs[name] = _adapted(configs[name], len(dataset.labels), voxels, pairs)
    train = configs["train.json"]
    train |= {"manifest": manifest, "dataset_dir": str(dataset.root.resolve()), "num_classes": len(dataset.labels)}
    configs["inference.json"]["network_def"]["out_channels"] = len(dataset.labels)
    configs["metadata.json"] = _metadata(configs["metadata.json"], bundle, dataset, output.name)
    images = [case["image"] for split in cases.values() for case in split]
    median = np.median([read_geometry(image).spacing for image in images], axis=0).round(3)
    _write(output, bundle, configs, _card(output.name, bundle, dataset, voxels))
    return AdaptedBundle(
        path=output,
        labels={number: name for number, name in dataset.labels.items() if number},
        cases={split: len(members) for split, members in cases.items()},
        spacing=tuple(voxels),
        median_spacing=tuple(median.tolist()),
        pairs=pairs,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parents[1]} has no configs/{path.name}, so it cannot be adapted")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _require_ct(dataset: Dataset) -> None:
    several = [case.name for case in dataset.cases if len(case.images) > 1]
    names = [name for name in dataset.channels if "ct" not in name.lower().split("_") and name.lower() != "image"]
    if several or names:
        what = f"{several[0]} has several images" if several else f"its channel is {names[0]!r}"
        raise ValueError(
            f"{dataset.name} is no set of CTs of one channel ({what}); the bundles that ship scale Hounsfield units: "
            "copy one by hand and change its intensities and channels too"
        )


def _spacing(asked: Sequence[float] | None, usual: Sequence[float]) -> list[float]:
    voxels = [float(size) for size in (usual if asked is None else asked)]
    voxels = voxels * 3 if len(voxels) == 1 else voxels
    if len(voxels) != 3 or not all(0 < size < np.inf for size in voxels):
        raise ValueError(f"the spacing is one or three numbers above 0, in mm; got {asked}")
    return voxels


def _adapted(content: Any, classes: int, voxels: list[float], pairs: Iterable[tuple[int, int]]) -> Any:
    """A config, or a part of one, for so many classes."""
    if isinstance(content, list):
        dropped = LEFT_OUT if pairs else (*LEFT_OUT, MIRROR)
        return [_adapted(item, classes, voxels, pairs) for item in content if _class_name(item) not in dropped]
    if not isinstance(content, dict):
        return content
    adapted = {key: _adapted(value, classes, voxels, pairs) for key, value in content.items()}
    if _class_name(content) == "ToModelGridd" and isinstance(content.get("spacing"), list):
        adapted["spacing"] = voxels
    if _class_name(content) == MIRROR:
        adapted["pairs"] = [list(pair) for pair in pairs]
    if "ratios" in content:
        adapted["ratios"] = [1] * classes
    if adapted.get("output_dtype") == "$np.uint8" and classes > 256:
        adapted["output_dtype"] = "$np.uint16"
    return adapted


def _class_name(content: Any) -> str:
    return str(content.get("_target_")).rpartition(".")[2] if isinstance(content, dict) else ""


def _metadata(metadata: dict[str, Any], bundle: BundleInfo, dataset: Dataset, name: str) -> dict[str, Any]:
    labels = {str(number): label for number, label in dataset.labels.items()}
    formats = metadata["network_data_format"]
    formats["outputs"]["pred"] |= {"num_channels": len(labels), "channel_def": labels}
    formats["post_processed_outputs"]["pred"] |= {
        "value_range": [0, len(labels) - 1],
        "dtype": "uint8" if len(labels) <= 256 else "uint16",
    }
    described = ", ".join(f"{number} {label}" for number, label in labels.items())
    return metadata | {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"made of {bundle.name} {bundle.version}"},
        "name": name,
        "task": f"{len(labels) - 1} labels of {dataset.name}",
        "description": f"{bundle.name} for the labels of {dataset.name}.",
        "authors": "",
        "copyright": "",
        "data_source": dataset.source or dataset.name,
        "label_classes": described,
        "pred_classes": f"{len(labels)} channels, one logit a class, in the order of the labels",
        "eval_metrics": {},
        "references": [],
    }


def _card(name: str, bundle: BundleInfo, dataset: Dataset, voxels: list[float]) -> str:
    rows = "\n".join(f"| {number} | {label} |" for number, label in dataset.labels.items() if number)
    grid = " x ".join(f"{size:g}" for size in voxels)
    return f"""# {name}

A copy of the bundle {bundle.name} {bundle.version} for the labels of {dataset.name}, with voxels of {grid} mm.
It has no weights before it is trained:

```sh
medseg3d train -m {name} --trust -o RUN
medseg3d predict -i SCANS -o RESULTS -m {name} --trust --weights RUN/checkpoints/best.pt
```

Copy `RUN/checkpoints/best.pt` to `models/model.pt` and the second command needs no `--weights`. Say here what it was
trained on, how well it does on cases that had no part in the training, and what it is not for.

| label | name |
|---|---|
{rows}
"""


def _write(output: Path, bundle: BundleInfo, configs: Mapping[str, Any], card: str) -> None:
    """All of it, or nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for name, content in configs.items():
            (folder / "configs" / name).write_text(_json(content), encoding="utf-8")
        (folder / "models").mkdir()
        (folder / "docs").mkdir()
        (folder / "docs" / "README.md").write_text(card, encoding="utf-8")
        folder.rename(output)


def _json(content: Any) -> str:
    """For people to read and change: what holds nothing but numbers and words stays on one line."""
    text = json.dumps(content, indent=2)
    flat = re.compile(r"([\[{])\n\s+([^\[\]{}]{1,100}?)\n\s+([\]}])")
    return flat.sub(lambda found: found[1] + re.sub(r"\n\s+", " ", found[2]) + found[3], text) + "\n"
