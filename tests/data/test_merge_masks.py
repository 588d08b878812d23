"""scripts/merge_masks.py: binary masks, a file an organ, to one label map a case."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import medseg3d as ms
from medseg3d.data.datasets import read_dataset
from medseg3d.io import write_volume

AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])
SHAPE = (6, 5, 4)


@pytest.fixture
def script(load_script):
    return load_script("merge_masks")


def write_mask(folder, name, rows, affine=AFFINE):
    mask = np.zeros(SHAPE, np.uint8)
    mask[rows] = 1
    (folder / "segmentations").mkdir(parents=True, exist_ok=True)
    write_volume(ms.Volume(mask, affine), folder / "segmentations" / f"{name}.nii.gz")


@pytest.fixture
def data(tmp_path):
    """Two cases; the masks of the first overlap in row 2, the second has no file of the spleen and an empty liver."""
    for name in ("s1", "s2"):
        write_mask(tmp_path / "in" / name, "liver", slice(0, 3 if name == "s1" else 0))
        image = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
        write_volume(ms.Volume(image, AFFINE), tmp_path / "in" / name / "ct.nii.gz")
    write_mask(tmp_path / "in" / "s1", "spleen", slice(2, 4))
    (tmp_path / "in" / "meta.csv").write_text("image_id;age;split\ns1;50;train\ns2;60;val\n")
    return tmp_path


def run(script, monkeypatch, data, *more):
    monkeypatch.setattr(sys, "argv", ["", str(data / "in"), "-o", str(data / "out"), *more])
    script.main()


def test_masks_become_a_label_map_that_says_what_was_looked_for(script, data, monkeypatch, capsys):
    run(script, monkeypatch, data)
    assert f"{5 * 4} voxels were of several organs" in capsys.readouterr().out
    dataset = read_dataset(data / "out" / "datalist.json")
    assert dataset.labels == {0: "background", 1: "liver", 2: "spleen"}
    first, second = dataset.cases
    assert (first.split, second.split) == ("train", "validation")
    assert (first.annotated, second.annotated) == ((1, 2), (1,))
    merged = ms.read_volume(first.label)
    assert merged.array[:, 0, 0].tolist() == [1, 1, 1, 2, 0, 0] and np.array_equal(merged.affine, AFFINE)
    assert not ms.read_volume(second.label).array.any()


def test_chosen_organs_are_numbered_in_their_order(script, data, monkeypatch):
    run(script, monkeypatch, data, "--organs", "spleen", "liver")
    first = read_dataset(data / "out" / "datalist.json").cases[0]
    assert ms.read_volume(first.label).array[:, 0, 0].tolist() == [2, 2, 1, 1, 0, 0]


def test_numbers_of_a_manifest(script, data, monkeypatch):
    run(script, monkeypatch, data, "--manifest", "totalsegmentator_v2")
    written = json.loads((data / "out" / "datalist.json").read_text())
    numbers = {name: int(number) for number, name in written["labels"].items()}
    assert len(numbers) == 118
    array = ms.read_volume(data / "out" / "labels" / "s1.nii.gz").array
    assert set(np.unique(array)) == {0, numbers["liver"], numbers["spleen"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--organs", "lever"], "no case has a mask of lever; there are liver, spleen"),
        (["--organs", "liver", "--manifest", "totalsegmentator_v2"], "leave --manifest out"),
    ],
)
def test_what_is_refused(script, data, monkeypatch, capsys, more, message):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, data, *more)
    assert message in capsys.readouterr().err


def test_a_mask_elsewhere_a_split_of_another_name_and_an_empty_folder_are_refused(script, data, monkeypatch, capsys):
    write_mask(data / "in" / "s2", "spleen", slice(0, 1), affine=np.diag([1.5, 1.5, 3.0, 1.0]))
    with pytest.raises(SystemExit):
        run(script, monkeypatch, data)
    assert "spleen.nii.gz does not lie on the grid of" in capsys.readouterr().err
    (data / "in" / "meta.csv").write_text("image_id;split\ns1;holdout\n")
    with pytest.raises(ValueError, match="a split is one of train, val, test, got holdout"):
        script.splits_of(data / "in" / "meta.csv")
    with pytest.raises(ValueError, match="there is no case"):
        script.labels_of([])
