"""`medseg3d evaluate` on pictures: object by object, with scores where there are any."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from medseg3d.io import write_coco, write_label_image
from medseg3d.report.objects import evaluate_objects
from medseg3d.tasks import Instances


def squares(*places, side=6, shape=(30, 40)):
    numbers = np.zeros(shape, np.uint16)
    for number, (row, column) in enumerate(places, start=1):
        numbers[row : row + side, column : column + side] = number
    return numbers


@pytest.fixture
def folders(tmp_path):
    """Of a: two found, one missed, one false alarm. Of b: all found, of other numbers. And files that are no pair."""
    predictions, references = tmp_path / "out", tmp_path / "truth"
    truth = squares((2, 2), (12, 2), (20, 20))
    write_label_image(references / "a_labels.png", truth)
    write_label_image(references / "a_image.png", np.full((30, 40), 7))
    write_label_image(references / "b_labels.tif", truth)
    write_label_image(references / "c_labels.png", truth)
    write_label_image(predictions / "a_image_seg.png", squares((2, 3), (12, 2), (2, 30)))
    write_label_image(predictions / "b_seg.png", squares((20, 20), (2, 2), (12, 2)) * 90)
    write_label_image(predictions / "b.preview.png", truth)
    return predictions, references


def test_the_command(folders, run, tmp_path):
    predictions, references = folders
    code, out, err = run("evaluate", "-p", predictions, "-r", references, "-o", tmp_path / "objects.csv")
    assert code == 0 and [line for line in err if "c_labels.png" in line]
    assert out == [
        "pictures      2",
        "found         5",
        "false alarms  1",
        "missed        1",
        "precision     0.833",
        "recall        0.833",
        "F1            0.833  at an intersection over union of 0.5",
        str(tmp_path / "objects.csv"),
    ]
    with (tmp_path / "objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["found"], row["false_alarms"], row["missed"]) for row in rows] == [
        *(("a", "2", "1", "1"), ("b", "3", "0", "0")),
    ]


def test_scores_beside_a_label_image_rank_its_objects(folders):
    predictions, references = folders
    found = Instances.from_label_map(squares((2, 2), (12, 2), (2, 30)), scores=[0.9, 0.5, 0.7], classes=[2, 1, 2])
    write_coco(predictions / "a_image_seg.json", {"a.png": found})
    (predictions / "b_seg.png").unlink()
    result = evaluate_objects(predictions, references)
    # Hit, miss, hit of three objects: precision 1 up to a recall of 1/3, 2/3 up to 2/3; 34 and 33 of 101 points.
    assert result.precision.average_precision(0.5) == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert result.total.f1 == pytest.approx(2 / 3)


def test_what_is_refused(folders, run, tmp_path):
    predictions, references = folders
    code, _, err = run("evaluate", "-p", predictions, "-r", references, "-m", "headneck_ct_unet")
    assert code == 2 and "leave --labels, -m and --manifest out" in err[0]
    write_label_image(predictions / "b_seg.png", squares((2, 2), shape=(9, 9)))
    (predictions / "a_image_seg.labels.json").write_text("{}")
    with pytest.raises(ValueError, match="are classes, not objects"):  # the first of all
        evaluate_objects(predictions, references)
    with pytest.raises(ValueError, match="no prediction has the name"):
        evaluate_objects(predictions / "b_seg.png", [references / "a_labels.png", references / "c_labels.png"])


def test_a_picture_that_fails_does_not_stop_the_others(folders, run):
    predictions, references = folders
    write_label_image(predictions / "b_seg.png", squares((2, 2), shape=(9, 9)))
    result = evaluate_objects(predictions, references)
    ((case, reason),) = result.failures
    assert case == "b" and "(9, 9) pixels and " in reason and [row["case"] for row in result.rows] == ["a"]
    code, out, err = run("evaluate", "-p", predictions, "-r", references)
    assert code == 4 and out[0] == "pictures      1" and any(line.startswith("error: b: ") for line in err)


def test_pictures_without_objects(tmp_path):
    empty = write_label_image(tmp_path / "a_seg.png", squares())
    result = evaluate_objects(empty, write_label_image(tmp_path / "a_labels.png", squares()))
    assert result.rows[0]["f1"] is None and result.rows[0]["found"] == 0 and np.isnan(result.total.f1)
