"""`medseg3d evaluate` and `medseg3d train`."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

import nibabel as nib
import numpy as np
import pytest

from medseg3d.io import write_label_image, write_label_map
from medseg3d.volume import Volume
from tests import tiny_bundles as tiny


def references(folder, name="ct", label=1, organ="bone"):
    array = np.zeros(tiny.SHAPE, np.uint8)
    array[tiny.bone()] = label
    return write_label_map(Volume(array, tiny.LPS), folder / f"{name}.nii.gz", {label: organ})


def test_evaluate_what_predict_wrote(predict, run, ct_file, tmp_path):
    """The folder holds previews, statistics and reports too; the names come with the segmentations."""
    predict(ct_file, tmp_path / "out", "-s", "-p", "-rp")
    references(tmp_path / "truth")
    code, out, err = run("evaluate", "-p", tmp_path / "out", "-r", tmp_path / "truth", "-o", tmp_path / "scores.csv")
    assert code == 0, err
    (row,) = (line.split() for line in out if line.startswith("bone"))
    assert float(row[3]) > 0.98
    assert out[-1] == str(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        (scores,) = csv.DictReader(file)
    assert scores["label"] == "bone" or scores["name"] == "bone"


def test_evaluate_takes_names_from_elsewhere(run, tmp_path, bundles):
    truth = references(tmp_path / "truth")
    nib.save(nib.Nifti1Image(np.asarray(nib.load(truth).dataobj), tiny.LPS), tmp_path / "plain.nii.gz")
    (tmp_path / "names.json").write_text('{"1": "femur"}')
    pair = ("-p", tmp_path / "plain.nii.gz", "-r", truth)
    code, out, err = run("evaluate", *pair)
    assert (code, out) == (2, []) and "--labels names.json or -m MODEL" in err[0]
    assert any(line.startswith("femur") for line in run("evaluate", *pair, "--labels", tmp_path / "names.json")[1])
    assert any(line.startswith("bone") for line in run("evaluate", *pair, "-m", bundles.threshold)[1])


def test_evaluate_refuses_other_organs_under_one_number(run, tmp_path, bundles):
    """Whether the names are those of a reference, of another prediction or of a model; one's own names go before."""
    for name, organ in (("a", "bone"), ("b", "spleen")):
        references(tmp_path / "out", name, organ=organ)
        references(tmp_path / "spleen", name, organ="spleen")
        references(tmp_path / "bone", name)
    out, spleen, bone = (("-p" if n == "out" else "-r", tmp_path / n) for n in ("out", "spleen", "bone"))
    code, lines, err = run("evaluate", *out, *spleen)
    assert (code, lines) == (1, []) and f"{spleen[1] / 'a.nii.gz'} calls label 1 spleen, but {out[1]}" in err[0]
    code, lines, err = run("evaluate", *out, *bone)
    assert code == 4 and lines[1].split()[:4] == ["bone", "1", "0", "1.000"]
    assert f"b: {out[1] / 'b.nii.gz'} calls label 1 spleen, but {out[1] / 'a.nii.gz'} calls it bone" in err[0]
    same = ("-p", spleen[1], *spleen)
    code, _, err = run("evaluate", *same, "-m", bundles.threshold)
    assert code == 1 and "calls label 1 spleen, but the model bone_ct_threshold calls it bone" in err[0]
    assert run("evaluate", *same)[0] == 0
    (tmp_path / "names.json").write_text('{"1": "organ"}')
    assert run("evaluate", *out, *spleen, "--labels", tmp_path / "names.json")[0] == 0


