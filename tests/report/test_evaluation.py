from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest

from medseg3d.io import write_label_map
from medseg3d.report.evaluation import evaluate_folders, summarise, summary_table, write_evaluation_csv
from medseg3d.report.pairing import case_name, pair_cases
from medseg3d.volume import Volume

LABELS = {1: "brainstem", 2: "larynx"}
AFFINE = np.diag([2.0, 1.0, 5.0, 1.0])


def label_map(*boxes):
    """Bars of the labels 1, 2, ..., each at its own height and as long as given, in zeros of (6, 6, 6)."""
    array = np.zeros((6, 6, 6), np.uint8)
    for label, length in enumerate(boxes, start=1):
        array[:length, :2, 2 * label] = label
    return array


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def folders(tmp_path):
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    save(predictions / "pt1_ct_seg.nii.gz", label_map(4, 5))
    save(references / "pt1_oar.nii.gz", label_map(5, 5))
    save(predictions / "pt2_ct_seg.nii.gz", label_map(5, 0))
    save(references / "pt2_oar.nii.gz", label_map(5, 5))
    return predictions, references


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("pt1.nii.gz", "pt1"),
        ("pt1_ct.nii.gz", "pt1"),
        ("pt1_ct_seg.nii.gz", "pt1"),
        ("pt1_OAR.nrrd", "pt1"),
        ("some/folder/spleen_10_trans.nii", "spleen_10"),
        ("liver_0_0000.nii.gz", "liver_0"),
        ("pt1-label.mha", "pt1"),
        ("pt1.seg.nrrd", "pt1"),
        ("pt1_ptv.nii.gz", "pt1_ptv"),
        ("seg.nii.gz", "seg"),
        ("oct_scan.nii.gz", "oct_scan"),
    ],
)
def test_case_of_a_file_name(name, case):
    assert case_name(name) == case


def test_folders_are_paired_by_case(folders):
    predictions, references = folders
    found = pair_cases(predictions, references)
    assert {case: (p.name, r.name) for case, (p, r) in found.pairs.items()} == {
        "pt1": ("pt1_ct_seg.nii.gz", "pt1_oar.nii.gz"),
        "pt2": ("pt2_ct_seg.nii.gz", "pt2_oar.nii.gz"),
    }
    assert list(found.unpaired) == []


def test_images_are_set_aside_and_files_left_over_are_reported(folders):
    predictions, references = folders
    save(references / "pt1_ct.nii.gz", label_map(1))
    save(references / "pt3_oar.nii.gz", label_map(1))
    save(predictions / "pt4_seg.nii.gz", label_map(1))
    (references / "notes.txt").write_text("not an image")
    found = pair_cases(predictions, references)
    assert found.pairs["pt1"][1].name == "pt1_oar.nii.gz"
    assert {path.name: reason for path, reason in found.unpaired} == {
        "pt4_seg.nii.gz": "no reference of this name",
        "pt3_oar.nii.gz": "no prediction of this name",
    }


def test_one_file_on_either_side_is_a_pair(tmp_path):
    prediction, reference = save(tmp_path / "seg.nii.gz", label_map(1)), save(tmp_path / "truth.nii", label_map(1))
    assert list(pair_cases(prediction, [reference]).pairs.values()) == [(prediction, reference)]


def test_pairing_refusals(folders, tmp_path):
    predictions, references = folders
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pair_cases(tmp_path / "nowhere", references)
    with pytest.raises(ValueError, match="no prediction has the name of a reference"):
        pair_cases(predictions, [save(tmp_path / f"{name}_oar.nii", label_map(1)) for name in "xy"])
    save(references / "pt1_label.nii.gz", label_map(1))
    with pytest.raises(ValueError, match=r"pt1_label.nii.gz and pt1_oar.nii.gz are all of the case pt1: move all but"):
        pair_cases(predictions / "pt1_ct_seg.nii.gz", references)


def test_a_case_of_several_label_maps_stops_no_other(folders):
    predictions, references = folders
    save(references / "pt1_label.nii.gz", label_map(1))
    found = pair_cases(predictions, references)
    assert list(found.pairs) == ["pt2"]
    assert [
        path.name for path, reason in found.unpaired if "pt1_label.nii.gz and pt1_oar.nii.gz are all" in reason
    ] == [
        "pt1_ct_seg.nii.gz",
        "pt1_label.nii.gz",
        "pt1_oar.nii.gz",
    ]


