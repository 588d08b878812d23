"""How sure the network is, on the scan's grid: what all classes at every voxel tell, in the same pass as labels."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd
from scipy import special, stats

import medseg3d as ms
from medseg3d.batch import predict_many
from medseg3d.data.transforms import applied_frame
from medseg3d.inference import CoarseToFine, Downsampled
from medseg3d.outputs import OutputPlan
from medseg3d.recipe import as_strategy
from medseg3d.several import SeveralModels
from tests import tiny_bundles as tiny
from tests.command_line import names

KINDS = ("entropy", "margin")
PARTS = ("network", "preprocessing", "inferer", "postprocessing", "table", "device", "name")
CLOSE = 2**-11 + 2**-13  # float16, and steps of 2**-12


def unsure(model, kind, **changes):
    """The model with uncertainty, without loading it again."""
    return ms.Segmenter(**{part: getattr(model, part) for part in PARTS} | changes, uncertainty=kind)


def preprocessed(model, array, affine):
    meta = {"original_channel_dim": "no_channel"}
    return model.preprocessing({"image": MetaTensor(torch.from_numpy(array.astype(np.float32)), affine, meta)})


def whole(logits_K, kind):
    """scipy on the logits of the whole image, (...)."""
    shares = special.softmax(logits_K.numpy().astype(np.float64), axis=0)
    if kind == "entropy":
        return stats.entropy(shares, axis=0) / np.log(len(shares))
    ordered = np.sort(shares, axis=0)
    return ordered[-1] - ordered[-2]


def whole_logits(model, image, network=None):
    with torch.no_grad():
        return as_strategy(model.inferer)(image.as_tensor()[None], network or model.network)[0]


class Sharpened(torch.nn.Sequential):
    """Random weights say little: their logits are made larger."""

    def forward(self, window):
        return 40 * super().forward(window)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_all_logits_give_through_the_transforms_of_monai(kind, models):
    model, network = models.zoo, Sharpened(models.zoo.network)
    data = preprocessed(model, tiny.ct(), tiny.LPS)
    image = data["image"]
    value = torch.from_numpy(whole(whole_logits(model, image, network), kind)).float()
    pred = MetaTensor(value[None]).copy_meta_from(image)
    inverse = Invertd("pred", model.preprocessing, "image", nearest_interp=False)
    back = inverse({**data, "pred": pred})["pred"][0].numpy()
    found = unsure(model, kind, network=network).predict((tiny.ct(), tiny.LPS)).uncertainty
    assert found.array.dtype == np.float32 and found.shape == back.shape and back.std() > 0.05
    inside = (slice(2, -2),) * 3  # how half-known voxels at the very edge are filled differs
    np.testing.assert_allclose(found.array[inside], back[inside], atol=CLOSE + 1e-3)
    np.testing.assert_allclose(found.affine, tiny.LPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", [None, Downsampled((24, 20, 16))])
def test_it_is_what_all_logits_give_along_the_recorded_frame(kind, strategy, models):
    """The bundle crops: outside of the network's grid it is that of a network that is sure."""
    changes = {} if strategy is None else {"inferer": strategy}
    model = unsure(models.own, kind, **changes)
    array = np.pad(tiny.ct(), [(0, 20), (0, 0), (0, 0)], constant_values=tiny.AIR)
    image = preprocessed(model, array, tiny.LPS)["image"]
    sure = 1.0 if kind == "margin" else 0.0
    if strategy is None:
        value = whole(whole_logits(model, image), kind)
        back = applied_frame(image).inverse().image(value.astype(np.float32), fill=sure)
    found = model.predict((array, tiny.LPS)).uncertainty.array
    assert found.shape == array.shape and 0 <= found.min() < 0.9 and found.max() <= 1
    assert (found[-8:] == sure).all() and not (found[:40] == sure).all()
    if strategy is None:
        np.testing.assert_allclose(found[3:35, 3:-3, 3:-3], back[3:35, 3:-3, 3:-3], atol=CLOSE)


@pytest.mark.parametrize("model", ["own", "zoo", "threshold"])
def test_the_network_runs_as_often_and_labels_stay(model, models, ct_file):
    plain, runs = getattr(models, model), []
    expected = plain.predict(ct_file)
    assert expected.uncertainty is None
    hook = plain.network.register_forward_hook(lambda network, inputs, output: runs.append(len(output)))
    counts = []
    try:
        for one in (plain, unsure(plain, "entropy")):
            runs.clear()
            result = one.predict(ct_file)
            counts.append(sum(runs))
    finally:
        hook.remove()
    assert counts[0] == counts[1] > 0
    np.testing.assert_array_equal(result.segmentation.array, expected.segmentation.array)
    assert result.uncertainty.geometry.same_as(result.segmentation.geometry)


def test_the_network_is_unsure_near_its_threshold(models, ct_file):
    """Tissue and bone lie 430 HU from it, a logit of 1.4; air lies 1470 HU below."""
    hu = np.asarray(nib.load(ct_file).dataobj)
    for kind, near, far in (("entropy", 0.71, 0.06), ("margin", 0.61, 0.985)):
        found = unsure(models.threshold, kind).predict(ct_file).uncertainty.array
        np.testing.assert_allclose([found[hu > -500].mean(), found[hu < -900].mean()], [near, far], atol=0.05)