def test_evaluate_counts_what_a_manifest_says_was_contoured(run, tmp_path):
    """Nothing in the first case; in the second, of which it says nothing, all."""
    cases = [{"patient": name, "split": "test", "image": f"ct/{name}.nii.gz"} for name in ("a", "b")]
    cases[0]["contoured"] = []
    manifest = {"name": "small", "labels": {"0": "background", "1": "bone"}, "source": {}, "cases": cases}
    (tmp_path / "small.json").write_text(json.dumps(manifest))
    for name in ("a", "b"):
        references(tmp_path / "truth", name)
    files = ("-p", tmp_path / "truth", "-r", tmp_path / "truth", "-o", tmp_path / "scores.csv")
    assert run("evaluate", *files, "--manifest", tmp_path / "small.json")[0] == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        assert [row["dice"] for row in csv.DictReader(file)] == ["", "1"]
    manifest["cases"] = [{**cases[0], "image": "p/a.nii.gz"}, {**cases[0], "image": "q/a.nii.gz", "contoured": [1]}]
    (tmp_path / "small.json").write_text(json.dumps(manifest))
    code, _, err = run("evaluate", *files, "--manifest", tmp_path / "small.json")
    assert code == 1 and "several images called a.nii.gz" in err[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "nowhere", "-r", "truth"], "no such file or folder: nowhere"),
        (["-p", "truth", "-r", "nowhere"], "no such file or folder: nowhere"),
        (["-p", "truth", "-r", "truth", "--labels", "nowhere.json"], "nowhere.json"),
        (["-p", "truth", "-r", "truth", "-m", "lungs"], "unknown model 'lungs'"),
        (["-p", "truth", "-r", "truth", "--manifest", "nowhere"], "there is no manifest 'nowhere'"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    references(tmp_path / "truth")
    code, out, err = run("evaluate", *arguments)
    assert (code, out, len(err)) == (1, [], 1) and words in err[0] and "Errno" not in err[0]


@pytest.mark.parametrize("output", ["truth/ct.nii.gz", "truth/ct.labels.json", "new.png", "folder.csv"])
def test_evaluate_refuses_an_output_that_is_no_csv_before_it_measures(output, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medseg3d.report.evaluation.evaluate_folders", None)
    references(tmp_path / "truth")
    (tmp_path / "folder.csv").mkdir()
    before = {path: path.read_bytes() for path in (tmp_path / "truth").iterdir()}
    code, out, err = run("evaluate", "-p", "truth", "-r", "truth", "-o", output)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].endswith(f"the output {output} is to be a table: give the name of a file that ends in .csv")
    assert {path: path.read_bytes() for path in (tmp_path / "truth").iterdir()} == before


def test_evaluate_writes_no_csv_over_a_picture(run, tmp_path):
    picture = write_label_image(tmp_path / "a.png", np.eye(8, dtype=np.uint8))
    before = picture.read_bytes()
    code, out, err = run("evaluate", "-p", picture, "-r", picture, "-o", picture)
    assert (code, out) == (2, []) and "is to be a table" in err[0] and picture.read_bytes() == before
    assert run("evaluate", "-p", picture, "-r", picture, "-o", tmp_path / "objects.csv")[0] == 0


def test_train_prints_the_checkpoint_and_nothing_else(run, tmp_path, monkeypatch):
    from medseg3d.training import run as training

    calls = []

    def train_bundle(*arguments):
        calls.append(arguments)
        print("the log of MONAI")
        return tmp_path / "best.pt"

    monkeypatch.setattr(training, "train_bundle", train_bundle)
    code, out, err = run("train", "--dataset_dir", "data", "-o", "out", "--epochs", "3", "-d", "cpu", "-q")
    assert (code, out, err) == (0, [str(tmp_path / "best.pt")], ["the log of MONAI"])
    ((bundle, *rest),) = calls
    assert bundle.name == "headneck_ct_unet" and rest == ["data", "out", "cpu", {"epochs": 3}, False]


def test_train_passes_settings_on(run, tmp_path, monkeypatch):
    from medseg3d.training import run as training

    calls = []
    monkeypatch.setattr(training, "train_bundle", lambda *arguments: calls.append(arguments) or tmp_path / "best.pt")
    data = ("--data", "list.json", "--fold", "0")
    options = ("--patience", "7", "--max-hours", "0.5", "--tensorboard", "--mlflow", "http://host:5000")
    sets = ("--set", "batch_size=4", "patch_size=[32, 32, 32]", "--set", "network_def::norm=instance")
    code, _, err = run("train", "-o", "out", *data, *options, *sets)
    assert code == 0, err
    assert calls[0][1] is None  # the folder of the list
    assert calls[0][4] == {
        "manifest": "list.json",
        "fold": 0,
        "patience": 7,
        "max_hours": 0.5,
        "tensorboard": True,
        "mlflow": "http://host:5000",
        "batch_size": 4,
        "patch_size": [32, 32, 32],
        "network_def::norm": "instance",
    }
    monkeypatch.setenv("RANK", "1")  # of torchrun
    assert run("train", "--dataset-dir", "data", "-o", "out")[:2] == (0, [])


def test_train_says_what_is_wrong(run, bundles, tmp_path):
    code, out, err = run("train", "--dataset-dir", tmp_path / "nowhere", "-o", tmp_path)
    assert (code, out, len(err)) == (1, [], 1) and "nowhere does not exist" in err[0]
    code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "-m", bundles.zoo)
    assert code == 1 and "--trust" in err[0]
    code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "-m", bundles.zoo, "--trust")
    assert code == 1 and "has no configs/train.json" in err[0]
    code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "--set", "learning=2")
    assert code == 1 and "the train.json has no learning; it has" in err[-1] and "learning_rate" in err[-1]
    for setting in ("network_def::use_checkpoint=true", "loss::smooth=0.1"):  # arguments that train.json leaves alone
        code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "--set", setting)
        assert code == 1 and "is not in the dataset folder" in err[-1]
    for setting, flag in (("device=cuda:5", "-d"), ("output_dir=x", "-o"), ("dataset_dir=x", "--dataset-dir")):
        code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "--set", setting)
        assert code == 1 and f"what {flag} " in err[-1] and "give that in place of the setting" in err[-1]
    for setting, words in (
        ("network_def::depth=3", "the train.json has no network_def::depth"),
        ("epochs=many", "epochs is a whole number in the train.json, such as "),
        ("epochs=2.5", "got 2.5"),
        ("epochs=true", "got True"),
        ("ema_decay=high", "ema_decay is a number in the train.json"),
        ("load_pretrain=1", "load_pretrain is true or false in the train.json"),
        ("patch_size=64", "patch_size is a list in the train.json, such as [64, 64, 64]; got 64"),
    ):
        code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "--set", setting)
        assert code == 1 and words in err[-1]
    for extra in ("tensorboard", "mlflow"):
        if find_spec(extra) is None:
            value = ("--mlflow", "runs") if extra == "mlflow" else ("--tensorboard",)
            code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, *value)
            assert code == 1 and f"pip install medseg3d[{extra}]" in err[-1]
    code, out, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path / "out", "-q")
    assert (code, out) == (1, []) and "is not in the dataset folder" in err[-1]