def test_of_several_label_maps_those_of_one_name_are_a_pair(folders):
    """Such as scans beside the reference, which are called as the case."""
    predictions, references = folders
    same = save(references / "pt1_ct_seg.nii.gz", label_map(1))
    found = pair_cases(predictions, references)
    assert found.pairs["pt1"] == (predictions / "pt1_ct_seg.nii.gz", same)
    assert [path.name for path, _ in found.unpaired] == ["pt1_oar.nii.gz"]


def test_a_number_that_tells_cases_apart_is_part_of_their_names(tmp_path):
    numbers = ("", "_0000", "_0001")
    predictions = [save(tmp_path / "p" / f"pt1{number}_seg.nii.gz", label_map(1)) for number in numbers]
    references = [save(tmp_path / "r" / f"pt1{number}.nii.gz", label_map(1)) for number in numbers]
    found = pair_cases(tmp_path / "p", tmp_path / "r")
    assert dict(found.pairs) == dict(
        zip(("pt1", "pt1_0000", "pt1_0001"), zip(predictions, references, strict=True), strict=True)
    )
    references[2].unlink()
    assert list(pair_cases(tmp_path / "p", tmp_path / "r").pairs) == ["pt1", "pt1_0000"]


def test_pairs_of_header_and_voxels_are_one_file(folders, tmp_path):
    predictions, references = folders
    for name in ("pt1", "pt2"):
        volume = nib.load(references / f"{name}_oar.nii.gz")
        (tmp_path / "pairs").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Pair(np.asarray(volume.dataobj), volume.affine), tmp_path / "pairs" / f"{name}.img")
    rows = evaluate_folders(predictions, tmp_path / "pairs", LABELS).rows
    assert rows == evaluate_folders(predictions, references, LABELS).rows


def test_rows_and_summary(folders, tmp_path):
    evaluation = evaluate_folders(*folders, LABELS)
    assert [(row["case"], row["name"]) for row in evaluation.rows] == [
        ("pt1", "brainstem"),
        ("pt1", "larynx"),
        ("pt2", "brainstem"),
        ("pt2", "larynx"),
    ]
    assert evaluation.rows[0]["dice"] == pytest.approx(16 / 18)
    assert evaluation.rows[0]["reference_ml"] == pytest.approx(0.1)
    brainstem, larynx = summarise(evaluation.rows)
    assert (brainstem["cases"], brainstem["missed"]) == (2, 0)
    assert brainstem["dice"] == pytest.approx((16 / 18 + 1) / 2)
    assert brainstem["dice_std"] == pytest.approx((1 - 16 / 18) / 2**0.5), "of the sample, by n - 1"
    assert brainstem["volume_error_percent"] == pytest.approx(-10)
    assert (larynx["cases"], larynx["missed"], larynx["dice"]) == (2, 1, 0.5)
    assert larynx["hd95_mm"] == 0, "of the one case in which it was predicted"

    lines = summary_table(evaluation.rows).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert " ".join(lines[2].split()) == "larynx 2 1 0.500 ± 0.707 0.500 ± 0.707 0.00 -50.0 ± 70.7"
    assert lines[-1].startswith("mean of labels")

    with write_evaluation_csv(tmp_path / "m.csv", evaluation.rows).open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert (cells[0]["case"], cells[0]["label"], cells[0]["dice"]) == ("pt1", "1", "0.888889")
    assert (cells[3]["hd95_mm"], cells[3]["note"]) == ("", "not predicted")


def test_one_case_has_no_deviation(folders):
    rows = evaluate_folders(folders[0] / "pt1_ct_seg.nii.gz", folders[1] / "pt1_oar.nii.gz", LABELS).rows
    (brainstem, _) = summarise(rows)
    assert brainstem["dice"] == pytest.approx(16 / 18) and brainstem["dice_std"] is None
    assert "0.889" in summary_table(rows) and "±" not in summary_table(rows)


def test_a_missing_contour_is_not_counted(folders):
    evaluation = evaluate_folders(*folders, LABELS, annotated={"pt2_ct": [1]})
    assert evaluation.rows[3]["dice"] is None
    larynx = summarise(evaluation.rows)[1]
    assert (larynx["cases"], larynx["missed"], larynx["dice"]) == (1, 0, 1)
    nowhere = evaluate_folders(*folders, {3: "thyroid"})
    assert "n/a" in summary_table(nowhere.rows)


