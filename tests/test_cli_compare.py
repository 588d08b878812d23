"""`medseg3d compare` as a user types it."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from medseg3d.compare.worker import Worker
from medseg3d.io import write_label_map
from medseg3d.io.labels import LabelTable
from medseg3d.volume import Volume
from tests import tiny_bundles as tiny


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A datalist with two test cases and one to train on; models run in this process."""
    entries = []
    for name in ("one", "two", "three"):
        tiny.write_ct(tmp_path / f"{name}.nii.gz")
        write_label_map(
            Volume(tiny.bone().astype(np.uint8), tiny.LPS), tmp_path / f"{name}_seg.nii.gz", LabelTable({1: "bone"})
        )
        entries.append({"image": f"{name}.nii.gz", "label": f"{name}_seg.nii.gz", "patient": name})
    path = tmp_path / "datalist.json"
    labels = {"0": "background", "1": "bone"}
    path.write_text(json.dumps({"labels": labels, "training": entries[:1], "test": entries[1:]}))
    monkeypatch.setattr("medseg3d.compare.running.Worker", lambda *given: Worker(*given[:2], own_process=False))
    return path


@pytest.fixture
def compare(run, bundles, data, tmp_path):
    """compare(...) -> (exit code, stdout, stderr) with the threshold bundle."""
    out = tmp_path / "out"
    return partial(run, "compare", "-m", bundles.threshold, "--trust", "--data", data, "-o", out, "-d", "cpu")


def test_a_table_and_files(compare, tmp_path):
    code, out, err = compare()
    assert code == 0
    assert out[0].startswith("model") and out[1].startswith("bone_ct_threshold")
    files = [tmp_path / "out" / name for name in ("comparison.html", "comparison.md", "metrics.csv", "costs.csv")]
    assert out[2:6] == [str(file) for file in files] and all(file.is_file() for file in files)
    assert ",two," in files[2].read_text() and ",one," not in files[2].read_text(), "the test split"
    assert not any("error" in line for line in err)


def test_strategies_splits_and_limits(compare, tmp_path):
    code, out, _ = compare("--strategy", "sub-volumes", "downsampled", "--split", "test", "--limit", 1)
    assert code == 0
    assert [line.split("  ")[0] for line in out[1:3]] == [
        "bone_ct_threshold sub-volumes",
        "bone_ct_threshold downsampled",
    ]
    assert ",three," not in (tmp_path / "out" / "metrics.csv").read_text()


def test_trust_is_asked_for_once_a_bundle(run, bundles, data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("medseg3d.cli.comparing.asked_to_trust", lambda bundle: asked.append(bundle.name))
    strategies = ("--strategy", "sub-volumes", "downsampled")
    code, _, err = run("compare", "-m", bundles.threshold, *strategies, "--data", data, "-o", tmp_path / "out")
    assert (code, asked) == (1, ["bone_ct_threshold"]) and "--trust" in err[-1]


def test_what_fails_is_told(compare, tmp_path):
    (tmp_path / "two.nii.gz").write_bytes(b"no scan")
    code, _, err = compare()
    assert code == 4 and any("bone_ct_threshold on two: " in line for line in err)
    code, _, err = compare("--strategy", "slices")
    assert code == 1 and any("does not suit" in line for line in err)


def test_a_split_without_a_case_names_those_that_have_some(compare, data):
    entries = json.loads(data.read_text())["test"]
    folds = [{**entry, "fold": n} for n, entry in enumerate(entries)]
    data.write_text(json.dumps({"labels": {"1": "bone"}, "training": folds}))
    code, _, err = compare()
    assert code == 2
    assert err[-1].endswith("but 2 in train: say --split train or --split validation --fold N, N one of 0, 1")
    images = [{"image": entry["image"]} for entry in entries]
    data.write_text(json.dumps({"labels": {"1": "bone"}, "training": images}))
    assert "nor in another: list a label map for each case" in compare()[2][-1]


def test_wrong_usage(compare, run, bundles, data, tmp_path):
    code, _, err = compare("--dataset-dir", "nowhere")
    assert code == 2 and "the dataset folder nowhere does not exist" in err[-1]
    code, _, err = compare("--limit", 0)
    assert code == 2 and "--limit: it is a whole number of 1 or more, got '0'" in err[-1]
    code, _, err = compare("--split", "validation")
    assert code == 2
    assert err[-1].endswith(
        "has no case with a reference in the split 'validation', but 1 in train, 2 in test: say --split train or "
        "--split test"
    )
    code, _, err = run("compare", "-m", bundles.threshold, "--data", data, "-o", tmp_path / "out")
    assert code == 1 and "--trust" in err[-1]
    nameless = json.loads(data.read_text())
    del nameless["labels"]
    data.write_text(json.dumps(nameless))
    code, _, err = compare()
    assert code == 2 and "--labels" in err[-1]
    names = tmp_path / "names.json"
    names.write_text('{"1": "bone"}')
    assert compare("--labels", names, "--limit", 1)[0] == 0
