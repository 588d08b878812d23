"""Segmenter.predict: every kind of input, every kind of grid, and what it does with what it cannot segment."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import medseg3d as ms
from medseg3d.io import write_volume
from tests import tiny_bundles as tiny

ORIENTATIONS = [
    "".join(codes)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*axes)
]  # fmt: skip


def rotation(degrees, axis):
    angle = np.deg2rad(degrees)
    turned = np.eye(3)
    a, b = (other for other in range(3) if other != axis)
    turned[np.ix_((a, b), (a, b))] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turned


SHEAR = np.eye(3)
SHEAR[1, 2] = np.tan(np.deg2rad(18.5))  # a gantry tilt
GRIDS = {
    "anisotropic": (np.diag([-2.0, -2.5, 6.0]), (70, 56, 25)),
    "thick slices along the first axis": (np.array([[0, -3, 0], [0, 0, 3], [7, 0, 0]], float), (22, 50, 46)),
    "oblique": (rotation(25, 2) @ rotation(-15, 0) @ np.diag([-4.0, -4.0, 4.0]), (40, 40, 40)),
    "oblique and anisotropic": (rotation(35, 0) @ rotation(10, 1) @ np.diag([3.0, -3.0, 5.0]), (52, 52, 34)),
    "sheared": (SHEAR @ np.diag([-4.0, -4.0, 4.0]), (40, 44, 40)),
    "sheared, oblique, anisotropic": (rotation(20, 1) @ SHEAR @ np.diag([3.0, -3.0, 5.0]), (52, 56, 32)),
}


# What goes in


def metatensor(array, affine, channels=0):
    return MetaTensor(torch.from_numpy(array.astype(np.float32)).reshape((1,) * channels + array.shape), affine=affine)


def sitk_image(array, affine):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


INPUTS = {
    "nibabel": lambda array, affine: nib.Nifti1Image(array, affine),
    "SimpleITK": sitk_image,
    "(array, affine)": lambda array, affine: (array, affine),
    "MetaTensor": metatensor,
    "MetaTensor with a channel": lambda array, affine: metatensor(array, affine, channels=1),
    "Volume": lambda array, affine: ms.Volume(array, affine),
}


@pytest.mark.parametrize("model", ["own", "zoo"])
@pytest.mark.parametrize("kind", INPUTS)
def test_every_type_gives_the_labels_of_the_file(model, kind, models, ct_file):
    segmenter = getattr(models, model)
    expected = segmenter.predict(ct_file)
    assert len(np.unique(expected.segmentation.array)) == 3
    result = segmenter.predict(INPUTS[kind](tiny.ct(), tiny.LPS.copy()))
    np.testing.assert_array_equal(result.segmentation.array, expected.segmentation.array)
    np.testing.assert_allclose(result.segmentation.affine, tiny.LPS, atol=1e-5)


@pytest.mark.parametrize("name", ["a b.nii", "ct.nrrd", "ct.mha", "größe.nii.gz"])
def test_every_file_format_gives_the_same_labels(name, models, tmp_path):
    volume = ms.Volume(tiny.ct(), tiny.LPS)
    path = write_volume(volume, tmp_path / name)
    expected = models.own.predict(volume).segmentation.array
    for given in (path, str(path)):
        np.testing.assert_array_equal(models.own.predict(given).segmentation.array, expected)


@pytest.mark.parametrize("model", ["own", "zoo"])
def test_the_input_is_never_changed(model, models):
    segmenter = getattr(models, model)
    array, affine = tiny.ct().astype(np.float32), tiny.LPS.copy()
    segmenter.predict((array, affine))
    np.testing.assert_array_equal(array, tiny.ct())
    np.testing.assert_array_equal(affine, tiny.LPS)

    tensor = metatensor(array, affine)
    before = copy.deepcopy((tensor.as_tensor(), tensor.affine, dict(tensor.meta), list(tensor.applied_operations)))
    segmenter.predict(tensor)
    assert torch.equal(tensor.as_tensor(), before[0]) and torch.equal(tensor.affine, before[1])
    assert tensor.meta.keys() == before[2].keys() and list(tensor.applied_operations) == before[3]

    image = nib.Nifti1Image(array, affine)
    header = bytes(image.header.binaryblock)
    segmenter.predict(image)
    assert bytes(image.header.binaryblock) == header
    np.testing.assert_array_equal(image.get_fdata(), tiny.ct())


def test_something_else_is_refused(models):
    with pytest.raises(TypeError, match="give a path, a nibabel or SimpleITK image"):
        models.own.predict(3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        models.own.predict(Path("nowhere.nii.gz"))


# What comes out


def test_result(models, ct_file, tmp_path):
    result = models.threshold.predict(ct_file)
    assert result.labels == {1: "bone"} and result.model_name == "bone_ct_threshold 0.5.3"
    assert result.segmentation.dtype == np.uint8
    assert set(result.seconds) == {"read", "preprocess", "network", "labels", "postprocess"}
    overlap = np.count_nonzero(result.segmentation.array[tiny.bone()]) / np.count_nonzero(tiny.bone())
    assert overlap > 0.98

    bone = result.statistics()["labels"]["bone"]
    assert bone["voxels"] == np.count_nonzero(result.segmentation.array)
    assert bone["hu"]["median"] == pytest.approx(tiny.BONE, abs=15)

    saved = nib.load(result.save(tmp_path / "seg.nii.gz"))
    assert saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(saved.affine, nib.load(ct_file).affine)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), result.segmentation.array)
    assert ms.io.read_label_table(tmp_path / "seg.nii.gz").names == {1: "bone"}
    assert result.preview(tmp_path / "seg.png").stat().st_size > 10_000


def test_the_shipped_model_segments_on_the_input_grid(shipped_model, ct_file):
    stages = []
    result = shipped_model.predict(ct_file, progress=stages.append)
    assert stages == ["read", "preprocess", "network", "precision", "labels", "postprocess"]
    assert result.labels == {
        1: "brainstem",
        2: "spinal_cord",
        3: "parotid_right",
        4: "parotid_left",
        5: "esophagus",
        6: "larynx",
        7: "mandible",
    }
    assert result.segmentation.shape == tiny.SHAPE
    np.testing.assert_array_equal(result.segmentation.affine, result.image.affine)
    assert np.array_equal(shipped_model.predict(ct_file).segmentation.array, result.segmentation.array)


# Every kind of grid


@pytest.fixture(scope="module")
def in_ras(models):
    """The random U-Net's answer for the CT in its original order, brought to RAS by nibabel."""
    result = models.own.predict((tiny.ct(), tiny.LPS)).segmentation
    assert (np.bincount(result.array.ravel(), minlength=3) > 1000).all()
    return canonical(result)


