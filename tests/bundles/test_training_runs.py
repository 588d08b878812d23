"""Whole runs of the shipped train.json: killed and resumed, in two processes, with what it logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from medseg3d.resources import resource_folder
from medseg3d.training.curves import read_curves

BUNDLE = resource_folder("bundles") / "headneck_ct_unet"
TRAIN, MULTI_GPU = (str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train"))
TINY = {
    "epochs": 4,
    "iterations_per_epoch": 3,
    "val_interval": 2,
    "patch_size": [16, 16, 16],
    "network_def::channels": [8, 8, 8],
    "device": "cpu",
}
# A process that trains and is killed, without a chance to clean up, in the last step of the third epoch.
KILLED = """
import json, os, signal, sys
from monai.bundle import ConfigWorkflow
workflow = ConfigWorkflow(sys.argv[1], workflow_type="train", logging_file=False, **json.loads(sys.argv[2]))
workflow.initialize()
trainer = workflow.parser.get_parsed_content("train::trainer")
step = trainer._process_function
def killed(engine, batch):
    if engine.state.iteration == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(engine, batch)
trainer._process_function = killed
workflow.run()
"""


@pytest.fixture(autouse=True)
def leave_no_seed():
    yield
    set_determinism(None)


def settings(data, folder, **more):
    return {"bundle_root": str(BUNDLE), "output_dir": str(folder), **data.overrides, **TINY, **more}


def train(configs, given):
    workflow = ConfigWorkflow(configs, workflow_type="train", logging_file=False, **given)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def process(*arguments):
    environment = os.environ | {"PYTHONPATH": str(BUNDLE.parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def same(a, b):
    """Whether two states are equal, tensor by tensor and number by number."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def figures(folder):
    rows = read_curves(folder / "checkpoints" / "curves.csv")
    return [[row[name] for name in ("epoch", "iteration", "learning_rate", "loss", "validation")] for row in rows]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(phantoms, tmp_path):
    import json

    train(TRAIN, settings(phantoms, tmp_path / "whole"))
    given = settings(phantoms, tmp_path / "killed")
    done = process("-c", KILLED, TRAIN, json.dumps(given))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert last(tmp_path / "killed")["epoch"] == 2
    train(TRAIN, given)
    whole, resumed = figures(tmp_path / "whole"), figures(tmp_path / "killed")
    assert whole == resumed and [row[0] for row in whole] == [1, 2, 3, 4]
    assert len({row[3] for row in whole}) == 4  # the losses of an epoch are its own
    a, b = last(tmp_path / "whole"), last(tmp_path / "killed")
    for name in ("model", "optimizer", "lr_scheduler", "ema", "guard", "stop"):
        assert same(a[name], b[name]), name


# The same samples in the same order, without random transforms, in float32.
PLAIN = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "train::random_transforms": [
        {"_target_": "CenterSpatialCropd", "keys": ["image", "label"], "roi_size": "@patch_size"},
        {"_target_": "SelectItemsd", "keys": ["image", "label", "annotated"]},
        {"_target_": "EnsureTyped", "keys": "annotated", "track_meta": False},
    ],
    "train::iteration::iteration": "$SegmentationIteration('annotated', dtype=torch.float32)",
    "network_def::dropout": 0.0,  # which draws other numbers in two processes
    "clip": None,
}


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(phantoms, tmp_path):
    plain = {key: value for key, value in PLAIN.items() if value is not None}
    one = settings(phantoms, tmp_path / "one", **plain, **{"batch_size": 2, "train::dataloader::shuffle": False})
    train(TRAIN, one)
    two = settings(phantoms, tmp_path / "two", **plain, batch_size=1)
    two["train::dataloader::sampler::shuffle"] = False
    options = [part for key, value in two.items() for part in (f"--{key}", str(value))]
    done = process(
        *("-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "monai.bundle"),
        *("run", "--config_file", f"['{TRAIN}','{MULTI_GPU}']", *options),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = last(tmp_path / "one"), last(tmp_path / "two")
    assert a["iteration"] == b["iteration"] == 2
    for weights in (lambda state: state["model"], lambda state: state["ema"]["weights"]):
        for name, value in weights(a).items():
            torch.testing.assert_close(weights(b)[name], value, rtol=1e-3, atol=2e-5, msg=name)
    (loss_a,), (loss_b,) = (figures(tmp_path / name) for name in ("one", "two"))
    assert loss_a[3] == pytest.approx(loss_b[3], rel=1e-4)


def test_what_a_run_can_be_told(phantoms, tmp_path):
    """Patience, several parts of a batch and fewer cases, and what stands beside the checkpoints."""
    given = {"patience": 1, "epochs": 6, "val_interval": 1, "micro_batches": 2, "cases": 1, "learning_rate": 0.0}
    workflow = train(TRAIN, settings(phantoms, tmp_path, **given, batch_size=1))
    trainer = workflow.parser.get_parsed_content("train::trainer")
    assert trainer.state.epoch == 2  # the second was no better than the first
    assert len(workflow.parser.get_parsed_content("train::dataset").data) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        *("best.pt", "last.pt", "curves.csv", "curves.png")
    }
    assert [row[0] for row in figures(tmp_path)] == [1, 2]
