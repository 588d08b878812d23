"""Manifests: splits by patient, the schema, checksums, and errors that help."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import jsonschema
import pytest

from medseg3d.data.manifest import SPLITS, datalist, load_manifest, verify_files

FOLDER = Path(__file__).resolve().parents[2] / "data_manifests"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "schema")
SCHEMA = json.loads((FOLDER / "schema.json").read_text())


def small_manifest():
    """Three patients, one a split; the second lacks organ 2."""
    cases = [
        {
            "patient": f"p{n}",
            "split": split,
            "image": f"ct/p{n}.nii.gz",
            "label": f"oar/p{n}.nii.gz",
            "image_sha256": hashlib.sha256(f"image {n}".encode()).hexdigest(),
            "label_sha256": hashlib.sha256(f"label {n}".encode()).hexdigest(),
            "contoured": [1] if n == 1 else [1, 2],
        }
        for n, split in enumerate(SPLITS)
    ]
    texts = dict.fromkeys(["description", "licence", "citation", "split", "label_quality"], "text")
    labels = {"0": "background", "1": "organ_1", "2": "organ_2"}
    source = {"repository": "owner/data"}
    return {"name": "small", "modality": "CT", "source": source, "labels": labels, "cases": cases, **texts}


@pytest.fixture
def saved(tmp_path):
    def save(manifest):
        path = tmp_path / "small.json"
        path.write_text(json.dumps(manifest))
        return path

    return save


@pytest.fixture
def dataset(tmp_path):
    for kind, folder in (("image", "ct"), ("label", "oar")):
        (tmp_path / folder).mkdir()
        for n in range(3):
            (tmp_path / folder / f"p{n}.nii.gz").write_text(f"{kind} {n}")
    return tmp_path


def test_something_ships():
    assert "openkbp_headneck" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_no_patient_and_no_file_is_in_two_splits(name):
    cases = json.loads((FOLDER / f"{name}.json").read_text())["cases"]
    for key in ("patient", "image", "label", "image_sha256", "label_sha256"):
        splits = defaultdict(set)
        for case in cases:
            splits[case[key]].add(case["split"])
        assert all(len(found) == 1 for found in splits.values()), key
    assert max(Counter(case["image_sha256"] for case in cases).values()) == 1
    assert {case["split"] for case in cases} == set(SPLITS)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_manifests_satisfy_the_schema(name):
    manifest = load_manifest(name)
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert manifest["name"] == name
    organs = {int(number) for number in manifest["labels"]} - {0}
    assert all(set(case["contoured"]) <= organs for case in manifest["cases"])


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(small_manifest())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("licence"),
        lambda m: m.update(licence=""),
        lambda m: m.update(images=["ct.nii.gz"]),
        lambda m: m["source"].update(commit="main"),
        lambda m: m["labels"].pop("0"),
        lambda m: m["labels"].update({"01": "organ"}),
        lambda m: m["cases"].clear(),
        lambda m: m["cases"][0].pop("image_sha256"),
        lambda m: m["cases"][0].update(label_sha256="ABC"),
        lambda m: m["cases"][0].update(split="training"),
        lambda m: m["cases"][0].update(image="/data/ct.nii.gz"),
        lambda m: m["cases"][0].update(image="../ct.nii.gz"),
        lambda m: m["cases"][0].update(contoured=[0, 1]),
        lambda m: m["cases"].append(copy.deepcopy(m["cases"][0])),
    ],
)
def test_the_schema_refuses(change):
    manifest = small_manifest()
    change(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_the_files_are_those_of_the_manifest(shared):
    assert verify_files("openkbp_headneck", shared("data")) == []


def test_verify_files_names_what_is_wrong(dataset):
    manifest = small_manifest()
    assert verify_files(manifest, dataset) == []
    (dataset / "ct" / "p1.nii.gz").write_text("another image")
    (dataset / "oar" / "p2.nii.gz").unlink()
    problems = ["ct/p1.nii.gz: its sha256 differs from the manifest's", "oar/p2.nii.gz: missing"]
    assert verify_files(manifest, dataset) == problems


def test_a_patient_in_two_splits_is_refused(saved):
    manifest = small_manifest()
    manifest["cases"][2]["patient"] = "p0"
    with pytest.raises(ValueError, match=r"small\.json: patient p0 is in two splits"):
        load_manifest(saved(manifest))


def test_two_scans_of_a_patient_in_one_split_are_not(saved):
    manifest = small_manifest()
    manifest["cases"][2] |= {"patient": "p0", "split": "train"}
    assert len(load_manifest(saved(manifest))["cases"]) == 3


def test_a_split_of_another_name_is_refused(saved):
    manifest = small_manifest()
    manifest["cases"][1]["split"] = "val"
    with pytest.raises(ValueError, match="a split is one of train, validation, test, got 'val'"):
        load_manifest(saved(manifest))


def test_an_unknown_name_lists_those_that_ship():
    with pytest.raises(FileNotFoundError, match=r"there is no manifest 'liver'; medseg3d ships .*openkbp_headneck"):
        load_manifest("liver")


def test_datalist_has_one_dictionary_a_case(saved, dataset):
    manifest = saved(small_manifest())
    (case,) = datalist(manifest, dataset, "validation")
    assert case == {
        "image": str(dataset / "ct" / "p1.nii.gz"),
        "label": str(dataset / "oar" / "p1.nii.gz"),
        "case": "p1",
        "annotated": [1, 1, 0],
    }
    assert datalist(small_manifest(), dataset, "train", complete=True)[0]["annotated"] == [1, 1, 1]


def test_datalist_refuses_a_split_without_cases(dataset):
    with pytest.raises(ValueError, match="small has no case in split 'val'; splits are train, validation, test"):
        datalist(small_manifest(), dataset, "val")
    with pytest.raises(ValueError, match="no case in split 'validation'"):
        datalist(small_manifest(), dataset, "validation", complete=True)


def test_datalist_names_a_missing_file(dataset):
    (dataset / "oar" / "p0.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"oar/p0\.nii\.gz is not in the dataset folder") as error:
        datalist(small_manifest(), dataset, "train")
    assert str(dataset) in str(error.value) and "owner/data" in str(error.value)
    assert datalist(small_manifest(), dataset, "test")  # other splits need only their own files