def test_another_axis_order_and_floating_point_are_read(folders, tmp_path):
    """The reference flipped to LPS, the prediction as float32, as MONAI writes it."""
    prediction = save(tmp_path / "p.nii.gz", label_map(4, 5).astype(np.float32))
    affine = AFFINE.copy()
    affine[:2] *= -1
    affine[:2, 3] = (5 * 2.0, 5 * 1.0)
    reference = save(tmp_path / "r.nii.gz", label_map(5, 5)[::-1, ::-1], affine)
    rows = evaluate_folders(prediction, reference, LABELS).rows
    assert [row["dice"] for row in rows] == [pytest.approx(16 / 18), 1]


def test_refused_files(tmp_path):
    good = save(tmp_path / "good.nii.gz", label_map(4, 5))
    affine = AFFINE.copy()
    affine[0, 3] = 3.0
    away = save(tmp_path / "away.nii.gz", label_map(4, 5), affine)
    with pytest.raises(ValueError, match=r"good.nii.gz on .*from \(0, 0, 0\) mm.*away.nii.gz on .*from \(3, 0, 0\) mm"):
        evaluate_folders(good, away, LABELS)
    fractions = save(tmp_path / "fractions.nii.gz", label_map(4, 5).astype(np.float32) / 3)
    with pytest.raises(ValueError, match=r"fractions.nii.gz is no label map"):
        evaluate_folders(fractions, good, LABELS)


def test_labels_that_rounding_moved_are_labels(tmp_path):
    """As in training: 0.99999994 is 1."""
    reference = save(tmp_path / "r.nii.gz", label_map(4, 5))
    near = save(tmp_path / "p.nii.gz", label_map(4, 5) * np.float32(0.99999994))
    assert {row["dice"] for row in evaluate_folders(near, reference, LABELS).rows} <= {1.0, None}


def test_a_ct_is_no_reference(tmp_path):
    prediction = save(tmp_path / "p.nii.gz", label_map(4, 5))
    ct = save(tmp_path / "ct.nii.gz", label_map(4, 5).astype(np.int16) - 1000)
    with pytest.raises(ValueError, match=r"ct.nii.gz is no label map: it holds numbers below 0"):
        evaluate_folders(prediction, ct, LABELS)


def test_other_numbers_for_the_same_names_are_refused(tmp_path):
    volume = Volume(label_map(4, 5), AFFINE)
    prediction = write_label_map(volume, tmp_path / "p.nii.gz", LABELS)
    swapped = dict(zip(LABELS, reversed(LABELS.values()), strict=True))
    reference = write_label_map(volume, tmp_path / "r.seg.nrrd", swapped)
    with pytest.raises(ValueError, match=r"r.seg.nrrd calls .* label 1, but here it is 2: .* renumber one of them"):
        evaluate_folders(prediction, reference, LABELS)
    with pytest.raises(ValueError, match=r"r.seg.nrrd calls .* label 1"):
        evaluate_folders(reference, prediction, LABELS)


def test_other_names_for_the_same_numbers_are_refused_unless_the_names_are_the_callers(tmp_path):
    volume = Volume(label_map(4, 5), AFFINE)
    prediction = write_label_map(volume, tmp_path / "p.nii.gz", LABELS)
    reference = write_label_map(volume, tmp_path / "r.nii.gz", {1: "spleen", 2: "larynx"})
    assert [row["dice"] for row in evaluate_folders(prediction, reference, LABELS).rows] == [1, 1]
    said = r"r.nii.gz calls label 1 spleen, but .*p.nii.gz calls it brainstem: .* renumber .* --labels names.json"
    with pytest.raises(ValueError, match=said):
        evaluate_folders(prediction, reference, LABELS, named_by=prediction)
    same = write_label_map(volume, tmp_path / "s.nii.gz", {1: "Spinal cord", 2: "LARYNX", 3: "thyroid"})
    named = {1: "spinal_cord", 2: "larynx"}
    assert len(evaluate_folders(same, same, named, named_by="the model").rows) == 2


def test_a_case_that_fails_does_not_stop_the_others(folders):
    _, references = folders
    save(references / "pt1_oar.nii.gz", label_map(5, 5), AFFINE * 2)
    evaluation = evaluate_folders(*folders, LABELS)
    assert [row["case"] for row in evaluation.rows] == ["pt2", "pt2"]
    ((case, reason),) = evaluation.failures
    assert case == "pt1" and "both must lie on one grid" in reason
    save(references / "pt2_oar.nii.gz", label_map(5, 5), AFFINE * 2)
    with pytest.raises(ValueError, match="both must lie on one grid"):
        evaluate_folders(*folders, LABELS)


def test_labels_without_a_name_are_told(folders):
    assert evaluate_folders(*folders, LABELS).unnamed == []
    assert evaluate_folders(*folders, {2: "larynx"}).unnamed == [1]
