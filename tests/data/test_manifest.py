"""Manifests: splits by patient, the schema, checksums, and errors that help."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import jsonschema
import pytest

from medseg3d.data.datasets import SPLITS
from medseg3d.data.folds import make_folds
from medseg3d.data.manifest import checksums, datalist, dataset_of, load_manifest, manifest_dataset, shipped_manifests
from medseg3d.io.digest import file_sha256

FOLDER = Path(__file__).resolve().parents[2] / "data_manifests"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "schema")
HELD = [name for name in SHIPPED if "cases" in json.loads((FOLDER / f"{name}.json").read_text())]
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
    assert shipped_manifests() == SHIPPED
    assert HELD == ["dsb2018_nuclei", "openkbp_headneck"]
    described = {"amos22", "brats2021", "btcv_abdomen", "coco_panoptic", "kits23", "nih_pancreas_ct", "pascal_voc2012"}
    described |= {"promise12", "totalsegmentator_v1", "totalsegmentator_v2"}
    decathlon = [name for name in SHIPPED if name.startswith("msd_task")]
    assert described <= {*SHIPPED} - {*HELD} and [int(name[8:10]) for name in decathlon] == list(range(1, 11))


@pytest.mark.parametrize("name", HELD)
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
    assert all(set(case["contoured"]) <= organs for case in manifest.get("cases", ()))
    assert ("hu_window" in manifest) == manifest["modality"].startswith("CT")
    window = manifest.get("hu_window", {"low": 0, "high": 1})
    assert window["low"] < window["high"]


@pytest.mark.parametrize("name", HELD)
def test_folds_hold_each_patient_once_and_are_even(name):
    dealt = [case for case in load_manifest(name)["cases"] if case["split"] != "test"]
    fold_of = {case["patient"]: case["fold"] for case in dealt}
    assert all(fold_of[case["patient"]] == case["fold"] for case in dealt)
    sizes = Counter(case["fold"] for case in dealt)
    assert set(sizes) == set(range(5)) and max(sizes.values()) - min(sizes.values()) <= 1


def test_folds_of_the_headneck_manifest_are_those_that_check_makes():
    dataset = manifest_dataset("openkbp_headneck", "folder")
    made = make_folds(dataset, 5, 0, {case.name: case.annotated for case in dataset.cases})
    assert [case.fold for case in made.cases] == [case.fold for case in dataset.cases]
    for organ in (5, 6):  # those that many patients lack
        counts = Counter(case.fold for case in made.cases if case.fold is not None and organ in case.annotated)
        assert max(counts.values()) - min(counts.values()) <= 2


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
        lambda m: m["cases"][0].update(fold=-1),
        lambda m: m["cases"][2].update(fold=0),  # for the test
        lambda m: m["source"].pop("repository"),
        lambda m: m["source"].update(url="somewhere"),
        lambda m: m.update(hu_window={"low": -100, "high": 100}),
        lambda m: m.update(label_kind="masks"),
        lambda m: m["labels"].update({"0": "spleen"}),
        lambda m: m["cases"].append(copy.deepcopy(m["cases"][0])),
    ],
)
def test_the_schema_refuses(change):
    manifest = small_manifest()
    change(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_the_schema_takes_a_description_without_cases():
    manifest = small_manifest()
    del manifest["cases"]
    manifest |= {"source": {"url": "https://example.org", "access": "registration"}, "ignore_label": 255}
    manifest |= {"hu_window": {"low": -175, "high": 250, "source": "somebody"}}
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


@pytest.mark.parametrize(
    "ask", [lambda: datalist("amos22", "folder", "train"), lambda: checksums(load_manifest("amos22"))]
)
def test_a_manifest_without_cases_says_what_to_do(ask):
    with pytest.raises(ValueError, match=r"amos22 describes a data set and lists no cases; get the images from https.*"
                       r"medseg3d check DIR -o datalist\.json"):  # fmt: skip
        ask()


def test_the_files_are_those_of_the_manifest(shared):
    expected = checksums(load_manifest("openkbp_headneck"))
    assert {file: file_sha256(shared("data") / file) for file in expected} == expected


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


def test_cases_of_one_file_name_have_names_of_their_own(saved, tmp_path):
    manifest = small_manifest()
    for case in manifest["cases"]:
        case["image"] = f"{case['patient']}/1.2.840.ct.nii.gz"
    names = [case.name for case in manifest_dataset(saved(manifest), tmp_path).cases]
    assert names == ["p0_1.2.840.ct", "p1_1.2.840.ct", "p2_1.2.840.ct"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "https://example.org"}, "'source' is an object, as schema.json says, got 'https"),
        ({"cases": None}, "'cases' is a list, .* got None"),
        ({"cases": [1]}, r"case 0 \(the first is 0\) is no object, but 1"),
        ({"labels": ["liver"]}, "'labels' is an object"),
    ],
)
def test_a_damaged_manifest_is_told(saved, change, words):
    with pytest.raises(ValueError, match=rf"small\.json: .*{words}"):
        load_manifest(saved(small_manifest() | change))


def test_a_file_that_is_not_json_is_told(tmp_path):
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(ValueError, match=r"m\.json is not JSON"):
        load_manifest(tmp_path / "m.json")


def test_a_folder_of_its_name_does_not_hide_a_manifest(tmp_path, monkeypatch):
    (tmp_path / "openkbp_headneck").mkdir()
    monkeypatch.chdir(tmp_path)
    assert dataset_of("openkbp_headneck", tmp_path).name == "openkbp_headneck"


def test_a_datalist_with_a_source_is_a_datalist(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"source": "a clinic", "training": [{"image": "a.nii.gz"}]}))
    assert [case.name for case in dataset_of(tmp_path / "list.json", tmp_path).cases] == ["a"]


@pytest.mark.parametrize("key", ["image", "patient", "split"])
def test_a_case_that_lacks_what_it_must_have_is_refused(saved, key):
    manifest = small_manifest()
    del manifest["cases"][1][key]
    with pytest.raises(ValueError, match=rf"small\.json: case 1 .* has no {key}"):
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


def test_where_a_manifest_does_not_say_what_was_contoured_all_was(dataset):
    manifest = small_manifest()
    del manifest["cases"][1]["contoured"]
    assert datalist(manifest, dataset, "validation", complete=True)[0]["annotated"] == [1, 1, 1]


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


def test_a_fold_takes_the_place_of_the_validation_split(saved, dataset):
    manifest = small_manifest()
    for case, fold in zip(manifest["cases"][:2], (0, 1), strict=True):
        case["fold"] = fold
    path = saved(manifest)
    names = lambda split, fold=None: [case["case"] for case in datalist(path, dataset, split, fold=fold)]  # noqa: E731
    assert (names("train"), names("validation"), names("test")) == (["p0"], ["p1"], ["p2"])
    assert (names("train", 0), names("validation", 0), names("test", 0)) == (["p1"], ["p0"], ["p2"])
    with pytest.raises(ValueError, match=r"small has no fold 2; it has \[0, 1\]"):
        names("train", 2)


def test_a_datalist_of_ones_own_takes_the_place_of_a_manifest(dataset):
    entries = [{"image": f"ct/p{n}.nii.gz", "label": f"oar/p{n}.nii.gz", "fold": n} for n in range(2)]
    document = {"labels": {"0": "background", "1": "liver"}, "training": entries, "test": ["ct/p2.nii.gz"]}
    path = dataset / "own.json"
    path.write_text(json.dumps(document))
    (case,) = datalist(path, dataset, "validation")  # fold 0
    assert case == {
        "image": str(dataset / "ct" / "p0.nii.gz"),
        "label": str(dataset / "oar" / "p0.nii.gz"),
        "case": "p0",
        "annotated": [1, 1],
    }
    assert [case["case"] for case in datalist(str(path), dataset, "train")] == ["p1"]
    assert [case["case"] for case in datalist(path, dataset, "train", fold=1)] == ["p0"]
    with pytest.raises(ValueError, match="no case in split 'test' with the labels"):
        datalist(path, dataset, "test")
    path.write_text(json.dumps(document | {"training": [entries[0] | {"fold": None}]}))
    with pytest.raises(ValueError, match="medseg3d check --make-folds 5"):
        datalist(path, dataset, "validation")
    path.write_text(json.dumps({"training": entries}))
    with pytest.raises(ValueError, match="own does not name its labels"):
        datalist(path, dataset, "train")


def test_a_datalist_refuses_labels_that_leave_a_number_out(dataset):
    """Flags of classes and the channels of a network go by number."""
    path = dataset / "gap.json"
    entry = {"image": "ct/p0.nii.gz", "label": "oar/p0.nii.gz"}
    path.write_text(json.dumps({"labels": {"1": "liver", "3": "spleen"}, "training": [entry]}))
    with pytest.raises(ValueError, match=r"gap has the labels 0, 1, 3; .* they must be 0 to 2"):
        datalist(path, dataset, "train")
