import zipfile

import nibabel as nib
import numpy as np
import pytest

from medseg3d.io import NothingFound, find_inputs


@pytest.fixture
def place(tmp_path):
    """place("a/ct.nii.gz") -> that file under tmp_path: an image by its name, with just enough content."""

    def make(name, content=b"not opened"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return make


DICOM = bytes(128) + b"DICM" + bytes(40)


def names(found):
    return [(case.name, case.kind) for case in found.cases]


def reasons(found):
    return {path.name: reason for path, reason in found.skipped}


def test_one_file_of_each_kind(place, tmp_path):
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("deep/IM1", DICOM)
    files = [
        place("ct.nii.gz"),
        place("b.NII"),
        place("c.seg.nrrd"),
        place("d.mha"),
        place("e", DICOM),
        tmp_path / "scan.zip",
    ]
    found = find_inputs(files)
    assert names(found) == [
        ("ct", "nifti"),
        ("b", "nifti"),
        ("c", "itk"),
        ("d", "itk"),
        ("e", "dicom"),
        ("scan", "zip"),
    ]
    assert [case.path for case in found.cases] == files and found.skipped == ()


def test_a_folder_gives_its_images_sorted_and_says_what_it_skipped(place, tmp_path):
    for name in (
        "b.nii.gz",
        "a.nii",
        "a_seg.nii.gz",
        "seg.nrrd",
        "a.labels.json",
        "notes.txt",
        "x.hdr",
        "x.img",
        ".b.nii.gz",
    ):
        place(name)
    (tmp_path / "code.zip").write_bytes(b"")
    found = find_inputs(tmp_path)
    assert names(found) == [("a", "nifti"), ("b", "nifti"), ("x", "nifti")]
    skipped = reasons(found)
    assert set(skipped) == {"a_seg.nii.gz", "seg.nrrd", "a.labels.json", "notes.txt", "x.img", "code.zip"}
    assert "label map" in skipped["a_seg.nii.gz"] and "label map" in skipped["seg.nrrd"]
    assert "not a format" in skipped["notes.txt"] and ".hdr" in skipped["x.img"]


def test_a_label_map_given_by_name_is_a_case(place):
    assert names(find_inputs(place("a_seg.nii.gz"))) == [("a_seg", "nifti")]


def test_folders_of_dicom_folders(place, tmp_path):
    place("study/s1/IM1", DICOM)
    place("study/s1/IM2", DICOM)
    place("study/s1/readme.txt")
    place("study/deep/s2/1.2.840.IMA", DICOM)
    place("study/masks/liver.nii.gz")
    place("study/DICOMDIR", DICOM)
    found = find_inputs([tmp_path / "study"])
    assert names(found) == [("s2", "dicom"), ("s1", "dicom")]
    assert reasons(found) == {"masks": "image files in subfolders are not searched; give this folder or a pattern"}
    assert names(find_inputs(tmp_path / "study" / "s1")) == [("s1", "dicom")]


def test_patterns(place, tmp_path):
    for name in ("p1/ct.nii.gz", "p2/ct.nii.gz", "p2/other.txt"):
        place(name)
    assert names(find_inputs(str(tmp_path / "*" / "ct.nii.gz"))) == [("p1_ct", "nifti"), ("p2_ct", "nifti")]
    assert names(find_inputs(str(tmp_path / "**" / "*.gz"))) == [("p1_ct", "nifti"), ("p2_ct", "nifti")]


def test_a_file_with_brackets_in_its_name_is_no_pattern(place):
    assert names(find_inputs(str(place("ct[1].nii.gz")))) == [("ct[1]", "nifti")]


def test_equal_stems_are_told_apart(place):
    files = ("x/a/ct.nii.gz", "x/b/ct.nii.gz", "y/a/ct.nii.gz", "x/a/ct.nrrd", "other.nii.gz", "x/c/CT.nii")
    found = find_inputs([place(name) for name in files])
    got = [case.name for case in found.cases]
    assert got == ["ct_nii_gz", "b_ct", "a_ct", "ct_nrrd", "other", "c_CT"]
    deeper = find_inputs([place("x/a/ct.nii.gz"), place("y/a/ct.nii.gz")])
    assert [case.name for case in deeper.cases] == ["x_a_ct", "y_a_ct"]


def test_the_same_file_twice_is_one_case(place, tmp_path):
    path = place("ct.nii.gz")
    found = find_inputs([path, tmp_path / "." / "ct.nii.gz", tmp_path])
    assert names(found) == [("ct", "nifti")]
    assert [reason for _, reason in found.skipped] == ["given twice", "given twice"]


def test_a_link_keeps_its_name(place, tmp_path):
    place("store/SMITH_JOHN.nii.gz")
    links = tmp_path / "pseudonyms"
    links.mkdir()
    for name in ("case_1.nii.gz", "case_2.nii.gz"):
        (links / name).symlink_to(tmp_path / "store" / "SMITH_JOHN.nii.gz")
    found = find_inputs(links)
    assert names(found) == [("case_1", "nifti")]
    assert reasons(found) == {"case_2.nii.gz": "given twice"}


def test_what_is_missing_is_skipped_while_there_is_a_case(place, tmp_path):
    found = find_inputs([place("ct.nii.gz"), tmp_path / "absent.nii.gz"])
    assert len(found.cases) == 1 and reasons(found) == {"absent.nii.gz": "no such file or folder"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent", "no such file"), ("*.nii", "matches nothing"), (".", "holds no image file"), ("a.txt", "not a format")],
)
def test_nothing_found_says_why(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(NothingFound, match=reason):
        find_inputs(str(tmp_path / "folder" / name) if name != "a.txt" else tmp_path / name)


def test_nothing_given():
    with pytest.raises(ValueError, match="none given"):
        find_inputs([])


def test_many_reasons_are_cut_short(place, tmp_path):
    for number in range(9):
        place(f"{number}.txt")
    with pytest.raises(NothingFound, match=r"0\.txt.*4\.txt.*and 4 more\)$"):
        find_inputs(tmp_path)


def test_real_folders(shared):
    assert names(find_inputs(shared("data", "ge-head-tilt-dicom"))) == [("ge-head-tilt-dicom", "dicom")]
    found = find_inputs(shared("data", "totalsegmentator-example-dicom"))
    assert names(found) == [("ts_example_dicom_pred_total", "nifti"), ("dicom", "dicom")]


def test_cases_can_be_read(tmp_path):
    from medseg3d.io import read_volume

    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    assert read_volume(find_inputs(tmp_path).cases[0].path).shape == (4, 4, 4)
