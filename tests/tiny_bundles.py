"""A CT that is made up and MONAI Bundles that are tiny: what the tests of the main path share."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPACING = 4.0  # mm
SHAPE = (40, 36, 38)
BALLS = (((-30.0, 10.0, -20.0), 14.0), ((25.0, -15.0, 25.0), 11.0), ((5.0, 25.0, 5.0), 9.0))  # centre, radius; mm
BONE, TISSUE, AIR = 900, 40, -1000  # HU
MIDWAY = (BONE + TISSUE) / 2
LABELS = ("background", "left", "right")


# The CT


def centred(matrix: np.ndarray, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """An affine with these steps, whose grid has world (0, 0, 0) in its middle."""
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


LPS = centred(np.diag([-SPACING, -SPACING, SPACING]))


def world(affine: np.ndarray = LPS, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """(D, H, W, 3) mm, RAS+, of each voxel's centre."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def bone(affine: np.ndarray = LPS, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Which voxels of a grid lie in one of three balls that no rotation or reflection maps onto themselves."""
    points = world(affine, shape)
    return np.any([np.linalg.norm(points - centre, axis=-1) < radius for centre, radius in BALLS], axis=0)


def ct(affine: np.ndarray = LPS, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """int16 HU: a body of tissue in air, three balls of bone, and noise."""
    x, y, _ = np.moveaxis(world(affine, shape), -1, 0)
    array = np.where((x / 65) ** 2 + (y / 55) ** 2 < 1, TISSUE, AIR)
    array[bone(affine, shape)] = BONE
    return (array + np.random.default_rng(0).integers(-12, 13, array.shape)).astype(np.int16)


def write_ct(path: Path, affine: np.ndarray = LPS, array: np.ndarray | None = None) -> Path:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ct(affine) if array is None else array, affine), path)
    return path


# Bundles


def write_bundle(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, torch.Tensor] | None,
    labels: Sequence[str] = LABELS,
    suffix: str = "json",
    **metadata: Any,
) -> Path:
    """A folder with metadata.json, inference.json (or .yaml) and model.pt; no weights if `state` is None."""
    for part in ("configs", "models"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    image = {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1}
    pred = {"type": "image", "format": "segmentation", "channel_def": {str(n): name for n, name in enumerate(labels)}}
    described = {
        "version": "0.5.3",
        "monai_version": "1.6.1",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
        **metadata,
    }
    (folder / "configs" / "metadata.json").write_text(json.dumps(described))
    if suffix == "json":
        text = json.dumps(dict(config))
    else:
        import yaml

        text = yaml.safe_dump(dict(config))
    (folder / "configs" / f"inference.{suffix}").write_text(text)
    if state is not None:
        torch.save(dict(state), folder / "models" / "model.pt")
    return folder


def zoo_config(network_def: Mapping[str, Any], roi_size: Sequence[int] = (32, 32, 32)) -> dict[str, Any]:
    """inference.json as the zoo's `spleen_ct_segmentation` has it, with a smaller network and smaller windows."""
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": "/workspace/data/spleen_ct_segmentation",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data/Task09_Spleen",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": dict(network_def),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [4.5, 4.5, 5.0], "mode": "bilinear"},
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "image",
                    "a_min": -57,
                    "a_max": 964,
                    "b_min": 0,
                    "b_max": 1,
                    "clip": True,
                },
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(roi_size),
            "sw_batch_size": 4,
            "overlap": 0.5,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "meta_key_postfix": "meta_dict",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "meta_keys": "pred_meta_dict",
                    "output_dir": "@output_dir",
                },
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": True,
        },
        "initialize": ["$setattr(torch.backends.cudnn, 'benchmark', True)"],
        "run": ["$@evaluator.run()"],
    }


UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "norm": "batch",
}


def unet_state(seed: int = 8) -> dict[str, torch.Tensor]:
    """Random weights for `UNET`; the seed is one with which both styles of bundle find all labels in the CT."""
    from monai.networks.nets import UNet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(**{key: value for key, value in UNET.items() if key != "_target_"}).state_dict()


def write_zoo_bundle(folder: Path, **options: Any) -> Path:
    """A bundle in the style of MONAI's model zoo whose U-Net has random weights."""
    edit: Callable[[dict[str, Any]], Any] = options.pop("edit", lambda config: None)
    config = zoo_config(UNET)
    edit(config)
    return write_bundle(folder, config, options.pop("state", unet_state()), **options)


def own_config(network_def: Mapping[str, Any]) -> dict[str, Any]:
    """inference.json in medseg3d's own style; intensities become HU / 300."""
    return {
        "network_def": dict(network_def),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {
                    "_target_": "medseg3d.data.transforms.ToModelGridd",
                    "keys": "image",
                    "orientation": "RAS",
                    "spacing": [3.5, 3.5, 3.0],
                    "crop_above": -500,
                    "crop_margin": 10,
                },
                {"_target_": "ScaleIntensityd", "keys": "image", "minv": None, "maxv": None, "factor": -0.996666666},
            ],
        },
        "inferer": {"_target_": "medseg3d.inference.SubVolumes", "roi_size": [32, 32, 32], "overlap": 0.25},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "medseg3d.data.transforms.LabelsOnInputGridd", "keys": "pred", "orig_keys": "image"}
            ],
        },
    }


def write_threshold_bundle(folder: Path, labels: Sequence[str] = ("background", "bone")) -> Path:
    """A bundle in medseg3d's own style whose network says "bone" above `MIDWAY`, so that the truth is known."""
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    state = {
        "weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1),
        "bias": torch.tensor([0.0, -MIDWAY / 300]),
    }
    return write_bundle(folder, own_config(network), state, labels=labels)


def write_own_bundle(folder: Path) -> Path:
    """A bundle in medseg3d's own style with the random U-Net, whose answer depends on where left and right are."""
    return write_bundle(folder, own_config(UNET), unet_state())


def zipped(folder: Path, archive: Path, inside: str = "") -> Path:
    """The bundle's files in a zip, beneath the folder `inside`."""
    with zipfile.ZipFile(archive, "w") as content:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content.write(path, Path(inside, path.relative_to(folder)))
    return archive
