"""scripts/complete_labels.py: what a model adds where nobody contoured."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import medseg3d as ms

AFFINE = np.diag([3.0, 3.0, 2.5, 1.0])
HEAD = {"name": "two", "labels": {"0": "background", "1": "liver", "2": "spleen"}}


@pytest.fixture
def script(load_script):
    return load_script("complete_labels")


class Model:
    """Finds the spleen, its own number 1, in the first three slices, and the liver, 5, in the last one."""

    def __init__(self) -> None:
        self.labels = {1: "spleen", 5: "liver"}

    def predict(self, image: ms.Volume) -> SimpleNamespace:
        array = np.zeros(image.shape, np.uint8)
        array[:3], array[-1] = 1, 5
        return SimpleNamespace(segmentation=image.with_array(array))


@pytest.fixture
def data(tmp_path):
    """Two cases to train on, of which one lacks the spleen, and one to test with, which lacks it too."""
    liver = np.zeros((6, 5, 4), np.uint8)
    liver[2:4] = 1
    sections = {"training": [], "testing": []}
    for section, name, contoured in (("training", "a", [1]), ("training", "b", [1, 2]), ("testing", "c", [1])):
        ms.write_label_map(ms.Volume(liver, AFFINE), tmp_path / f"{name}_label.nii.gz", {1: "liver", 2: "spleen"})
        ms.write_label_map(ms.Volume(liver, AFFINE), tmp_path / f"{name}.nii.gz", {1: "liver", 2: "spleen"})
        sections[section].append(
            {"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz", "case": name, "contoured": contoured}
        )
    (tmp_path / "list.json").write_text(json.dumps(HEAD | sections))
    return tmp_path


def test_only_what_nobody_contoured_is_added(script, data, monkeypatch, capsys):
    monkeypatch.setattr(ms, "load_model", lambda *_, **__: Model())
    monkeypatch.setattr(sys, "argv", ["", str(data / "list.json"), "-o", str(data / "new")])
    script.main()
    written = json.loads((data / "new" / "datalist.json").read_text())
    assert written["training"][0]["label"] == "labels/a.nii.gz" and "contoured" in written["training"][0]
    assert written["training"][0]["contoured"] == [1, 2]
    assert [entry["label"] for entry in (written["training"][1], written["testing"][0])] == [
        str(data / "b_label.nii.gz"),
        str(data / "c_label.nii.gz"),
    ]
    completed = ms.read_volume(data / "new" / "labels" / "a.nii.gz")
    assert completed.array[:, 0, 0].tolist() == [2, 2, 1, 1, 0, 0]  # the reference wins, its liver gets nothing added
    np.testing.assert_array_equal(completed.affine, AFFINE)
    assert "1 of 3 cases completed, 40 voxels added" in capsys.readouterr().out


def test_another_grid_is_refused(script, data, monkeypatch):
    moved = ms.Volume(np.zeros((6, 5, 4), np.uint8), AFFINE + np.eye(4, k=3) * 9)
    ms.write_label_map(moved, data / "a_label.nii.gz", {1: "liver"})
    monkeypatch.setattr(ms, "load_model", lambda *_, **__: Model())
    monkeypatch.setattr(sys, "argv", ["", str(data / "list.json"), "-o", str(data / "new")])
    with pytest.raises(ValueError, match=r"a_label.nii.gz does not lie on the grid of .*resample it first"):
        script.main()
    assert not (data / "new").exists()
