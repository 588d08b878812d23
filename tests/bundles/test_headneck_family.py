"""The bundles of the same organs by other networks and strategies: each runs, trains and says what it is.

What they share with headneck_ct_unet, MONAI's handling of errors and the like, is tested on that one.
"""

from __future__ import annotations

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

import medseg3d as ms
from medseg3d.catalogue import find_bundle, shipped_bundles
from medseg3d.data.transforms import ToModelGridd

SHARED = "headneck_ct_unet"
NAMES = sorted(b.name for b in shipped_bundles() if b.name.startswith("headneck_ct_") and b.name != SHARED)
# Networks and windows small enough to train in seconds.
TINY = {
    "headneck_ct_swin_unetr": {"network_def::feature_size": 12},
    "headneck_ct_unet_downsampled": {"size": [32, 32, 16], "network_def::channels": [8, 8, 8]},
    "headneck_ct_unetr": {"network_def::hidden_size": 24, "network_def::mlp_dim": 24, "network_def::feature_size": 4},
    "headneck_ct_vnet": {"patch_size": [32, 32, 32], "network_def::width": 2},
    "headneck_ct_fcn_slices": {"patch_size": [64, 64], "crop_size": [64, 64], "network_def::width": 0.0625},
}


@pytest.fixture(autouse=True)
def leave_no_seed():
    yield
    set_determinism(None)


@pytest.fixture(params=NAMES)
def bundle(request):
    return find_bundle(request.param)


def configs(bundle, *names):
    return [str(bundle.path / "configs" / f"{name}.json") for name in names]


def parsed(bundle, names, *wanted):
    parser = ConfigParser()
    parser.read_config(configs(bundle, *names))
    parser["bundle_root"] = str(bundle.path)
    return [parser.get_parsed_content(name) for name in wanted]


def run(bundle, *names, **overrides):
    """``python -m monai.bundle run`` in this process."""
    monai.bundle.run(
        config_file=configs(bundle, *names),
        logging_file=False,
        bundle_root=str(bundle.path),
        **{"device": "$torch.device('cpu')", **overrides},
    )


def test_they_are_of_the_same_organs(bundle):
    assert bundle.labels == find_bundle(SHARED).labels


def test_monai_and_predict_give_the_same_labels(bundle, neck, tmp_path):
    run(bundle, "inference", dataset_dir=str(neck / "ct"), output_dir=str(tmp_path))
    written = np.asarray(nib.load(tmp_path / "neck_seg.nii.gz").dataobj)
    expected = ms.load_model(bundle.name, device="cpu", precision="fp32").predict(neck / "ct" / "neck.nii.gz")
    assert np.mean(written == expected.segmentation.array) > 0.9999, "but for ties between classes"
    assert len(np.unique(written)) > 3


def test_a_network_is_trained_as_it_is_run(bundle):
    """The same network, strategy, grid and intensities in train.json, evaluate.json and inference.json."""
    (trained,), (network, inferer, inference) = (
        parsed(bundle, ["train"], "network_def"),
        parsed(bundle, ["inference"], "network_def", "inferer", "preprocessing"),
    )
    assert str(trained) == str(network)
    (evaluated, validation) = parsed(bundle, ["train", "evaluate"], "validate::inferer", "validate::preprocessing")
    assert type(evaluated) is type(inferer) and vars(evaluated) == vars(inferer)
    (training,) = parsed(bundle, ["train"], "train::deterministic_transforms")
    for steps in (validation.transforms, training):
        grids = [step.grid for step in steps if isinstance(step, ToModelGridd)]
        expected = [step.grid for step in inference.transforms if isinstance(step, ToModelGridd)]
        assert vars(grids[0]) == vars(expected[0]) and len(expected) == 1
        scalers = [step.scaler for step in (*inference.transforms, *steps) if hasattr(step, "scaler")]
        assert len(scalers) == 2 and vars(scalers[0]) == vars(scalers[1])


@pytest.mark.parametrize("names", [["train"], ["train", "evaluate"]])
def test_validation_and_evaluation_heed_the_fold(bundle, names):
    parser = ConfigParser()
    parser.read_config([bundle.path / "configs" / f"{name}.json" for name in names])
    assert "fold=@fold)" in parser["validate::dataset::data"]


def test_scans_smaller_than_a_window_are_validated_in_air(bundle):
    (inferer, low) = parsed(bundle, ["train"], "validate::inferer", "scale_intensity::b_min")
    padded = getattr(inferer, "cval", getattr(inferer, "padding_value", low))
    assert padded == low < -3


def test_it_trains(bundle, phantoms, tmp_path):
    settings = {"epochs": 1, "iterations_per_epoch": 2, "val_interval": 1, "batch_size": 2, **TINY[bundle.name]}
    run(bundle, "train", output_dir=str(tmp_path), **phantoms.overrides, **settings)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert all(torch.isfinite(value.float()).all() for value in best.values())
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 2


def test_swin_unetr_starts_from_a_pre_trained_encoder(phantoms, tmp_path):
    file = find_bundle("ct_swin_ssl").path / "models" / "model.pt"
    settings = {"epochs": 1, "iterations_per_epoch": 1, "val_interval": 1, "learning_rate": 0.0, "encoder": str(file)}
    bundle = find_bundle("headneck_ct_swin_unetr")
    run(bundle, "train", output_dir=str(tmp_path), **phantoms.overrides, **settings)
    started = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["model"]
    pretrained = torch.load(file, weights_only=True)
    encoder = [name for name in started if name.startswith("swinViT.") and name in pretrained]
    assert len(encoder) > 100
    assert all(torch.equal(started[name], pretrained[name]) for name in encoder)
