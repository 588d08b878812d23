"""MONAI's own commands on the bundle ct_swin_ssl, and that its weights start a Swin UNETR."""

from __future__ import annotations

import json
import re
import shlex

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

import medseg3d as ms
from medseg3d import cli
from medseg3d.checkpoints import load_checkpoint
from medseg3d.data.manifest import datalist
from medseg3d.networks import SSLHead, SwinUNETR
from medseg3d.resources import resource_folder
from tests.command_line import names

NAME = "ct_swin_ssl"
BUNDLE = resource_folder("bundles") / NAME
WEIGHTS = BUNDLE / "models" / "model.pt"
TRAIN, INFERENCE, EVALUATE = (BUNDLE / "configs" / f"{name}.json" for name in ("train", "inference", "evaluate"))
TINY = {"epochs": 1, "iterations_per_epoch": 1, "val_interval": 1, "batch_size": 2, "patch_size": [64, 64, 32]}


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


def arguments(config):
    return {key: value for key, value in json.loads(config.read_text())["network_def"].items() if key != "_target_"}


def test_its_weights_start_a_swin_unetr():
    arguments_of_both = {key: value for key, value in arguments(TRAIN).items() if key != "upsample"}
    network = SwinUNETR(out_channels=8, **arguments_of_both)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_checkpoint(network, WEIGHTS)
    after, trained = network.state_dict(), torch.load(WEIGHTS, weights_only=True)
    assert network.merging_order == "merging"  # the order that the file records, and no guess
    for key, value in after.items():
        assert torch.equal(value, trained[key] if key.startswith("swinViT.") else before[key]), key


def test_train_resume_then_evaluate(phantoms, tmp_path):
    overrides = phantoms.overrides | TINY | {"more_scans": [], "output_dir": str(tmp_path / "run")}
    run(TRAIN, **overrides)
    run(
        TRAIN, **overrides | {"epochs": 2, "train::trainer::max_epochs": 1}
    )  # as nothing is left to do, nothing is done
    checkpoints = tmp_path / "run" / "checkpoints"
    last = torch.load(checkpoints / "last.pt", weights_only=True)
    best = torch.load(checkpoints / "best.pt", weights_only=True)
    assert (last["epoch"], last["iteration"]) == (1, 1)
    SSLHead(**arguments(TRAIN)).load_state_dict(best, strict=True)
    output = {"output_dir": str(tmp_path / "eval"), "ckpt_path": str(checkpoints / "best.pt")}
    run(TRAIN, EVALUATE, **overrides | output)
    table = (tmp_path / "eval" / "metrics.csv").read_text()
    values = dict(line.replace(",", "\t").split("\t")[:2] for line in table.split() if line[0].isalpha())
    terms = ("rotation", "contrastive", "reconstruction")
    assert float(values["val_loss"]) == pytest.approx(sum(float(values[f"val_{name}"]) for name in terms), abs=2e-4)


def scans_of(**overrides):
    """(those to train on, those to validate with)"""
    parser = ConfigParser()
    parser.read_config(str(TRAIN))
    parser.update(overrides)
    return [parser.get_parsed_content(f"{part}::scans") for part in ("train", "validate")]


def test_scans_without_any_manifest_or_label(phantoms):
    """The last tenth, but a batch at least, is held back."""
    got = scans_of(dataset_dir=str(phantoms.folder), manifest=None, more_scans=["p?_ct.nii.gz"], batch_size=2)
    files = [str(phantoms.folder / f"p{n}_ct.nii.gz") for n in range(6)]
    assert got == [files[:4], files[4:]]


def test_nothing_that_is_tested_on_was_trained_on(shared):
    trained, validated = scans_of(dataset_dir=str(shared("data")))
    held = {split: datalist("openkbp_headneck", shared("data"), split) for split in ("validation", "test")}
    assert validated == [case["image"] for case in held["validation"]]
    assert len(set(trained)) == 104
    assert not set(trained) & {case["image"] for cases in held.values() for case in cases}


def test_inference_fills_what_was_cut_out(neck, tmp_path):
    """Closer to the scan than what the network got, where something was cut out of it."""
    scans = {"dataset_dir": str(neck / "ct")}
    run(INFERENCE, **scans, output_dir=str(tmp_path / "cut"))
    run(INFERENCE, **scans, output_dir=str(tmp_path / "whole"), share=0.0)
    assert names(tmp_path / "cut") == ["neck_cut.nii.gz", "neck_reconstruction.nii.gz"]
    cut, filled = (nib.load(tmp_path / "cut" / name) for name in names(tmp_path / "cut"))
    assert cut.shape == filled.shape and np.allclose(cut.affine, filled.affine)
    whole = nib.load(tmp_path / "whole" / "neck_cut.nii.gz").get_fdata()
    lost = np.abs(cut.get_fdata() - whole) > 2
    assert 0.25 < lost.mean() < 0.4
    errors = [np.abs(image.get_fdata() - whole)[lost].mean() for image in (cut, filled)]
    assert errors[1] < 0.6 * errors[0]


def test_the_page_on_pre_training_runs():
    page = (BUNDLE.parents[1] / "docs" / "pretraining.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    values: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/pretraining.md", "exec"), values)
    assert "126 tensors" in str(values["report"])
    assert all(loss.requires_grad for loss in values["losses"].values())
    parser = cli._parser()
    commands = re.findall(r"^medseg3d .+", page, flags=re.MULTILINE)
    given = [dict(parser.parse_args(shlex.split(command)[1:]).set) for command in commands]
    assert given == [
        {"encoder": "bundles/ct_swin_ssl/models/model.pt"},
        {"manifest": None, "more_scans": ["**/*.nii.gz"]},
    ]


def test_it_does_not_segment():
    with pytest.raises(ValueError, match="ct_swin_ssl does not segment"):
        ms.load_model(NAME, device="cpu")


def test_the_configs_agree():
    assert arguments(TRAIN) == arguments(INFERENCE)
    train, inference = (json.loads(path.read_text()) for path in (TRAIN, INFERENCE))
    assert train["deterministic_transforms"][:4] == inference["preprocessing"]["transforms"][:4]
    headneck = json.loads((BUNDLE.parent / "headneck_ct_swin_unetr" / "configs" / "inference.json").read_text())
    assert inference["preprocessing"]["transforms"][2:4] == headneck["preprocessing"]["transforms"][2:4]
