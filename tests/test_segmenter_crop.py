"""Windows over the box of the body only: what is left out is told, and nothing of the body is."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

import medseg3d as ms
from medseg3d.inference import BodyBox, Downsampled, SubVolumes
from tests import tiny_bundles as tiny

SHAPE = (80, 76, 38)  # the same body, more air around it
AFFINE = tiny.centred(np.diag([-tiny.SPACING, -tiny.SPACING, tiny.SPACING]), SHAPE)
PARTS = ("network", "preprocessing", "inferer", "postprocessing", "table", "device", "name")


def cropped(model, **changes):
    """The model with windows over the body only, without loading it again."""
    return ms.Segmenter(**{part: getattr(model, part) for part in PARTS} | {"crop_body": True} | changes)


@pytest.fixture(scope="module")
def scan():
    return tiny.ct(AFFINE, SHAPE)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Says "bone" above a density; its preprocessing keeps the air."""
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    config = tiny.own_config(network)
    config["preprocessing"]["transforms"][1]["crop_above"] = None
    state = {
        "weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1),
        "bias": torch.tensor([0.0, -tiny.MIDWAY / 300]),
    }
    return tiny.write_bundle(tmp_path_factory.mktemp("b") / "bone", config, state, labels=("background", "bone"))


@pytest.fixture(scope="module")
def threshold(bundle):
    return ms.load_model(bundle, "cpu", trust=True, precision="fp32")


def test_nothing_of_the_body_is_lost_and_what_is_left_out_is_told(threshold, scan):
    whole, part = threshold.predict((scan, AFFINE)), cropped(threshold).predict((scan, AFFINE))
    assert whole.segmentation.array.any() and whole.crop is None
    np.testing.assert_array_equal(part.segmentation.array, whole.segmentation.array)
    crop = part.crop
    volume = np.prod(np.subtract(crop["stop"], crop["start"])) / np.prod(crop["grid"])
    assert crop["left_out"] == pytest.approx(1 - volume, abs=1e-4) and crop["left_out"] > 0.4
    (told,) = set(part.warnings) - set(whole.warnings)
    assert f"{crop['left_out']:.1%} of them are left out" in told and f"[{crop['start'][0]}:{crop['stop'][0]}, " in told


@pytest.mark.parametrize("key", ["zoo", "own"])
def test_windows_of_any_bundle_are_fewer(key, models, scan):
    """Also of MONAI's inferer, on intensities that were scaled and clipped."""
    model = getattr(models, key)
    plans = [one.plan(one.read((scan, AFFINE))) for one in (model, cropped(model))]
    result = cropped(model).predict((scan, AFFINE))
    if key == "zoo":
        assert plans[1].windows < plans[0].windows
    assert result.crop["left_out"] >= 0 and result.segmentation.array.any()


def test_where_the_body_fills_the_scan_nothing_changes(models):
    expected, result = (one.predict((tiny.ct(), tiny.LPS)) for one in (models.zoo, cropped(models.zoo)))
    assert result.crop["left_out"] == 0 and result.warnings == expected.warnings
    np.testing.assert_array_equal(result.segmentation.array, expected.segmentation.array)


def test_a_scan_of_air_is_segmented_whole(threshold):
    array = np.random.default_rng(0).integers(-1024, -700, SHAPE).astype(np.int16)
    result = cropped(threshold).predict((array, AFFINE))
    assert result.crop["left_out"] == 0 and not result.segmentation.array.any()


def test_the_crop_of_a_bundle_itself_is_told_too(threshold, scan):
    inferer = SubVolumes(32, 0.25, crop=BodyBox(-500 / 300, margin=4))
    result = cropped(threshold, inferer=inferer, crop_body=False).predict((scan, AFFINE))
    np.testing.assert_array_equal(result.segmentation.array, threshold.predict((scan, AFFINE)).segmentation.array)
    assert result.crop["left_out"] > 0.4 and any("left out" in warning for warning in result.warnings)


@pytest.mark.parametrize("changes", [{"inferer": Downsampled((16, 16, 16))}, {"expects_hu": False}])
def test_what_cannot_be_cropped(changes, threshold):
    with pytest.raises(ValueError, match=r"bone 0\.5\.3 does not lay windows over a CT"):
        cropped(threshold, **changes)


def test_from_the_shell(run, bundle, tmp_path, scan):
    path = tiny.write_ct(tmp_path / "ct.nii.gz", AFFINE, scan)
    command = ("predict", "-i", path, "-m", bundle, "--trust", "-d", "cpu", "-rp", "-o")
    code, _, err = run(*command, tmp_path / "seg.nii.gz", "--crop-body")
    assert code == 0
    report = json.loads((tmp_path / "seg.run.json").read_text())
    (case,) = report["cases"]
    assert report["options"]["crop_body"] is True and set(case["crop"]) == {"grid", "start", "stop", "left_out"}
    assert any("of them are left out" in line for line in err)
    assert any("of them are left out" in warning for warning in case["warnings"])
    assert nib.load(tmp_path / "seg.nii.gz").shape == SHAPE
    run(*command, tmp_path / "plain.nii.gz")
    assert "crop" not in json.loads((tmp_path / "plain.run.json").read_text())["cases"][0]
