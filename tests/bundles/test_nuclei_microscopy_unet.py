"""MONAI's own commands on the bundle nuclei_microscopy_unet, that they do what medseg3d does, and how good it is."""

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
from medseg3d.io import read_label_image
from medseg3d.metrics import ObjectCounts
from medseg3d.resources import resource_folder
from medseg3d.tasks import Instances
from medseg3d.training import ObjectF1
from tests.command_line import names

NAME = "nuclei_microscopy_unet"
BUNDLE = resource_folder("bundles") / NAME
TRAIN, INFERENCE, EVALUATE = (BUNDLE / "configs" / f"{name}.json" for name in ("train", "inference", "evaluate"))
# A network and windows small enough to train in a second.
TINY = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "val_interval": 1,
    "patch_size": [32, 32],
    "crop_size": [40, 40],
    "network_def::channels": [8, 8, 8],
}


@pytest.fixture(autouse=True)
def leave_no_seed():
    yield
    set_determinism(None)


def run(*configs, **overrides):
    """``python -m monai.bundle run`` in this process; an error here is an exit code of 1 there."""
    monai.bundle.run(
        config_file=[str(config) for config in configs],
        logging_file=False,
        bundle_root=str(BUNDLE),
        **{"device": "$torch.device('cpu')", **overrides},
    )


def test_inference_equals_predict(shared, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("0e4c2e2780de_image.png", "1609b1b8480e_image.png"):
        shutil.copy(shared("data", "dsb2018-nuclei", name), tmp_path / "in")
    run(INFERENCE, dataset_dir=str(tmp_path / "in"), output_dir=str(tmp_path / "monai"))
    model = ms.load_model(NAME, device="cpu", precision="fp32")
    counts = [len(outcome.result.result) for outcome in model.predict_many(tmp_path / "in", tmp_path / "out")]
    assert len(names(tmp_path / "monai")) == 4 and min(counts) > 10
    for name in names(tmp_path / "monai"):
        assert (tmp_path / "monai" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_nuclei_held_back_from_training(shared):
    model = ms.load_model(NAME, device="cpu")
    counts = ObjectCounts()
    for case in datalist("dsb2018_nuclei", shared("data", "dsb2018-nuclei"), "test"):
        reference = Instances.from_label_map(read_label_image(case["label"]))
        counts += ObjectCounts.of(model.predict(case["image"]).result, reference, threshold=0.5)
    assert counts.f1 >= 0.80  # the card says 0.843


def test_train_then_evaluate(picture_phantoms, tmp_path):
    overrides = picture_phantoms.overrides | TINY | {"output_dir": str(tmp_path / "run")}
    run(TRAIN, **overrides)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    run(TRAIN, EVALUATE, **overrides | {"output_dir": str(tmp_path / "eval"), "ckpt_path": str(best)})
    with (tmp_path / "eval" / "val_object_f1_raw.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["filename"].rpartition("/")[2] for row in rows] == ["p2_image.png", "p5_image.png"]
    assert all(float(row["class0"]) + float(row["class2"]) >= 3 for row in rows)  # found and missed: all discs


def test_the_configs_agree():
    train, inference, evaluate = (json.loads(path.read_text()) for path in (TRAIN, INFERENCE, EVALUATE))
    assert train["network_def"] == inference["network_def"]
    assert evaluate["validate::inferer"] == inference["inferer"]
    assert evaluate["validate::postprocessing"] == inference["postprocessing"]["transforms"][0]


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(RuntimeError) as error:
        run(INFERENCE, dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert "no picture in" in str(error.value.__cause__ or error.value)


def test_object_f1_counts_over_all_cases():
    reference = np.zeros((1, 20, 30), np.int32)
    for number, column in enumerate((2, 12, 22), start=1):
        reference[0, 3:9, column : column + 6] = number
    half = np.where(reference == 3, 0, reference)
    half[0, 15:, :3] = 7
    metric = ObjectF1()
    metric([torch.from_numpy(half), torch.from_numpy(reference)], [torch.from_numpy(reference)] * 2)
    assert metric.get_buffer().tolist() == [[2, 1, 1], [3, 0, 0]]
    assert float(metric.aggregate()) == pytest.approx(2 * 5 / (2 * 5 + 1 + 1))
    with pytest.raises(ValueError, match="number their objects"):
        metric([torch.zeros(2, 4, 4)], [torch.zeros(1, 4, 4)])