def canonical(volume):
    return nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))


def turned(image, codes):
    now, wanted = (nib.orientations.axcodes2ornt(c) for c in (nib.aff2axcodes(image.affine), codes))
    return image.as_reoriented(nib.orientations.ornt_transform(now, wanted))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_all_48_orientations_give_one_segmentation(codes, models, in_ras):
    image = turned(nib.Nifti1Image(tiny.ct(), tiny.LPS), codes)
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    result = models.own.predict(image).segmentation
    np.testing.assert_array_equal(result.affine, image.affine)
    again = canonical(result)
    np.testing.assert_allclose(again.affine, in_ras.affine, atol=1e-9)
    np.testing.assert_array_equal(again.dataobj, in_ras.dataobj)


@pytest.mark.parametrize("codes", ["RAS", "SPL", "AIR"])
def test_orientations_through_the_transforms_of_monai(codes, models):
    expected = canonical(models.zoo.predict((tiny.ct(), tiny.LPS)).segmentation)
    image = turned(nib.Nifti1Image(tiny.ct(), tiny.LPS), codes)
    result = models.zoo.predict(image).segmentation
    np.testing.assert_array_equal(result.affine, image.affine)
    different = np.count_nonzero(np.asarray(canonical(result).dataobj) != np.asarray(expected.dataobj))
    assert different <= 3  # MONAI's interpolation rounds differently in each direction


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_gives_the_same_segmentation_in_space(grid, models):
    matrix, shape = GRIDS[grid]
    affine = tiny.centred(matrix, shape)
    result = models.threshold.predict((tiny.ct(affine, shape), affine))
    np.testing.assert_array_equal(result.segmentation.affine, affine)
    assert result.segmentation.shape == shape

    found, truth = result.segmentation.array > 0, tiny.bone(affine, shape)
    dice = 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth))
    assert dice > 0.9
    world = tiny.world(affine, shape)
    for centre, radius in tiny.BALLS[:2]:
        near = np.linalg.norm(world - centre, axis=-1) < 1.4 * radius
        offset = world[near & found].mean(axis=0) - world[near & truth].mean(axis=0)
        assert np.linalg.norm(offset) < 0.3  # mm; half a voxel would be 1 or more
    volume = np.count_nonzero(found) * abs(np.linalg.det(matrix))
    assert volume == pytest.approx(sum(4 / 3 * np.pi * radius**3 for _, radius in tiny.BALLS), rel=0.1)


@pytest.mark.parametrize("affine", [GRIDS["sheared"][0], GRIDS["oblique"][0]], ids=["sheared", "oblique"])
def test_a_file_keeps_its_grid(affine, models, tmp_path):
    path = tiny.write_ct(tmp_path / "ct.nii.gz", tiny.centred(affine))
    written = nib.load(models.own.predict(path).save(tmp_path / "seg.nii.gz"))
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)


