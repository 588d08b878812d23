"""A bundle for data of one's own: its labels and voxels, trained and used."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import medseg3d
from medseg3d.catalogue import BundleInfo, find_bundle, shipped_bundles
from medseg3d.cli import main
from medseg3d.training.adapting import adapt_bundle
from medseg3d.training.run import train_bundle

LABELS = {"background": 0, "liver": 1, "kidney_left": 2, "kidney_right": 3}
SHAPE, SPACING = (36, 32, 28), (4.0, 4.0, 5.0)
HEADNECK = [bundle.name for bundle in shipped_bundles() if bundle.name.startswith("headneck")]
SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "batch_size": 1,
    "val_interval": 1,
    "patch_size": [32, 32, 32],
    "network_def::channels": [8, 16, 16, 16, 16],
    "cache_dir": None,
}


def write_list(folder, labels=LABELS, channel="CT", cases=4):
    """A datalist of boxes in water, every second case for validation."""
    rng = np.random.default_rng(0)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1])
    entries = {"training": [], "validation": []}
    for n in range(cases):
        numbers = np.zeros(SHAPE, np.uint8)
        for label, start in zip(labels.values(), (0, 4, 14, 24), strict=False):
            numbers[start : start + 8, 8:24, 6:22] = label
        ct = rng.normal(0, 20, SHAPE) + 100 * numbers
        entry = {"image": f"p{n}.nii.gz", "label": f"p{n}_seg.nii.gz"}
        nib.save(nib.Nifti1Image(ct.astype(np.int16), affine), folder / entry["image"])
        nib.save(nib.Nifti1Image(numbers, affine), folder / entry["label"])
        entries["validation" if n % 2 else "training"].append(entry)
    named = {str(number): name for name, number in labels.items()}
    path = folder / "abdomen.json"
    path.write_text(json.dumps({"name": "abdomen", "labels": named, "channel_names": {"0": channel}, **entries}))
    return path


def config(bundle, name):
    return ConfigParser(ConfigParser.load_config_file(bundle / "configs" / f"{name}.json"))


def class_names(content):
    """Of all that a config builds."""
    if isinstance(content, dict):
        yield str(content.get("_target_")).rpartition(".")[2]
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from class_names(part)


def test_it_is_trained_without_a_word_on_the_data_and_names_their_organs(tmp_path):
    made = adapt_bundle(find_bundle("headneck_ct_unet"), write_list(tmp_path), tmp_path / "own", spacing=[4])
    assert made.labels == {1: "liver", 2: "kidney_left", 3: "kidney_right"} and made.pairs == ((2, 3),)
    assert made.cases == {"train": 2, "validation": 2}
    assert made.spacing == (4, 4, 4) and made.median_spacing == SPACING
    best = train_bundle(made.path, None, tmp_path / "run", "cpu", SMALL, progress=False)
    inference = config(made.path, "inference")
    for name, value in (("network_def::channels", SMALL["network_def::channels"]), ("inferer::roi_size", [32] * 3)):
        inference[name] = value
    (made.path / "configs" / "inference.json").write_text(json.dumps(inference.get()))
    model = medseg3d.load_model(made.path, device="cpu", trust=True, weights=best)
    segmentation = model.predict(tmp_path / "p1.nii.gz").segmentation
    assert segmentation.array.shape == SHAPE and model.labels == made.labels
    assert torch.load(best, weights_only=True).popitem()[1].isfinite().all()


@pytest.mark.parametrize("name", HEADNECK)
def test_every_bundle_of_scans_follows_the_labels(name, tmp_path):
    made = adapt_bundle(find_bundle(name), write_list(tmp_path), tmp_path / "own", spacing=(2, 2, 3))
    train, inference = config(made.path, "train"), config(made.path, "inference")
    assert train["num_classes"] == inference["network_def::out_channels"] == 4
    assert train["to_grid::spacing"] == [2, 2, 3]
    (grid,) = (step for step in inference["preprocessing::transforms"] if "ToModelGridd" in step["_target_"])
    assert grid["spacing"] == [2, 2, 3]
    found = [*class_names(train.get()), *class_names(inference.get())]
    assert "LabelsOnInputGridd" in found and "DropSmallComponentsd" not in found
    text = " ".join((made.path / "configs" / "train.json").read_text().split())
    assert '"ratios": [1, 1, 1, 1]' in text
    if name != "headneck_ct_fcn_slices":  # its slices are not mirrored
        assert '"pairs": [ [2, 3] ]' in text
    bundle = BundleInfo(made.path, shipped=False)
    assert bundle.labels == made.labels and bundle.version == "0.1.0"
    assert not list(made.path.rglob("*.pt")) and "openkbp" not in json.dumps(bundle.metadata).lower()
    assert "liver" in (made.path / "docs" / "README.md").read_text()


def test_no_window_is_mirrored_where_no_organ_has_a_twin(tmp_path):
    data = write_list(tmp_path, {"background": 0, "liver": 1, "spleen": 2})
    made = adapt_bundle(find_bundle("headneck_ct_unet"), data, tmp_path / "own")
    assert made.pairs == () and made.spacing == (3, 3, 2.5)
    assert "RandMirrorLateralityd" not in class_names(config(made.path, "train").get())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"channel": "T2"}, ValueError, "its channel is 'T2'"),
        ({"labels": {"background": 0, "liver": 1, "spleen": 3}}, ValueError, "must be 0 to 2"),
        ({"labels": {}}, ValueError, "does not name its labels"),
        ({"cases": 1}, ValueError, "no case in split 'validation'"),
    ],
)
def test_data_that_no_bundle_can_be_made_for(change, error, words, tmp_path):
    data = write_list(tmp_path, **change)
    with pytest.raises(error, match=words):
        adapt_bundle(find_bundle("headneck_ct_unet"), data, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_a_damaged_scan_is_told_before_the_bundle_is_made(tmp_path):
    data = write_list(tmp_path)
    (tmp_path / "p1.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ValueError, match=r"p1\.nii\.gz"):
        adapt_bundle(find_bundle("headneck_ct_unet"), data, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_what_else_is_refused_leaves_nothing(tmp_path):
    data = write_list(tmp_path)
    for name in ("ct_swin_ssl", "nuclei_microscopy_unet"):
        with pytest.raises(ValueError, match=f"{name} cannot be adapted"):
            adapt_bundle(find_bundle(name), data, tmp_path / "own")
    for spacing in ([1, 2], [0], [float("nan")]):
        with pytest.raises(ValueError, match="one or three numbers above 0, in mm"):
            adapt_bundle(find_bundle("headneck_ct_unet"), data, tmp_path / "own", spacing=spacing)
    assert not (tmp_path / "own").exists()
    (tmp_path / "own").mkdir()
    with pytest.raises(FileExistsError, match="exists already: choose another folder"):
        adapt_bundle(find_bundle("headneck_ct_unet"), data, tmp_path / "own")


def test_the_command_says_what_it_made_and_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_list(tmp_path)
    assert main(["adapt", str(data), "-o", "own", "--spacing", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "own",
        "labels: 1 liver, 2 kidney_left, 3 kidney_right",
        "cases: 2 to train on, 2 to validate with",
        "voxels: 2 x 2 x 2 mm for the network; median of the scans 4 x 4 x 5 mm",
        "mirrored in training, with kidney_left and kidney_right exchanged",
        "next: medseg3d train -m own --trust -o RUN",
    ]
    assert main(["adapt", str(data), "-o", "own"]) == 1 and "own exists already" in capsys.readouterr().err
