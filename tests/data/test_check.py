"""Every fault that a data set can have is found, and nothing is found where all is well."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg3d.data import known_files
from medseg3d.data.check import check_dataset
from medseg3d.data.datasets import Case, Dataset
from medseg3d.geometry import Geometry
from medseg3d.io import read_volume, write_image, write_label_image, write_label_map, write_volume
from medseg3d.volume import Volume

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
LABELS = {0: "background", 1: "liver", 2: "spleen"}


def image(seed=0):
    return np.random.default_rng(seed).normal(0, 100, (6, 7, 8)).astype(np.float32)


def label():
    array = np.zeros((6, 7, 8), np.uint8)
    array[1:3], array[4] = 1, 2
    return array


@pytest.fixture
def case(tmp_path):
    """case(name, ...) writes image and label of a case and returns it."""

    def write(name, ct=None, seg=None, ct_affine=AFFINE, seg_affine=AFFINE, suffix=".nii.gz", **more):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        paths = [tmp_path / f"{name}{end}{suffix}" for end in ("", "_seg")]
        write_volume(Volume(image(seed) if ct is None else ct, ct_affine), paths[0])
        write_volume(Volume(label() if seg is None else seg, seg_affine), paths[1])
        return Case(name, (paths[0],), paths[1], more.pop("patient", name), **more)

    return write


def findings(*cases, quick=False, **more):
    """(case, grade, text) of what is found in a data set of these cases."""
    dataset = Dataset("d", cases[0].images[0].parent, cases, **{"labels": LABELS, **more})
    return [(f.case, f.grade, f.text) for f in check_dataset(dataset, quick=quick).findings]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_nothing_is_found_where_all_is_well(suffix, case):
    cases = (case("a", suffix=suffix), case("b", suffix=suffix, split="test"))
    assert findings(*cases) == findings(*cases, quick=True) == []
    report = check_dataset(Dataset("d", cases[0].images[0].parent, cases, LABELS))
    assert report.facts["a"].voxels == {1: 112, 2: 56} and report.present == {"a": {1, 2}, "b": {1, 2}}
    assert report.facts["b"].grid.same_as(Geometry((6, 7, 8), AFFINE))


def shifted(mm):
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
@pytest.mark.parametrize(
    ("changes", "grade", "text"),
    [
        ({"seg": label()[:5]}, "fault", "its shape is (5, 7, 8), the image's (6, 7, 8)"),
        ({"seg_affine": np.diag([2.0, -2.0, 3.0, 1.0])}, "fault", "its axes are RPS, the image's LPS"),
        ({"seg_affine": np.diag([-2.0, -2.0, 3.5, 1.0])}, "fault", "its spacing is 2 x 2 x 3.5 mm"),
        ({"seg_affine": shifted(5)}, "fault", "its voxels lie up to 5 mm from the image's"),
        ({"seg_affine": shifted(0.05)}, "doubt", "its voxels lie up to 0.05 mm"),
    ],
)
def test_label_and_image_must_lie_on_one_grid(changes, grade, text, suffix, case):
    for quick in (True, False):
        ((name, found, told),) = findings(case("a", suffix=suffix, **changes), quick=quick)
        assert (name, found) == ("a", grade) and f"a_seg{suffix}: {text}" in told


def test_rounding_of_the_affine_is_none(case):
    assert findings(case("a", seg_affine=shifted(0.0005))) == []


def test_channels_must_lie_on_one_grid(case):
    a, b = case("a"), case("b", ct=image()[:, :5], seg=label()[:, :5])
    both = replace(a, images=(*a.images, *b.images))
    assert findings(both) == [("a", "fault", "b.nii.gz: its shape is (6, 5, 8), the image's (6, 7, 8)")]


def with_value(array, value):
    array[0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("changes", "grade", "text"),
    [
        ({"ct": with_value(image(), np.nan)}, "fault", "a.nii.gz: 1 of 336 voxels are NaN or infinite"),
        ({"ct": with_value(image(), np.inf)}, "fault", "1 of 336 voxels are NaN or infinite"),
        ({"ct": np.full((6, 7, 8), -1000, np.int16)}, "fault", "every voxel is -1000"),
        ({"seg": with_value(label(), 9)}, "fault", "a_seg.nii.gz: 9 is no label of the data set (0 to 2)"),
        (
            {"seg": with_value(label().astype(np.int16), -1)},
            "fault",
            "this has -1, as in an image: are image and label",
        ),
        (
            {"seg": with_value(label().astype(np.float32), 0.5)},
            "fault",
            "a_seg.nii.gz is no label map: it holds fractions such as 0.5",
        ),
        ({"seg": with_value(label().astype(np.float32), np.nan)}, "fault", "it holds fractions such as nan"),
        ({"seg": np.zeros((6, 7, 8), np.uint8)}, "doubt", "a_seg.nii.gz: nothing but background"),
        ({"annotated": (1,)}, "fault", "a_seg.nii.gz: has label 2, which was not looked for, by the list"),
    ],
)
def test_voxels(changes, grade, text, case):
    first, others = case("a", **changes), case("b")
    found = [finding for finding in findings(first, others) if finding[0] == "a"]
    assert any(finding[1] == grade and text in finding[2] for finding in found)
    assert findings(first, others, quick=True) == []


def test_labels_stored_as_floats_are_labels(case):
    assert findings(case("a", seg=label().astype(np.float32))) == []
    assert findings(case("a", seg=label() * np.float32(0.99999994))) == []


def test_a_label_that_no_case_has(case):
    assert findings(case("a"), labels=LABELS | {3: "aorta"}) == [("", "doubt", "no case has label 3 (aorta)")]


def test_without_names_no_label_is_unexpected(case):
    assert findings(case("a", seg=with_value(label(), 3)), labels={}) == []


def test_labels_without_names_get_some_and_may_have_gaps(case):
    """Or else a list is approved that training refuses."""
    a = case("a", seg=with_value(label().astype(np.int8), -1))
    dataset = Dataset("d", a.label.parent, (case("b", seg=label() * 2, annotated=(2, 4, 6)), a))
    report = check_dataset(dataset)
    assert report.dataset.labels == {0: "background"} | {n: f"label_{n}" for n in (1, 2, 4, 6)}
    assert ("doubt", "no label is 3, 5: to train, number them 0 to 4") in [(f.grade, f.text) for f in report.findings]
    assert check_dataset(replace(dataset, objects=True)).dataset.labels == {0: "background", 1: "object"}


def test_names_that_label_maps_have_come_first(case):
    a, b = case("a"), case("b", seg=with_value(label(), 4))
    for c, name in ((a, "liver"), (b, "Leber")):
        write_label_map(read_volume(c.label), c.label, {1: name, 2: "spleen", 3: "aorta", 4: "vein"})
    for quick in (True, False):
        report = check_dataset(Dataset("d", a.label.parent, (a, b)), quick=quick)
        assert report.dataset.labels == dict(enumerate(("background", "liver", "spleen", "aorta", "vein")))
        assert [(f.case, f.grade, f.text) for f in report.findings] == [
            ("b", "doubt", "b_seg.nii.gz: calls label 1 Leber, a label map before it liver"),
            *[("", "doubt", "no case has label 3 (aorta)")] * (not quick),
        ]
    a.label.with_name("a_seg.labels.json").write_text("{")
    plain = replace(a, label=case("p", suffix=".mha").label)
    a.label.with_name("p_seg.labels.json").write_text("{")
    ((name, grade, text),) = findings(plain, labels={})
    assert (name, grade) == ("a", "doubt") and "p_seg.labels.json: " in text


def test_folds_are_dealt_with_those_that_there_are_left_aside(case):
    a, b = case("a", patient="p", fold=0), case("b", patient="p", split="validation", fold=1)
    dataset = Dataset("d", a.label.parent, (a, b, case("c"), case("t", patient="p", split="test")), LABELS)
    (leak,) = check_dataset(replace(dataset, cases=dataset.cases[:3])).findings
    assert leak.grade == "fault" and "patient p" in leak.text
    report = check_dataset(replace(dataset, cases=dataset.cases[:3]), folds=2)
    assert report.findings == () and len({c.fold for c in report.dataset.cases[:2]}) == 1
    assert [f.grade for f in check_dataset(dataset, folds=2).findings] == ["fault"]


def test_folds_that_cannot_be_are_told_before_anything_is_read(case):
    with pytest.raises(ValueError, match="there can be no folds"):
        check_dataset(Dataset("d", case("a").label.parent, (case("a"),)), told=lambda case: pytest.fail(), folds=2)


def test_missing_and_damaged_files(case, tmp_path):
    a, b, c = (case(name) for name in "abc")
    a.label.unlink()
    b.images[0].write_bytes(b.images[0].read_bytes()[:200])
    found = findings(a, b, replace(c, label=None), replace(c, name="t", split="test", label=None, images=b.images))
    assert [(name, grade) for name, grade, _ in found[:4]] == [
        *[("a", "fault"), ("b", "fault"), ("c", "doubt"), ("t", "fault")]
    ]
    assert "a_seg.nii.gz does not exist" in found[0][2] and "b.nii.gz is cut off" in found[1][2]
    assert "has no label: it is not trained on" in found[2][2]


def test_a_patient_in_two_splits_or_folds(case):
    a, b, c = case("a", patient="p"), case("b", patient="p", split="test"), case("c")
    assert findings(a, b, c) == [("", "fault", "patient p is in several splits: test (b); train (a)")]
    a, b = case("a", patient="p", fold=0), case("b", patient="p", fold=1)
    ((_, grade, text),) = findings(a, b, c, quick=True)
    assert grade == "fault" and "train, fold 0 (a); train, fold 1 (b)" in text


def test_a_scan_without_a_label_leaks_nothing(case):
    """It gets no fold, and is not trained on."""
    a, b = case("a", patient="p", fold=0), replace(case("b", patient="p"), label=None)
    assert findings(a, b) == [("b", "doubt", "has no label: it is not trained on")]
    ((_, grade, text),) = findings(a, replace(b, split="test"))
    assert grade == "fault" and "test (b); train, fold 0 (a)" in text


def test_the_same_image_twice(case):
    a, b = case("a", ct=image()), case("b", ct=image())
    assert findings(a, b) == [("", "doubt", "a, b have the same image")]  # other files, the same bytes
    assert findings(a, replace(b, split="test")) == [("", "fault", "a, b have the same image")]
    assert findings(a, b, quick=True) == []
    assert findings(a, replace(b, images=a.images), quick=True) == [("", "doubt", "a, b have the same image")]


@pytest.mark.parametrize(("ends", "same"), [(("a.nii.gz", "b.nii"), True), (("a.mhd", "b.mhd"), False)])
def test_images_are_the_same_by_their_voxels(ends, same, case, tmp_path):
    """Not by the bytes of a file, which compression changes, and of which a header alone has no voxels."""
    cases = [case("a"), case("b")]
    for n, (c, name) in enumerate(zip(cases, ends, strict=True)):
        file = tmp_path / "other" / name.replace(".mhd", f"{n}/ct.mhd")
        file.parent.mkdir(parents=True, exist_ok=True)
        array = image(seed=0 if same else n)
        sitk.WriteImage(sitk.GetImageFromArray(array.T), str(file)) if name.endswith("mhd") else write_volume(
            Volume(array if n else array.astype(np.float64), AFFINE), file
        )
        cases[n] = replace(c, images=(file,))
    assert (("", "doubt", "a, b have the same image") in findings(*cases)) == same


def test_one_label_map_of_two_images(case):
    a, b = case("a"), case("b")
    for quick in (True, False):
        assert findings(a, replace(b, label=a.label), quick=quick) == [
            ("", "doubt", "a, b have the same label map, a_seg.nii.gz, and different images")
        ]


def test_a_number_that_is_no_label_was_looked_for(case):
    a = case("a", annotated=(1, 2, 7))
    text = "7 in contoured is no label of the data set (0 to 2)"
    assert findings(a) == findings(a, quick=True) == [("a", "fault", text)]


def test_notes_of_a_file_are_told(case):
    """Such as that left and right cannot be trusted."""
    a = case("a")
    file = nib.load(a.images[0])
    file.set_qform(shifted(50), 1)
    nib.save(file, a.images[0])
    ((name, grade, text),) = findings(a)
    assert (name, grade) == ("a", "doubt") and text.startswith("a.nii.gz: sform and qform place voxels up to 50.0 mm")


def test_hashes(case, tmp_path):
    a, b, c = (case(name) for name in "abc")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (*a.files, *b.files)}
    entries = [
        {"image": f"{n}.nii.gz", "label": f"{n}_seg.nii.gz", "image_sha256": sums[f"{n}.nii.gz"]}
        | {"label_sha256": sums[f"{n}_seg.nii.gz"]}
        for n in "ab"
    ]
    manifest = {"name": "m", "cases": entries}

    def found(*cases, quick=False):
        dataset = Dataset("d", tmp_path, cases, LABELS)
        return [(f.case, f.grade, f.text) for f in check_dataset(dataset, manifest, quick).findings]

    assert found(a, b) == found(a, b, quick=True) == []
    assert found(a, b, c) == [("c", "doubt", f"{file}: not in the manifest") for file in ("c.nii.gz", "c_seg.nii.gz")]
    assert found(a) == [("", "doubt", "the manifest has more files: b.nii.gz, b_seg.nii.gz")]
    write_volume(Volume(label(), AFFINE, {}), b.label.with_suffix(".nii"))
    b.label.write_bytes(b.label.with_suffix(".nii").read_bytes())
    assert found(a, b, quick=True) == [("b", "fault", "b_seg.nii.gz: its sha256 differs from the manifest's")]


def test_a_file_that_cannot_be_read_does_not_stop_the_check(case, monkeypatch):
    a = case("a")
    manifest = {"name": "m", "cases": [{"image": "a.nii.gz", "image_sha256": "0", "label": "a_seg.nii.gz"}]}

    def fails(path):
        raise PermissionError(13, "permission denied", str(path))

    monkeypatch.setattr(known_files, "file_sha256", fails)
    assert check_dataset(Dataset("d", a.label.parent, (a,), LABELS), manifest).findings == ()


def test_files_of_one_name_in_several_folders_are_told_apart(case, tmp_path):
    a, b = case("a"), case("b", ct=image() + 1)
    cases = []
    for patient, made in (("p", a), ("q", b)):
        (tmp_path / "moved" / patient).mkdir(parents=True)
        for file, name in zip(made.files, ("ct", "seg"), strict=True):
            file.rename(tmp_path / "moved" / patient / f"{name}.nii.gz")
        image_file, label_file = (tmp_path / "moved" / patient / f"{name}.nii.gz" for name in ("ct", "seg"))
        cases.append(replace(made, images=(image_file,), label=label_file))
    sums = {file: hashlib.sha256(file.read_bytes()).hexdigest() for made in cases for file in made.files}
    entries = [
        {"image": f"{patient}/ct.nii.gz", "image_sha256": sums[made.images[0]], "label": f"{patient}/seg.nii.gz"}
        for patient, made in zip("pq", cases, strict=True)
    ]
    dataset = Dataset("d", tmp_path, tuple(cases), LABELS)
    assert check_dataset(dataset, {"name": "m", "cases": entries}).findings == ()
    entries[0]["image_sha256"], entries[1]["image_sha256"] = entries[1]["image_sha256"], entries[0]["image_sha256"]
    found = check_dataset(dataset, {"name": "m", "cases": entries}).findings
    assert [(f.case, f.grade) for f in found] == [("a", "fault"), ("b", "fault")]


def test_pictures(tmp_path):
    def picture(name, rows=8, **more):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (8, 9), np.uint8)
        numbers = np.zeros((rows, 9), np.uint16)
        numbers[1, 1:4], numbers[3, 2:5] = 1, 700
        files = [tmp_path / f"{name}.png", tmp_path / f"{name}_labels.png"]
        write_image(files[0], pixels)
        write_label_image(files[1], numbers)
        return Case(name, (files[0],), files[1], name, **more)

    cell = {0: "background", 1: "cell"}
    good, small = picture("good"), picture("small", rows=7)
    assert findings(good, labels=cell, objects=True) == []
    assert findings(good, labels=cell)[0][2] == "good_labels.png: 700 is no label of the data set (0 to 1)"
    assert findings(small, labels=cell, objects=True) == [
        ("small", "fault", "small_labels.png: its size is 7 x 9, the image's 8 x 9")
    ]


def test_the_headneck_scans_are_without_fault(shared):
    from medseg3d.data.manifest import manifest_dataset

    dataset = manifest_dataset("openkbp_headneck", shared("data"))
    few = replace(dataset, cases=dataset.cases[::20])
    report = check_dataset(few)
    assert report.findings == ()
    assert report.present == {case.name: set(case.annotated) for case in few.cases}


def test_notes_of_the_reader_are_told(case):
    dataset = Dataset("d", case("a").images[0].parent, (case("a"),), LABELS, notes=("a label without image",))
    assert json.dumps([f.__dict__ for f in check_dataset(dataset).findings]) == (
        '[{"case": "", "grade": "doubt", "text": "a label without image"}]'
    )


def test_a_channel_that_is_missing(case):
    a, b, c = (case(name) for name in "abc")
    second = {x.name: (*x.images, case(f"{x.name}_2").images[0]) for x in (a, b)}
    found = findings(replace(a, images=second["a"]), replace(b, images=second["b"]), c)
    assert ("c", "fault", "files of the image, one a channel: 1 (c.nii.gz); most cases have 2") in found
    assert not [finding for finding in found if finding[0] in ("a", "b")]
    text = "files of the image, one a channel: 1 (c.nii.gz); the data set has the channels CT, PET"
    assert findings(c, channels=("CT", "PET"), quick=True) == [("c", "fault", text)]


def test_a_number_that_no_label_has(case):
    labels = {0: "background", 1: "liver", 2: "spleen", 4: "stomach"}
    assert ("", "doubt", "no label is 3: to train, number them 0 to 3") in findings(case("a"), labels=labels)