def test_a_scan_smaller_than_a_window_and_one_much_larger(models):
    affine = tiny.centred(np.diag([-4.0, -4.0, 4.0]), (6, 5, 4))
    small = np.random.default_rng(0).integers(-1000, 500, (6, 5, 4)).astype(np.int16)
    assert models.own.predict((small, affine)).segmentation.shape == (6, 5, 4)
    long = np.tile(tiny.ct(), (1, 1, 4))
    result = models.threshold.predict((long, tiny.centred(np.diag([-4.0, -4.0, 4.0]), long.shape)))
    assert np.count_nonzero(result.segmentation.array) == pytest.approx(4 * np.count_nonzero(tiny.bone()), rel=0.1)


# What cannot be segmented


def bad(change):
    array = tiny.ct().astype(np.float32)
    return change(array)


def with_voxel(value):
    def change(array):
        array[3, 3, 3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_voxel(np.nan), "NaN or infinite"),
        (with_voxel(-np.inf), "NaN or infinite"),
        (lambda array: array[:, :, :1], "single slice"),
        (lambda array: array[:, :2], "each axis needs at least 4 voxels"),
        (lambda array: np.full_like(array, -1000), "every voxel is -1000"),
        (lambda array: array[:, :, 0], "2D"),
        (lambda array: np.stack([array, array], -1), "2 volumes"),
        (lambda array: array * 1j, "complex"),
    ],
)
@pytest.mark.parametrize("expects_hu", [True, False])
def test_damaged_voxels_are_refused_for_every_modality(change, reason, expects_hu, models, monkeypatch):
    monkeypatch.setattr(models.own, "expects_hu", expects_hu)
    with pytest.raises(ValueError, match=reason):
        models.own.predict((bad(change), tiny.LPS))


def test_what_is_not_ct_is_refused_unless_it_is_allowed(models, monkeypatch):
    grey = ((tiny.ct().astype(float) + 1100) / 10).clip(0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match="--allow-non-hu"):
        models.own.predict((grey, tiny.LPS))
    result = models.own.predict((grey, tiny.LPS), allow_non_hu=True)
    assert any("not Hounsfield units" in warning for warning in result.warnings)
    monkeypatch.setattr(models.own, "expects_hu", False)  # an MR bundle
    assert not models.own.predict((grey, tiny.LPS)).warnings


def test_an_empty_segmentation_is_told(models):
    nothing = tiny.ct().clip(max=100)
    warnings = models.threshold.predict((nothing, tiny.LPS)).warnings
    assert any("nothing was found" in warning for warning in warnings)
    assert not any("nothing was found" in w for w in models.threshold.predict((tiny.ct(), tiny.LPS)).warnings)


@pytest.mark.parametrize(
    ("prediction", "reason"),
    [
        (torch.zeros(1, 20, 20, 20), "Invertd"),
        (torch.full((1, *tiny.SHAPE), 7.0), r"labels \[7\] that its metadata.json does not name"),
        (torch.zeros(3, *tiny.SHAPE), "needs one label a voxel"),
        (torch.ones(3, *tiny.SHAPE), "needs one label a voxel"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(prediction, reason, models, monkeypatch):
    monkeypatch.setattr(models.own, "postprocessing", lambda data: {"pred": prediction})
    with pytest.raises(ValueError, match=reason):
        models.own.predict((tiny.ct(), tiny.LPS))


@pytest.mark.parametrize("scale", [1.0, 0.7])  # masks, and what is not masks: probabilities or logits
def test_a_channel_for_each_class_becomes_labels(scale, models, monkeypatch):
    expected = np.random.default_rng(0).integers(0, 3, tiny.SHAPE)
    channels = scale * torch.from_numpy(np.stack([expected == k for k in range(3)])).float()
    monkeypatch.setattr(models.own, "postprocessing", lambda data: {"pred": channels})
    np.testing.assert_array_equal(models.own.predict((tiny.ct(), tiny.LPS)).segmentation.array, expected)


def test_many_labels_need_more_than_a_byte(models, monkeypatch):
    table = ms.LabelTable({number: f"organ {number}" for number in range(1, 301)})
    answer = torch.zeros(1, *tiny.SHAPE)
    answer[0, 5, 5, 5] = 300
    monkeypatch.setattr(models.own, "table", table)
    monkeypatch.setattr(models.own, "postprocessing", lambda data: {"pred": answer})
    array = models.own.predict((tiny.ct(), tiny.LPS)).segmentation.array
    assert array.dtype == np.uint16 and array.max() == 300
