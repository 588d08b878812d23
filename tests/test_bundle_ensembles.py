"""Several files of weights for one network of a bundle: in its config, from Python and from the shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet

from medseg3d.bundle import ensemble_of_files, load_model
from medseg3d.inference.ensemble import Ensemble
from medseg3d.inference.precision import InPrecision
from tests import tiny_bundles as tiny
from tests.command_line import ROOT, names

SEEDS = (8, 3)


def load(path, **options):
    return load_model(path, "cpu", trust=True, precision=options.pop("precision", "fp32"), **options)


def labels(model, scan):
    return model.predict(scan).segmentation.array


def unet(seed):
    network = UNet(**{key: value for key, value in tiny.UNET.items() if key != "_target_"})
    network.load_state_dict(tiny.unet_state(seed))
    return network.eval()


def write_folds(folder):
    for number, seed in enumerate(SEEDS):
        torch.save(tiny.unet_state(seed), folder / "models" / f"model_fold{number}.pt")
    return folder


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """A bundle with a file of weights of its own and two more."""
    return write_folds(tiny.write_zoo_bundle(tmp_path_factory.mktemp("folds") / "folds_ct_unet"))


def as_docs_say(config):
    page = (ROOT / "docs" / "inference.md").read_text()
    (text,) = (text for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if "ensemble_of_files" in text)
    config.update(json.loads(text))
    config["handlers"] = config["handlers"][1:]  # the network comes with its weights


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A bundle whose config names its ensemble; there is no model.pt."""
    folder = tmp_path_factory.mktemp("own") / "ensemble_ct_unet"
    return write_folds(tiny.write_zoo_bundle(folder, edit=as_docs_say, state=None))


@pytest.fixture(scope="module")
def expected(models, ct_file):
    """Labels of the mean logits of both, by windows of the whole image and the bundle's own transforms."""
    model = models.zoo
    both = [unet(seed) for seed in SEEDS]

    def mean(window):
        return sum(network(window) for network in both) / 2

    found = model.runner.network
    try:
        model.runner._precise = mean
        result = labels(model, ct_file)
    finally:
        model.runner._precise = found
    single = labels(model, ct_file)
    assert (result != single).mean() > 0.01 and len(np.unique(result)) == 3
    return result


@pytest.mark.parametrize("form", ["names", "paths", "config"])
def test_labels_are_those_of_the_mean_logits(form, folds, own, expected, ct_file):
    files = ["model_fold0.pt", "model_fold1.pt"]
    paths = [folds / "models" / name for name in files]
    model = {
        "names": lambda: load(folds, weights=files),
        "paths": lambda: load(folds, weights=paths),
        "config": lambda: load(own),
    }[form]()
    assert isinstance(model.network, Ensemble) and not model.network.training and model.network.average == "logits"
    assert (labels(model, ct_file) != expected).sum() <= 3  # ties but for rounding


def test_monai_runs_the_config_to_the_same_labels(own, tmp_path):
    scan = tiny.write_ct(tmp_path / "in" / "scan.nii.gz")
    command = ["monai.bundle", "run", "--config_file", own / "configs" / "inference.json"]
    overrides = {"bundle_root": own, "dataset_dir": scan.parent, "output_dir": tmp_path / "out"}
    overrides["device"] = "$torch.device('cpu')"
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), *(f"--{key}={value}" for key, value in overrides.items())],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = np.asarray(nib.load(tmp_path / "out" / "scan" / "scan_trans.nii.gz").dataobj)
    assert (labels(load(own), scan) != written).sum() <= 3


def test_one_other_file_is_that_network(folds, models, ct_file):
    model = load(folds, weights="model_fold0.pt")
    assert not isinstance(model.network, Ensemble)
    np.testing.assert_array_equal(labels(model, ct_file), labels(models.zoo, ct_file))
    assert model.record["weights"].endswith("model_fold0.pt")


def test_from_the_shell_with_a_record(run, folds, expected, ct_file, tmp_path):
    code, _, err = run(
        "predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", "-m", folds, "--trust", "-d", "cpu", "-rp",
        "--weights", "model_fold0.pt", folds / "models" / "model_fold1.pt", "--uncertainty", "entropy",
        "--precision", "fp32",
    )  # fmt: skip
    assert (code, err) == (0, [])
    assert (np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj) != expected).sum() <= 3
    assert nib.load(tmp_path / "seg.entropy.nii.gz").shape == expected.shape
    record = json.loads((tmp_path / "seg.run.json").read_text())["model"]
    assert len(set(record["weights_sha256"])) == 2 and record["settings"]["weights"] == record["weights_sha256"]


def test_the_precision_is_that_of_each_network(folds, expected, ct_file):
    model = load(folds, weights=["model_fold0.pt", "model_fold1.pt"], precision="bf16")
    assert (labels(model, ct_file) == expected).mean() > 0.98
    networks = model.runner._precise.networks
    assert len(networks) == 2 and all(isinstance(one, InPrecision) for one in networks)
    assert all(parameter.dtype == torch.float32 for parameter in model.network.parameters())


def test_networks_share_no_weights(folds):
    with pytest.raises(ValueError, match="a file of weights or more, got none"):
        ensemble_of_files(unet(1), [])
    made = ensemble_of_files(unet(1), [folds / "models" / f"model_fold{n}.pt" for n in range(2)], "probabilities")
    assert made.average == "probabilities" and not made.training
    for network, seed in zip(made.networks, SEEDS, strict=True):
        for key, value in network.state_dict().items():
            assert torch.equal(value, tiny.unet_state(seed)[key])


def test_files_that_do_not_fit(folds, own, tmp_path):
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="weights of folds_ct_unet do not fit its UNet"):
        load(folds, weights=["model_fold0.pt", other])
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.pt"):
        load(folds, weights=["model_fold0.pt", "nowhere.pt"])
    with pytest.raises(ValueError, match="an ensemble whose config names its weights: leave weights out"):
        load(own, weights=["model_fold0.pt"])
    (own / "models" / "model_fold1.pt").rename(own / "models" / "gone.pt")
    try:
        with pytest.raises(ValueError, match=r"'network' of its inference config cannot be built: .*model_fold1.pt"):
            load(own)
    finally:
        (own / "models" / "gone.pt").rename(own / "models" / "model_fold1.pt")
    assert names(tmp_path) == ["other.pt"]
