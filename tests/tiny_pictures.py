"""Pictures that are made up and MONAI Bundles of pictures that are tiny, whose right answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from medseg3d.io import write_image
from tests.tiny_bundles import write_bundle

SHAPE = (40, 52)
DISCS = ((10, 12, 6), (25, 33, 8), (33, 6, 4))  # row, column, radius
BRIGHT, DARK = 200, 30


def inside() -> np.ndarray:
    """(rows, columns) bool: the three discs, of which no two touch."""
    rows, columns = np.indices(SHAPE)
    return np.any([(rows - r) ** 2 + (columns - c) ** 2 < radius**2 for r, c, radius in DISCS], axis=0)


def numbered() -> np.ndarray:
    """The same with a number for each disc, in the order of their first pixels."""
    return ndimage.label(inside())[0]


def picture() -> np.ndarray:
    """uint8 (rows, columns), grey."""
    return np.where(inside(), BRIGHT, DARK).astype(np.uint8)


def write_picture(path: Path, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_image(path, picture() if array is None else array)


class Bright(torch.nn.Conv2d):
    """Two logits a pixel; class 1 is brighter than halfway."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1)

    @staticmethod
    def weights(classes: int = 2) -> dict[str, torch.Tensor]:
        weight, bias = torch.zeros(classes, 3, 1, 1), torch.zeros(classes)
        weight[1], bias[1] = 20.0, -30.0
        return {"weight": weight, "bias": bias}


class Detector(Bright):
    """The discs as a detector returns them, the larger the surer; odd ones are of class 2."""

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [self.detection(logits) for logits in super().forward(images)]

    def detection(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        objects, count = ndimage.label(logits.argmax(0).numpy())
        masks = torch.from_numpy(objects == np.arange(1, count + 1).reshape(-1, 1, 1))[:, None]
        boxes = [[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in ndimage.find_objects(objects)]
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.arange(1, count + 1) % 2 + 1,
            "scores": masks.sum((1, 2, 3)) / 400,
            "masks": masks.float(),
        }


class ClassAndObjectd:
    """ "pred" becomes (2, rows, columns): class 1 with numbered objects, 2 around them, nothing in the last column."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        classes = torch.where(torch.as_tensor(data["pred"]).argmax(0) == 1, 1, 2)
        classes[:, -1] = 0
        objects = torch.from_numpy(ndimage.label(classes.numpy() == 1)[0])
        return {**data, "pred": torch.stack([classes, objects])}


NAMES = {
    "semantic": ("background", "cell"),
    "instances": ("background", "cell"),
    "panoptic": ("background", "cell", "glass"),
}
OBJECTS = {"_target_": "medseg3d.inference.objects.ObjectsFromLogitsd", "keys": "pred"}
STEPS: dict[str, dict[str, Any]] = {
    "semantic": {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    "instances": OBJECTS,
    "panoptic": {"_target_": "tests.tiny_pictures.ClassAndObjectd"},
}


def config(kind: str, detector: bool = False) -> dict[str, Any]:
    """inference.json for MONAI's commands and ours: one picture a batch, saved by `SaveResultd`."""
    names = ("background", "small", "large") if detector else NAMES[kind]
    steps = [] if detector else [STEPS[kind]]
    saver = {
        "_target_": "medseg3d.data.results.SaveResultd",
        "keys": "pred",
        "output_dir": "@output_dir",
        "kind": kind,
        "categories": {str(number): name for number, name in enumerate(names)},
        "stuff": [2] if kind == "panoptic" else [],
    }
    windows = {"_target_": "medseg3d.inference.SubVolumes", "roi_size": [24, 24], "padding_mode": "reflect"}
    return {
        "imports": ["$from pathlib import Path"],
        "bundle_root": ".",
        "dataset_dir": ".",
        "output_dir": "eval",
        "device": "cpu",
        "network_def": {"_target_": f"tests.tiny_pictures.{'Detector' if detector else 'Bright'}"},
        "network": "@network_def",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "medseg3d.data.pictures.LoadPictured", "keys": "image"},
                {"_target_": "medseg3d.data.pictures.StretchContrastd", "keys": "image", "lower": 0, "upper": 100},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': str(path)} for path in sorted(Path(@dataset_dir).iterdir())]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {"_target_": "SimpleInferer"} if detector else windows,
        "postprocessing": {"_target_": "Compose", "transforms": [*steps, saver]},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "$torch.device(@device)",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "decollate": not detector,
        },
        "run": ["$@evaluator.run()"],
    }


def write_picture_bundle(
    folder: Path,
    kind: str,
    detector: bool = False,
    classes: int = 2,
    names: tuple[str, ...] = (),
    stuff: tuple[int, ...] = (2,),
    **changes: Any,
) -> Path:
    """A bundle that finds what is bright; ``changes`` are of its inference config, ``stuff`` of a panoptic one."""
    names = names or (("background", "small", "large") if detector else NAMES[kind])
    image = {"type": "image", "format": "magnitude", "modality": "microscopy", "num_channels": 3}
    pred = {"type": "image", "format": "segmentation", "channel_def": {str(n): name for n, name in enumerate(names)}}
    after = {
        "type": "image",
        "format": kind,
        "spatial_shape": ["*", "*"],
        "stuff": list(stuff) if kind == "panoptic" else [],
    }
    data_format = {"inputs": {"image": image}, "outputs": {"pred": pred}, "post_processed_outputs": {"pred": after}}
    return write_bundle(
        folder, {**config(kind, detector), **changes}, Bright.weights(classes), network_data_format=data_format
    )
