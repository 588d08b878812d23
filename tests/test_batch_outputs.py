"""What lies beside a segmentation: masks of single labels, and nothing that tells of another one."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

import medseg3d
from medseg3d import cli
from medseg3d.batch import predict_many
from medseg3d.outputs import OutputPlan
from tests.command_line import names


@pytest.fixture
def model(models):
    return models.threshold


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("target", ["out", "seg.nii.gz"])
def test_masks_are_the_labels_one_by_one_on_the_scans_grid(target, models, scans, tmp_path):
    model = models.own
    (result,) = predict_many(model, scans / "a.nii.gz", OutputPlan(tmp_path / target, masks=True))
    segmentation = nib.load(result.outputs["segmentation"])
    folder = tmp_path / ("out/a_masks" if target == "out" else "seg_masks")
    assert {path.name for path in folder.iterdir()} == {f"{name}.nii.gz" for name in model.labels.values()}
    for number, name in model.labels.items():
        mask = nib.load(folder / f"{name}.nii.gz")
        assert mask.get_data_dtype() == np.uint8 and np.array_equal(mask.affine, segmentation.affine)
        assert np.array_equal(voxels(folder / f"{name}.nii.gz"), np.asarray(segmentation.dataobj) == number)
    assert any(voxels(path).any() for path in folder.iterdir())


def test_names_of_masks_are_fit_for_files_and_differ(tmp_path):
    labels = {1: "left lung", 2: "Left Lung", 3: "L1/L2", 4: "T12"}
    files = OutputPlan(tmp_path, ".seg.nrrd", masks=True, labels=labels).files("ct")
    masks = [path.relative_to(tmp_path).as_posix() for kind, path in files.items() if kind.startswith("mask")]
    assert masks == [f"ct_masks/{name}.nrrd" for name in ("left_lung_1", "Left_Lung_2", "L1_L2", "T12")]


def test_masks_are_part_of_what_is_resumed_and_of_what_goes(model, scans, tmp_path, monkeypatch):
    plan, bare = OutputPlan(tmp_path / "out", masks=True), OutputPlan(tmp_path / "out")
    list(predict_many(model, scans / "a.nii.gz", bare))
    (result,) = predict_many(model, scans / "a.nii.gz", plan, resume=True)
    assert not result.resumed, "its masks were missing"
    (result,) = predict_many(model, scans / "a.nii.gz", plan, resume=True)
    assert result.resumed
    assert list(predict_many(model, scans / "a.nii.gz", bare)) and list((tmp_path / "out" / "a_masks").iterdir())
    (tmp_path / "out" / "a_masks" / "notes.txt").touch()
    monkeypatch.setitem(model.record, "bundle_sha256", "another model")
    list(predict_many(model, scans / "a.nii.gz", bare))
    assert names(tmp_path / "out" / "a_masks") == ["notes.txt"], "masks of another model are none of this one"


def test_masks_from_the_command_line(bundles, ct_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", "-i", str(ct_file), "-m", str(bundles.threshold), "--trust", "-d", "cpu", "-q"]
    assert cli.main([*arguments, "-o", "out", "--masks"]) == 0
    stem = ct_file.name.removesuffix(".nii.gz")
    assert capsys.readouterr().out.splitlines() == [f"out/{stem}_seg.nii.gz", f"out/{stem}_masks"]
    assert names(tmp_path / "out" / f"{stem}_masks") == ["bone.nii.gz"]


def test_one_mask_by_number_or_name(model, scans, tmp_path):
    segmentation = model.predict(scans / "a.nii.gz")
    number, name = next(iter(model.labels.items()))
    by_name, by_number = (segmentation.save_mask(label, tmp_path / f"{label}.nii.gz") for label in (name, number))
    assert np.array_equal(voxels(by_name), voxels(by_number)) and voxels(by_name).any()
    with pytest.raises(ValueError, match=f"there is no label 'lung'; there are .*{name}"):
        segmentation.save_mask("lung", tmp_path / "lung.nii.gz")
    assert isinstance(segmentation, medseg3d.Segmentation)


def test_nothing_of_another_segmentation_stays_beside_a_single_file(model, scans, tmp_path):
    target = tmp_path / "seg.nii.gz"
    list(predict_many(model, scans / "a.nii.gz", OutputPlan(target, "", True, True)))
    beside = {"seg.labels.json", "seg.nii.gz", "seg.preview.png", "seg.stats.csv", "seg.stats.json"}
    (tmp_path / "seg.json").touch()  # none of ours: this is no model of pictures
    list(predict_many(model, scans / "a.nii.gz", target))
    assert beside < set(names(tmp_path)), "the same segmentation has the same figures"
    image = nib.load(scans / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), scans / "turned.nii.gz")
    list(predict_many(model, scans / "turned.nii.gz", OutputPlan(target, preview=True)))
    left = {name for name in names(tmp_path) if name.startswith("seg")}
    assert left == beside - {"seg.stats.csv", "seg.stats.json"} | {"seg.json"}


def test_a_failure_tells_what_was_odd_about_the_scan(model, scans, tmp_path, monkeypatch):
    image = nib.load(scans / "a.nii.gz")
    image.header.set_xyzt_units("meter")
    nib.save(image, scans / "metres.nii.gz")

    def too_large(*arguments, **keywords):
        raise MemoryError("Unable to allocate 828. TiB")

    monkeypatch.setattr(type(model), "segment", too_large)
    (result,) = predict_many(model, scans / "metres.nii.gz", tmp_path / "out")
    assert result.out_of_memory and "out of memory" in result.error
    assert "lengths converted from meter to mm" in result.error and "check the units in the header" in result.error


def test_a_folder_may_have_a_name_with_a_dot(model, scans, tmp_path):
    (tmp_path / "seg.txt").mkdir()
    for folder in ("seg.txt", "results.v2"):
        (result,) = predict_many(model, scans / "a.nii.gz", tmp_path / folder)
        assert result.outputs["segmentation"] == tmp_path / folder / "a_seg.nii.gz"
