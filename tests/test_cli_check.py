"""`medseg3d check` as a stranger meets it: what is printed and written, and with which exit code it ends."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medseg3d.data.datasets import read_dataset
from medseg3d.data.manifest import datalist
from medseg3d.io import write_volume
from medseg3d.volume import Volume


@pytest.fixture
def folder(tmp_path):
    """An nnU-Net folder of six scans of three patients; the labels 1 and 2 are in each."""
    folder = tmp_path / "Dataset001_Two"
    for n in range(6):
        ct = np.random.default_rng(n).normal(0, 100, (6, 6, 6)).astype(np.float32)
        label = np.zeros((6, 6, 6), np.uint8)
        label[:2], label[4] = 1, 2
        write_volume(Volume(ct, np.eye(4)), folder / "imagesTr" / f"p{n // 2}_{n}_0000.nii.gz")
        write_volume(Volume(label, np.eye(4)), folder / "labelsTr" / f"p{n // 2}_{n}.nii.gz")
    labels = {"background": 0, "left": 1, "right": 2}
    document = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def break_one(folder):
    label = np.full((6, 6, 6), 7, np.uint8)
    write_volume(Volume(label, np.eye(4)), folder / "labelsTr" / "p0_0.nii.gz")


def test_a_sound_data_set(run, folder):
    code, out, err = run("check", folder)
    assert (code, err) == (0, [])
    assert out == [
        "6 cases of 6 patients: 6 train",
        "size 6 x 6 x 6, spacing 1 x 1 x 1 mm",
        "axes RAS (6)",
        "label  name   cases  median",
        "1      left   6      0.072 ml",
        "2      right  6      0.036 ml",
        "0 faults, 0 doubts",
    ]


def test_faults_and_doubts(run, folder):
    break_one(folder)
    code, out, _ = run("check", folder)
    assert code == 4 and out[0].split() == ["case", "grade", "finding"]
    assert out[1].split(maxsplit=2) == ["p0_0", "fault", "p0_0.nii.gz: 7 is no label of the data set (0 to 2)"]
    assert out[-1] == "1 fault, 0 doubts"
    (folder / "labelsTr" / "p0_0.nii.gz").unlink()
    assert run("check", folder)[0] == 0
    code, out, _ = run("check", folder, "--strict")
    assert code == 3 and out[1].split(maxsplit=2) == ["p0_0", "doubt", "has no label: it is not trained on"]


def test_folds_are_made_by_patient_and_can_be_trained_on(run, folder, tmp_path):
    target = tmp_path / "list.json"
    code, out, _ = run("check", folder, "--patients", "^p\\d+", "--make-folds", "3", "--seed", "1", "-o", target)
    assert code == 0 and out[0] == "6 cases of 3 patients: 6 train; folds of 2, 2, 2" and out[-1] == str(target)
    assert out[3].split() == ["label", "name", "cases", "median", "fold", "0", "fold", "1", "fold", "2"]
    assert out[4].split() == ["1", "left", "6", "0.072", "ml", "2", "2", "2"]
    again = tmp_path / "again.json"
    run("check", folder, "--patients", "^p\\d+", "--make-folds", "3", "--seed", "1", "-o", again)
    assert target.read_text() == again.read_text()
    patients = {case.patient: case.fold for case in read_dataset(target).cases}
    assert sorted(patients) == ["p0", "p1", "p2"] and sorted(patients.values()) == [0, 1, 2]
    held_out = {case["case"][:2] for case in datalist(target, tmp_path, "validation", fold=1)}
    trained = {case["case"][:2] for case in datalist(target, tmp_path, "train", fold=1)}
    assert len(held_out) == 1 and held_out | trained == {"p0", "p1", "p2"} and not held_out & trained
    assert run("check", target, "--quick")[0] == 0


def test_csv_without_names_gets_some(run, folder, tmp_path):
    rows = [f"imagesTr/p0_{n}_0000.nii.gz,labelsTr/p0_{n}.nii.gz,p0" for n in (0, 1)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    code, out, _ = run("check", tmp_path / "list.csv", "--dataset-dir", folder, "-o", folder / "list.json")
    assert code == 0 and out[4].split()[:2] == ["1", "label_1"]
    assert read_dataset(folder / "list.json").labels == {0: "background", 1: "label_1", 2: "label_2"}
    names = tmp_path / "names.json"
    names.write_text('{"1": "a", "2": "b", "3": "c"}')
    options = ("--dataset-dir", folder, "--labels", names)
    code, out, _ = run("check", tmp_path / "list.csv", *options)
    assert code == 0 and "(data set)  doubt  no case has label 3 (c)" in out
    code, out, _ = run("check", tmp_path / "list.csv", "--dataset-dir", folder, "--labels", folder / "dataset.json")
    assert code == 0 and out[-1] == "0 faults, 0 doubts" and out[4].split()[:2] == ["1", "left"]


def test_json(run, folder):
    break_one(folder)
    code, out, _ = run("check", folder, "--json")
    document = json.loads("\n".join(out))
    assert code == 4 and document["cases"] == 6 and document["splits"] == {"train": 6}
    assert document["labels"]["2"] == {"name": "right", "cases": 5}
    text = "p0_0.nii.gz: 7 is no label of the data set (0 to 2)"
    assert document["findings"] == [{"case": "p0_0", "grade": "fault", "text": text}]


def test_objects(run, folder):
    break_one(folder)
    assert run("check", folder, "--objects")[0] == 0


def test_quick_looks_at_no_voxel(run, folder):
    break_one(folder)
    code, out, _ = run("check", folder, "--quick")
    assert code == 0 and out[-1] == "0 faults, 0 doubts" and not any("left" in line for line in out)
    code, out, _ = run("check", folder, "--quick", "--json")
    assert code == 0 and json.loads("\n".join(out))["labels"]["1"] == {"name": "left", "cases": None}


def test_files_of_a_manifest(run, shared):
    code, out, _ = run("check", shared("data", "dsb2018-nuclei"), "--manifest", "dsb2018_nuclei")
    assert code == 0 and out[0] == "28 cases of 28 patients: 16 train, 5 validation, 7 test; folds of 5, 4, 4, 4, 4"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: no such file or folder"),
        (["."], 1, "neither a dataset.json nor a folder imagesTr"),
        (["Dataset001_Two", "--make-folds", "3"], 2, "say with -o where the datalist with the folds goes"),
        (["Dataset001_Two", "--make-folds", "9", "-o", "x.json"], 1, "there can be 2 to 6 folds"),
        (["Dataset001_Two", "--manifest", "liver"], 1, "there is no manifest 'liver'"),
        (["Dataset001_Two", "--manifest", "amos22"], 1, "lists no cases"),
        (["Dataset001_Two", "--patients", "x"], 1, "finds no patient"),
        (["Dataset001_Two", "--dataset-dir", "nowhere"], 2, "the dataset folder nowhere does not exist"),
        (["Dataset001_Two", "--dataset-dir", "."], 2, "--dataset-dir is for the paths in a list; Dataset001_Two is"),
        (
            ["Dataset001_Two", "-o", "x.nii.gz"],
            2,
            "x.nii.gz is to be a datalist: give the name of a file that ends in .json",
        ),
        (
            ["Dataset001_Two", "--patients", "p", "--make-folds", "2", "-o", "x.json"],
            1,
            "there can be no folds, one patient each at least, got 2; Dataset001_Two has 1 patients",
        ),
    ],
)
def test_errors(arguments, code, message, run, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    got, out, err = run("check", *arguments)
    assert (got, out, len(err)) == (code, [], 1) and message in err[0]
    assert not (folder.parent / "x.json").exists()


@pytest.mark.parametrize("output", ["Dataset001_Two/dataset.json", "list.json", "names.json", "scan.json"])
def test_files_that_are_read_are_not_written_over(output, run, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    source = "Dataset001_Two" if output.startswith("Dataset") else "list.json"
    (folder.parent / "names.json").write_text('{"left": 1, "right": 2}')
    (folder / "labelsTr" / "p0_0.nii.gz").rename(folder.parent / "scan.json")
    entry = {"image": "Dataset001_Two/imagesTr/p0_0_0000.nii.gz", "label": "scan.json"}
    (folder.parent / "list.json").write_text(json.dumps({"training": [entry], "modality": "CT"}))
    before = (folder.parent / output).read_bytes()
    code, out, err = run("check", source, "--labels", "names.json", "-o", output)
    assert (code, out) == (2, []) and f"the output {output} is a file that is read: give another name" in err[0]
    assert (folder.parent / output).read_bytes() == before


@pytest.mark.parametrize("least", [-1000, 1])
def test_an_image_in_the_place_of_a_label_is_told_and_the_tables_end(least, run, tmp_path):
    """Every grey level is a label then: a CT has numbers below 0, an MR image none."""
    image = (np.arange(8 * 8 * 8).reshape(8, 8, 8) + least).astype(np.int16)
    write_volume(Volume(image, np.eye(4)), tmp_path / "image.nii.gz")
    write_volume(Volume((image > least + 99).astype(np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    (tmp_path / "list.csv").write_text("image,label\n" + "label.nii.gz,image.nii.gz\n" * 60)
    code, out, _ = run("check", tmp_path / "list.csv")
    assert code == (4 if least < 0 else 0) and "are image and label swapped?" in out[1]
    (end,) = (n for n, line in enumerate(out) if line == "")
    assert end == 52 and out[51].startswith("… and ") and out[51].endswith(" more; --json prints all")
    labels = [line for line in out[end:] if "label_" in line]
    assert len(labels) == (0 if least < 0 else 50) and len(out) < 120
    document = json.loads("\n".join(run("check", tmp_path / "list.csv", "--json")[1]))
    assert len(document["findings"]) >= 60 and len(document["labels"]) == (0 if least < 0 else 512)


def test_all_labels_that_have_a_name_are_shown(run, folder):
    document = json.loads((folder / "dataset.json").read_text())
    document["labels"] |= {f"vertebra {n}": n for n in range(3, 80)}
    (folder / "dataset.json").write_text(json.dumps(document))
    _, out, _ = run("check", folder)
    assert any("vertebra 79" in line for line in out[60:])


def test_columns_that_are_not_read_are_doubts(run, folder, tmp_path):
    """A patient under another name would leak between folds."""
    (tmp_path / "list.csv").write_text("image,label,subject\nimagesTr/p0_0_0000.nii.gz,labelsTr/p0_0.nii.gz,p0\n")
    code, out, _ = run("check", tmp_path / "list.csv", "--dataset-dir", folder, "--strict")
    assert code == 3 and "the column 'subject' is not read" in out[1]
    assert "1 case of 1 patient: 1 train" in out
