"""MONAI's own commands on the bundle nuclei_microscopy_maskrcnn, that they are medseg3d's, and how good it is."""

from __future__ import annotations

import csv
import json
import shutil

import monai.bundle
import numpy as np
import pytest
import torch
from monai.utils import set_determinism

import medseg3d as ms
from medseg3d.data.manifest import datalist
from medseg3d.io import read_coco, read_label_image, write_image
from medseg3d.networks.detection.transform import DetectionTransform
from medseg3d.resources import resource_folder
from tests.command_line import names

NAME = "nuclei_microscopy_maskrcnn"
BUNDLE = resource_folder("bundles") / NAME
TRAIN, INFERENCE, EVALUATE = (BUNDLE / "configs" / f"{name}.json" for name in ("train", "inference", "evaluate"))
# A network and windows small enough to train in a second.
TINY = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "val_interval": 1,
    "patch_size": [32, 32],
    "crop_size": [40, 40],
    "network_def::fpn_channels": 16,
    "network_def::box_features": 16,
    "network_def::mask_channels": 16,
    "network_def::box_detections_per_img": 10,
}


@pytest.fixture(autouse=True)
def leave_no_seed():
    yield
    set_determinism(None)


@pytest.fixture(scope="module")
def model():
    return ms.load_model(NAME, device="cpu")


def run(*configs, **overrides):
    """``python -m monai.bundle run`` in this process; an error here is an exit code of 1 there."""
    monai.bundle.run(
        config_file=[str(config) for config in configs],
        logging_file=False,
        bundle_root=str(BUNDLE),
        **{"device": "$torch.device('cpu')", **overrides},
    )


def test_inference_equals_predict(model, shared, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("03398329ced0_image.png", "10328b822b83_image.png"):
        shutil.copy(shared("data", "dsb2018-nuclei", name), tmp_path / "in")
    write_image(tmp_path / "in" / "black.png", np.zeros((40, 60), np.uint8))
    run(INFERENCE, dataset_dir=str(tmp_path / "in"), output_dir=str(tmp_path / "monai"))
    counts = [len(outcome.result.result) for outcome in model.predict_many(tmp_path / "in", tmp_path / "out")]
    assert counts[2] == 0 and min(counts[:2]) > 10
    assert len(names(tmp_path / "monai")) == 6
    for name in names(tmp_path / "monai"):
        assert (tmp_path / "monai" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_objects_have_masks_boxes_and_scores(model, shared, tmp_path):
    case = next(case for case in datalist("dsb2018_nuclei", shared("data", "dsb2018-nuclei"), "test"))
    found = model.predict(case["image"])
    objects = read_coco(found.save(tmp_path / "cells.json")).instances(1)
    assert objects.areas.min() >= 1 and (objects.scores > 0.5).all() and len(set(objects.scores)) > 5
    np.testing.assert_allclose(objects.boxes, found.result.boxes, atol=0.01)
    numbers = read_label_image(found.save(tmp_path / "cells.png"))
    np.testing.assert_array_equal(numbers, found.result.label_map())


@pytest.mark.slow
def test_nuclei_held_back_from_training(shared, tmp_path):
    run(TRAIN, EVALUATE, dataset_dir=str(shared("data", "dsb2018-nuclei")), output_dir=str(tmp_path))
    measured = dict(line.split(",") for line in (tmp_path / "metrics.csv").read_text().split())
    assert float(measured["val_ap50"]) >= 0.85  # the card says 0.864; 0.70 was the aim
    assert float(measured["val_object_f1"]) >= 0.84  # the card says 0.851


def test_train_then_evaluate(picture_phantoms, tmp_path):
    overrides = picture_phantoms.overrides | TINY | {"output_dir": str(tmp_path / "run")}
    run(TRAIN, **overrides)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    run(TRAIN, EVALUATE, **overrides | {"output_dir": str(tmp_path / "eval"), "ckpt_path": str(best)})
    with (tmp_path / "eval" / "val_object_f1_raw.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["filename"].rpartition("/")[2] for row in rows] == ["p2_image.png", "p5_image.png"]
    assert all(float(row["class0"]) + float(row["class2"]) == 3 for row in rows)  # found and missed: all discs
    assert (tmp_path / "eval" / "metrics.csv").read_text().startswith("val_ap50")


def test_the_configs_agree():
    train, inference, evaluate = (json.loads(path.read_text()) for path in (TRAIN, INFERENCE, EVALUATE))
    assert inference["network_def"] == train["network_def"] | {"box_score_thresh": 0.5}
    assert train["validate"]["inferer"] == inference["inferer"]
    surest = evaluate["validate::evaluator::additional_metrics"]["val_object_f1"]["metric_fn"]
    assert f"least_score={inference['network_def']['box_score_thresh']}" in surest


def test_a_factor_of_two_is_what_the_windows_were_trained_with():
    """The weights were trained with min_size=320 on windows of 160 x 160."""
    scale, side = (json.loads(TRAIN.read_text())[name] for name in ("network_def", "patch_size"))
    window = torch.rand(3, *side)
    ours, records, _ = DetectionTransform(scale=scale["scale"])([window])
    before, records_before, _ = DetectionTransform(min_size=320, max_size=2048)([window])
    assert torch.equal(ours, before) and records == records_before


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(RuntimeError) as error:
        run(INFERENCE, dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert "no picture in" in str(error.value.__cause__ or error.value)