# What has none


def test_a_kind_that_does_not_exist(models):
    with pytest.raises(ValueError, match="kind must be one of entropy, margin, got 'variance'"):
        unsure(models.own, "variance")


@pytest.mark.parametrize(
    "changes",
    [
        {"inferer": lambda image, network: network(image)},
        {"inferer": CoarseToFine()},
        {"postprocessing": Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)])},
    ],
)
def test_a_bundle_that_is_carried_out_as_it_stands_is_refused_at_once(changes, models):
    with pytest.raises(ValueError, match=r"carried out as it stands, and gives no margin: .* leave uncertainty out"):
        unsure(models.zoo, "margin", **changes)


def test_an_oblique_scan_is_refused_before_the_network_runs(models, monkeypatch):
    turn = np.array([[-3.8, 0.6, 0.1], [-0.7, -3.9, 0.4], [0.2, 0.3, 4.2]])
    model = unsure(models.zoo, "entropy")
    monkeypatch.setattr(model.runner, "network", lambda window: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"axes are parallel .* those of this scan are oblique: leave uncertainty out"):
        model.predict((tiny.ct(tiny.centred(turn)), tiny.centred(turn)))


def test_several_models_have_none(models):
    with pytest.raises(ValueError, match="uncertainty is of one model's classes"):
        SeveralModels([models.threshold, unsure(models.own, "entropy")])


def test_what_was_not_made_is_not_written(models, ct_file, tmp_path):
    with pytest.raises(ValueError, match="load the model with uncertainty='entropy' or 'margin'"):
        models.threshold.predict(ct_file).save_uncertainty(tmp_path / "u.nii.gz")
    assert names(tmp_path) == []


def test_a_batch_writes_the_map_that_its_model_makes(models, ct_file, tmp_path):
    model = unsure(models.threshold, "entropy")
    (result,) = model.predict_many(ct_file, tmp_path)
    assert result.outputs["uncertainty"] == tmp_path / "ct.entropy.nii.gz" and result.outputs["uncertainty"].is_file()
    for other, made in ((model, "'entropy'"), (models.threshold, "none")):
        with pytest.raises(ValueError, match=f"'margin' is to be written, but the model makes {made}"):
            predict_many(other, ct_file, OutputPlan(tmp_path, uncertainty="margin"))
    assert not (tmp_path / "ct.margin.nii.gz").exists()


# From the shell


@pytest.mark.parametrize("kind", KINDS)
def test_predict_writes_it_beside_the_labels(kind, predict, models, ct_file, tmp_path):
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", "--uncertainty", kind, "-rp", "--precision", "fp32")
    assert (code, err) == (0, [])
    assert out == [str(tmp_path / name) for name in ("seg.nii.gz", f"seg.{kind}.nii.gz", "seg.run.json")]
    assert names(tmp_path) == sorted(["seg.labels.json", "seg.nii.gz", f"seg.{kind}.nii.gz", "seg.run.json"])
    image, scan = nib.load(tmp_path / f"seg.{kind}.nii.gz"), nib.load(ct_file)
    assert image.shape == scan.shape and image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.affine, scan.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim"):
        np.testing.assert_array_equal(image.header[field], scan.header[field])
    expected = unsure(models.threshold, kind).predict(ct_file).uncertainty.array
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
    assert 0 <= expected.min() < expected.max() <= 1
    assert json.loads((tmp_path / "seg.run.json").read_text())["options"]["uncertainty"] == kind


def test_a_folder_that_is_read_again_and_resumed(predict, ct_file, tmp_path):
    tiny.write_ct(tmp_path / "ct.nii.gz")
    assert predict(tmp_path, tmp_path, "--uncertainty", "margin", "--resume")[0] == 0
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    assert set(written) == {"ct.nii.gz", "ct_seg.nii.gz", "ct.margin.nii.gz"}
    code, _, err = predict(tmp_path, tmp_path, "--uncertainty", "margin", "--resume")
    told = "\n".join(err)
    assert code == 0 and "map of uncertainty" in told and "finished by an earlier run" in told
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")} == written
    code, _, err = predict(tmp_path, tmp_path, "--uncertainty", "entropy", "--resume")  # that one is not there yet
    assert code == 0 and (tmp_path / "ct.entropy.nii.gz").is_file() and not any("earlier run" in line for line in err)


def test_nothing_is_left_where_the_labels_cannot_be_written(predict, ct_file, tmp_path, monkeypatch):
    def fail(result, path):
        raise OSError("the disk is full")

    monkeypatch.setattr("medseg3d.segmenter.Segmentation.save", fail)
    code, _, err = predict(ct_file, tmp_path / "seg.nii.gz", "--uncertainty", "entropy")
    assert code == 1 and "the disk is full" in err[-1] and names(tmp_path) == []


def test_several_models_are_refused_from_the_shell(run, bundles, ct_file, tmp_path):
    models = ("-m", bundles.threshold, bundles.own, "--trust")
    for option in (("--uncertainty", "entropy"), ("--weights", "a.pt")):
        code, _, err = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", *models, *option)
        assert code == 2 and f"{option[0]} is for one model, got 2" in err[-1] and names(tmp_path) == []
