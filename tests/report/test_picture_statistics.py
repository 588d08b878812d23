"""Figures of objects and classes in pictures, against what is counted by hand, and the files they go to."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from medseg3d.report.picture_statistics import CLASS_COLUMNS, OBJECT_COLUMNS, picture_statistics
from medseg3d.tasks import Category, Instances, Panoptic, Segment, SemanticMap
from tests import tiny_pictures as tiny


def grey():
    """(6, 8): 10 times the row, plus the column."""
    rows, columns = np.indices((6, 8))
    return (10 * rows + columns).astype(np.uint8)


def bars():
    """(6, 8): object 1 is an L that touches the upper edge, object 2 a block that does not touch any."""
    numbers = np.zeros((6, 8), np.int32)
    numbers[0:3, 1], numbers[2, 2:4] = 1, 1
    numbers[2:5, 5:7] = 2
    return numbers


def test_objects_of_one_class():
    found = picture_statistics(Instances.from_label_map(bars(), categories={1: "cell"}), grey())
    (cells,) = found["classes"]
    assert cells == {"class": 1, "name": "cell", "pixels": 11, "share": 0.229167, "mean": 26.4545, "objects": 2}
    first, second = found["objects"]
    numbers = {"id": 1, "class": 1, "name": "cell", "score": None, "pixels": 5}
    place = {"centroid_row": 1.4, "centroid_column": 1.6, "touches_border": True}
    box = {"box_start_row": 0, "box_start_column": 1, "box_stop_row": 3, "box_stop_column": 4}
    assert first == {**numbers, **place, **box, "mean": (1 + 11 + 21 + 22 + 23) / 5}
    assert (second["centroid_row"], second["centroid_column"], second["touches_border"]) == (3, 5.5, False)
    assert (found["rows"], found["columns"]) == (6, 8)


def test_objects_that_overlap_keep_their_pixels_and_count_once_in_their_class():
    masks = np.zeros((3, 6, 8), bool)
    masks[0, 1:3, 1:5] = masks[1, 1:5, 3:5] = True
    detected = Instances.from_masks(
        masks, classes=[2, 2, 7], scores=[0.9, 0.25, 1], categories={2: "a", 5: "b", 7: "c"}
    )
    found = picture_statistics(detected, grey())
    assert [(one["id"], one["pixels"], one["score"]) for one in found["objects"]] == [
        (1, 8, 0.9),
        (2, 8, 0.25),
        (3, 0, 1),
    ]
    assert found["objects"][2]["centroid_row"] is None and found["objects"][2]["mean"] is None
    assert [(one["name"], one["pixels"], one["objects"]) for one in found["classes"]] == [
        *(("a", 12, 2), ("b", 0, 0), ("c", 0, 1)),
    ]


def test_segments_of_things_and_stuff_in_colours():
    ids = bars() * 10 + 1
    ids[:, 7] = 0
    segments = {1: Segment(3), 11: Segment(1, 0.5), 21: Segment(1), 40: Segment(1)}
    panoptic = Panoptic(ids, segments, {1: "cell", 3: Category("ground", is_thing=False)})
    image = np.stack([grey(), np.full((6, 8), 9, np.uint8), np.full((6, 8), 250, np.uint8)], axis=-1)
    found = picture_statistics(panoptic, image)
    assert [one["id"] for one in found["objects"]] == [1, 11, 21, 40]
    ground, cell, _, hidden = found["objects"]
    assert (ground["name"], ground["pixels"], ground["mean_blue"]) == ("ground", 42 - 11, 250)
    assert (cell["mean_red"], cell["mean_green"]) == (15.6, 9)
    assert cell["mean"] == pytest.approx((15.6 + 9 + 250) / 3, abs=1e-4)
    assert (hidden["pixels"], hidden["mean_red"], hidden["touches_border"]) == (0, None, None)
    assert {one["name"]: one["objects"] for one in found["classes"]} == {"cell": 3, "ground": None}


def test_classes_alone():
    classes = np.where(bars() > 0, bars() + 1, 0)
    classes[5, 7] = 255
    found = picture_statistics(SemanticMap(classes, {2: "left", 3: "right", 4: "none"}), grey().astype(np.uint16) * 257)
    assert "objects" not in found
    assert [(one["name"], one["pixels"]) for one in found["classes"]] == [("left", 5), ("right", 6), ("none", 0)]
    assert found["classes"][0]["mean"] == 15.6 * 257 and found["classes"][2]["mean"] is None


def test_nothing_at_all():
    found = picture_statistics(Instances((6, 8), [], categories={1: "cell"}), grey())
    assert found["objects"] == [] and found["classes"][0]["objects"] == 0
    with pytest.raises(ValueError, match=r"one shape, got \(6, 8\) and \(5, 8\)"):
        picture_statistics(Instances((5, 8), []), grey())


# By the command


@pytest.fixture(params=["semantic", "instances", "panoptic", "detector"])
def bundle(request, tmp_path):
    detector = request.param == "detector"
    kind = "instances" if detector else request.param
    return request.param, tiny.write_picture_bundle(tmp_path / f"cells_{request.param}", kind, detector)


def rows_of(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames, list(reader)


def test_the_command_writes_them(bundle, run, tmp_path):
    kind, model = bundle
    folder, out = tmp_path / "in", tmp_path / "out"
    tiny.write_picture(folder / "a.png")
    tiny.write_picture(folder / "b.png", np.stack([tiny.picture()] * 3, axis=-1))
    code, lines, _ = run("predict", "-i", folder, "-o", out, "-m", model, "--trust", "-d", "cpu", "-s")
    assert code == 0 and str(out / "a.stats.json") in lines
    columns, rows = rows_of(out / "statistics.csv")
    assert {row["case"] for row in rows} == {"a", "b"}
    if kind == "semantic":
        assert tuple(columns) == CLASS_COLUMNS
        assert [int(row["pixels"]) for row in rows] == [tiny.inside().sum()] * 2
    else:
        assert tuple(columns) == OBJECT_COLUMNS
        found = [int(row["pixels"]) for row in rows if row["case"] == "a" and row["name"] != "glass"]
        assert found == np.bincount(tiny.numbered().ravel())[1:].tolist()
        assert {row["score"] != "" for row in rows} == {kind == "detector"}
        assert {float(row["mean"]) for row in rows if row["name"] != "glass"} == {tiny.BRIGHT}
    assert {row["case"]: row["mean_blue"] != "" for row in rows} == {"a": False, "b": True}
    saved = json.loads((out / "a.stats.json").read_text())
    assert (saved["rows"], saved["columns"]) == tiny.SHAPE

    one = tmp_path / "one" / "cells.png"
    assert run("predict", "-i", folder / "a.png", "-o", one, "-m", model, "--trust", "-d", "cpu", "-s")[0] == 0
    assert rows_of(one.parent / "cells.stats.csv")[1] == [{**row, "case": "a"} for row in rows if row["case"] == "a"]


def test_a_run_that_goes_on_has_the_figures_of_all_pictures(run, tmp_path):
    model = tiny.write_picture_bundle(tmp_path / "cells", "instances")
    folder, out = tmp_path / "in", tmp_path / "out"
    arguments = ("predict", "-i", folder, "-o", out, "-m", model, "--trust", "-d", "cpu", "-s", "--resume")
    tiny.write_picture(folder / "a.png")
    assert run(*arguments)[0] == 0
    tiny.write_picture(folder / "b.png")
    assert run(*arguments)[0] == 0
    assert [row["case"] for row in rows_of(out / "statistics.csv")[1]] == ["a"] * 3 + ["b"] * 3