def test_a_folder_without_label_maps_is_told(run, tmp_path):
    (tmp_path / "below").mkdir()
    code, out, err = run("evaluate", "-p", tmp_path, "-r", tmp_path)
    assert (code, out) == (2, []) and "there is no label map (.nii.gz, " in err[-1]
    assert err[-1].endswith("subfolders are not searched")


def test_evaluate_goes_on_after_a_case_that_fails(run, tmp_path):
    (tmp_path / "names.json").write_text('{"2": "femur"}')
    for name in ("a", "b"):
        references(tmp_path / "truth", name)
        references(tmp_path / "out", name)
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"no scan")
    folders = ("-p", tmp_path / "out", "-r", tmp_path / "truth", "--labels", tmp_path / "names.json")
    code, out, err = run("evaluate", *folders)
    assert code == 4 and err[0].startswith("error: a: ") and "is not a NIfTI file" in err[0]
    assert err[1] == "note: labels without a name do not count: 1" and any(line.startswith("femur") for line in out)


@pytest.mark.parametrize("option", ["--epochs", "--patience"])
@pytest.mark.parametrize("value", ["0", "-2", "ten", "1.5"])
def test_train_takes_whole_epochs(option, value, run, tmp_path):
    code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path / "out", f"{option}={value}")
    assert code == 2 and err[-1].endswith(f"{option}: it is a whole number of 1 or more, got '{value}'")
