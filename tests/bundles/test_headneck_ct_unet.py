"""MONAI's own commands on the bundle headneck_ct_unet, and that they do what medseg3d does."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism

import medseg3d as ms
from medseg3d.metrics import evaluate_case
from medseg3d.networks.unet import UNet
from medseg3d.resources import resource_folder
from medseg3d.training.run import train_bundle

NAME = "headneck_ct_unet"
BUNDLE = resource_folder("bundles") / NAME
CONFIGS = BUNDLE / "configs"
WEIGHTS = BUNDLE / "models" / "model.pt"
TRAIN, INFERENCE, EVALUATE, MULTI_GPU = (
    str(CONFIGS / f"{name}.json") for name in ("train", "inference", "evaluate", "multi_gpu_train")
)
# A network and windows small enough to train in a second.
TINY = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "val_interval": 1,
    "patch_size": [16, 16, 16],
    "network_def::channels": [8, 8, 8],
}


@pytest.fixture(autouse=True)
def leave_no_seed():
    yield
    set_determinism(None)


def run(config_file, **overrides):
    """``python -m monai.bundle run`` in this process; an error here is an exit code of 1 there."""
    monai.bundle.run(
        config_file=config_file,
        logging_file=False,
        bundle_root=str(BUNDLE),
        **{"device": "$torch.device('cpu')", **overrides},
    )


def command(*arguments, cwd, timeout=300):
    # With another number of threads sums are rounded otherwise, and a voxel at a border may change sides.
    environment = os.environ | {"PYTHONPATH": str(BUNDLE.parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def parsed(config_file, *names):
    parser = ConfigParser()
    parser.read_config(config_file)
    parser["bundle_root"] = str(BUNDLE)
    return [parser.get_parsed_content(name) for name in names]


# Inference


def test_inference_from_any_folder_equals_predict(neck, tmp_path):
    done = command(
        *("monai.bundle", "run", "--config_file", INFERENCE, "--bundle_root", BUNDLE),
        *("--dataset_dir", neck / "ct", "--output_dir", tmp_path / "out", "--device", "$torch.device('cpu')"),
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    written = nib.load(tmp_path / "out" / "neck_seg.nii.gz")
    source = nib.load(neck / "ct" / "neck.nii.gz")
    expected = ms.load_model(NAME, device="cpu").predict(neck / "ct" / "neck.nii.gz").segmentation.array
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), expected)
    assert np.allclose(written.affine, source.affine, atol=1e-5)
    assert len(np.unique(expected)) > 3  # otherwise two empty maps would have been compared


@pytest.mark.parametrize(
    ("configs", "overrides"),
    [
        (INFERENCE, {}),
        ([TRAIN, EVALUATE], {}),
        (TRAIN, {}),
        (TRAIN, {"load_pretrain": True}),
    ],
)
def test_wrong_dataset_folder_is_an_error(configs, overrides, tmp_path):
    with pytest.raises(RuntimeError) as error:
        run(configs, dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"), **overrides)
    assert str(tmp_path) in cause(error.value, FileNotFoundError)


@pytest.mark.parametrize("configs", [INFERENCE, [TRAIN, EVALUATE], TRAIN])
def test_missing_weights_are_an_error(configs, phantoms, tmp_path):
    overrides = phantoms.overrides | {"output_dir": str(tmp_path / "out"), "ckpt_path": str(tmp_path / "none.pt")}
    if configs == TRAIN:
        overrides |= {"load_pretrain": True, "cache_memory": 0.0}
    with pytest.raises(RuntimeError) as error:
        run(configs, **overrides)
    assert "none.pt" in cause(error.value, FileNotFoundError)
    assert not list(tmp_path.rglob("*.nii.gz")) and not list(tmp_path.rglob("*.csv"))


def cause(error, kind):
    """What the error of this kind says, of those that MONAI's RuntimeError comes from."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    assert error is not None, f"no {kind.__name__} among the causes"
    return str(error)


def test_an_error_is_an_exit_code(tmp_path):
    done = command(
        *("monai.bundle", "run", "--config_file", INFERENCE, "--bundle_root", BUNDLE, "--dataset_dir", tmp_path),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "no *.nii or *.nii.gz in" in done.stderr


def test_load_as_monai_loads_a_bundle(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load(NAME, bundle_dir=str(BUNDLE.parent), workflow_type="inference")
    assert isinstance(network, UNet)
    state = torch.load(WEIGHTS, weights_only=True)
    assert all(torch.equal(value.cpu(), state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("trace", [False, True])
def test_torchscript_export(trace, tmp_path):
    monai.bundle.ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(WEIGHTS),
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=INFERENCE,
        use_trace=trace,
        input_shape=[1, 1, 32, 32, 32] if trace else None,
    )
    (eager,) = parsed(INFERENCE, "network_def")
    eager.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    exported = torch.jit.load(tmp_path / "model.ts", map_location="cpu")
    x = torch.randn(1, 1, 32, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(x), eager.eval()(x), rtol=1e-4, atol=1e-4)


# One definition for training, evaluation and inference


def test_training_and_inference_see_the_same_image(neck):
    path = str(neck / "ct" / "neck.nii.gz")
    (inference,) = parsed(INFERENCE, "preprocessing")
    validation, training = parsed(TRAIN, "validate::preprocessing", "train::deterministic_transforms")
    expected = inference({"image": path})["image"]
    got = validation({"image": path, "label": str(neck / "neck_seg.nii.gz")})["image"]
    assert torch.equal(got.as_tensor(), expected.as_tensor()) and torch.equal(got.affine, expected.affine)
    own, trained = (step.grid for step in (*inference.transforms, *training) if hasattr(step, "grid"))
    assert vars(trained) == vars(own) | {"upsample": False}
    (windows,) = parsed(TRAIN, "train::random_transforms")
    assert tuple(windows[0].spacing) == own.spacing  # what is coarser comes onto the grid with the window
    scalers = [step.scaler for step in (*inference.transforms, *training) if hasattr(step, "scaler")]
    assert len(scalers) == 2 and vars(scalers[0]) == vars(scalers[1])


def test_training_and_inference_have_the_same_network_and_strategy():
    networks = [parsed(config, "network_def")[0] for config in (INFERENCE, TRAIN)]
    assert str(networks[0]) == str(networks[1])
    (inferer,) = parsed(INFERENCE, "inferer")
    (evaluation,) = parsed([TRAIN, EVALUATE], "validate::inferer")
    assert vars(inferer) == vars(evaluation)
    patch, padding = parsed(TRAIN, "patch_size", "scale_intensity::b_min")
    assert (inferer.roi_size, inferer.padding_value) == (patch, padding)


# Evaluation


def test_evaluation_measures_what_predict_gives(neck, tmp_path, write_manifest):
    label = nib.load(neck / "neck_seg.nii.gz")
    reference = np.asarray(label.dataobj).copy()
    reference[reference == 6] = 0  # as if nobody had contoured the larynx
    nib.save(nib.Nifti1Image(reference, label.affine), neck / "partial.nii.gz")
    case = ("p", "test", "ct/neck.nii.gz", "partial.nii.gz", [1, 2, 3, 4, 5, 7])
    data = write_manifest(neck / "manifest.json", [case])
    run([TRAIN, EVALUATE], output_dir=str(tmp_path / "eval"), **data.overrides)

    result = ms.load_model(NAME, device="cpu").predict(neck / "ct" / "neck.nii.gz")
    rows = evaluate_case(result.segmentation.array, reference, result.segmentation.spacing, result.labels)
    for file, key, tolerance in (("val_mean_dice", "dice", 1e-4), ("val_hd95_mm", "hd95_mm", 1e-2)):
        (got,) = table(tmp_path / "eval" / f"{file}_raw.csv")
        assert got["filename"].endswith("neck.nii.gz")
        for n, row in enumerate(rows):
            expected = np.nan if row[key] is None else row[key]
            assert float(got[f"class{n}"]) == pytest.approx(expected, abs=tolerance, nan_ok=True), row
        known = [row[key] for row in rows if row[key] is not None]
        assert float(got["mean"]) == pytest.approx(np.mean(known), abs=tolerance)
        assert {row["class"]: row["notnans"] for row in table(tmp_path / "eval" / f"{file}_summary.csv")}[
            "class5"
        ] == "0.0000"
    assert rows[2]["dice"] > 0.4 and rows[6]["dice"] > 0.4  # parotid and mandible were found at all
    assert (tmp_path / "eval" / "metrics.csv").read_text().startswith("val_mean_dice,")


@pytest.mark.parametrize(("split", "patients"), [("test", ("p2", "p5")), ("validation", ("p1", "p4"))])
def test_evaluation_takes_the_split_that_it_is_told(split, patients, phantoms):
    overrides = phantoms.overrides | ({} if split == "test" else {"split": split})
    parser = ConfigParser()
    parser.read_config([TRAIN, EVALUATE])
    parser.update(overrides)
    cases = parser.get_parsed_content("validate::dataset::data")
    assert [case["case"] for case in cases] == [f"{patient}_ct" for patient in patients]
    assert cases[1]["annotated"] == [1, 1, 1, 1, 1, 0, 0, 1]


# Training


def test_training_writes_checkpoints_and_resumes(phantoms, tmp_path):
    settings = phantoms.overrides | TINY | {"epochs": 2, "output_dir": str(tmp_path)}
    run(TRAIN, **settings, **{"train::trainer::max_epochs": 1})  # stopped half-way
    checkpoints = tmp_path / "checkpoints"
    first = torch.load(checkpoints / "last.pt", weights_only=True)
    assert (first["epoch"], first["iteration"]) == (1, 2)
    best = torch.load(checkpoints / "best.pt", weights_only=True)
    assert best.keys() == first["model"].keys()  # weights alone: what models/model.pt holds
    assert all(torch.equal(best[key], first["ema"]["weights"][key]) for key in best)
    assert any(not torch.equal(best[key], first["model"][key]) for key in best)

    run(TRAIN, **settings)
    second = torch.load(checkpoints / "last.pt", weights_only=True)
    assert (second["epoch"], second["iteration"]) == (2, 4)
    assert any(not torch.equal(second["model"][key], first["model"][key]) for key in best)
    with pytest.raises(RuntimeError) as error:
        run(TRAIN, **settings | {"epochs": 3})
    assert "it cannot go on; start a new run from its weights" in cause(error.value, ValueError)


def test_medseg3d_train_goes_on_where_monai_stopped(phantoms, tmp_path, monkeypatch):
    """``medseg3d train`` is the same train.json: it takes up a run that MONAI's command began."""
    settings = phantoms.overrides | TINY | {"epochs": 2}
    run(TRAIN, output_dir=str(tmp_path), **settings, **{"train::trainer::max_epochs": 1})
    small = ConfigWorkflow.__init__

    def with_tiny_settings(self, *arguments, **keywords):
        small(self, *arguments, **{**settings, **keywords})

    monkeypatch.setattr(ConfigWorkflow, "__init__", with_tiny_settings)
    best = train_bundle(BUNDLE, phantoms.folder, tmp_path, device="cpu", settings={"epochs": 2}, progress=False)
    assert best == tmp_path / "checkpoints" / "best.pt"
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 4


def test_training_can_start_from_the_shipped_weights(phantoms, tmp_path):
    still = {"epochs": 1, "iterations_per_epoch": 1, "batch_size": 1, "val_interval": 2, "learning_rate": 0.0}
    shipped = torch.load(WEIGHTS, weights_only=True)
    for load_pretrain in (True, False):
        folder = tmp_path / str(load_pretrain)
        run(TRAIN, output_dir=str(folder), load_pretrain=load_pretrain, **phantoms.overrides, **still)
        trained = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]
        assert all(torch.equal(trained[key], shipped[key]) for key in shipped) == load_pretrain


def test_training_on_the_real_data(shared, tmp_path):
    """The unchanged network and windows, two iterations on two cases, from the shipped weights and from scratch."""
    losses = {}
    for load_pretrain in (True, False):
        workflow = ConfigWorkflow(
            TRAIN,
            logging_file=False,
            bundle_root=str(BUNDLE),
            dataset_dir=str(shared("data")),
            output_dir=str(tmp_path / str(load_pretrain)),
            load_pretrain=load_pretrain,
            epochs=1,
            iterations_per_epoch=2,
            val_interval=2,
            device=torch.device("cpu"),
            **{"train::dataset::data": "$datalist(@manifest, @dataset_dir, 'train')[:2]"},
            **{"validate::dataset::data": "$datalist(@manifest, @dataset_dir, 'validation')[:1]"},
        )
        workflow.initialize()
        workflow.run()
        losses[load_pretrain] = float(workflow.parser.get_parsed_content("train::trainer").state.output["loss"])
    assert losses[True] < 0.7 * losses[False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu(phantoms, tmp_path):
    settings = phantoms.overrides | TINY | {"output_dir": str(tmp_path), "device": "$torch.device('cuda:0')"}
    run(TRAIN, **settings)
    best = tmp_path / "checkpoints" / "best.pt"
    run([TRAIN, EVALUATE], **settings, ckpt_path=str(best))
    assert len(table(tmp_path / "val_hd95_mm_raw.csv")) == 2


# Several processes


def torchrun(*overrides, cwd):
    return command(
        *("torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "monai.bundle", "run"),
        *("--config_file", f"['{TRAIN}','{MULTI_GPU}']", "--bundle_root", BUNDLE, *overrides),
        cwd=cwd,
    )


@pytest.mark.slow
def test_two_processes_train_one_network(phantoms, tmp_path):
    settings = phantoms.overrides | TINY | {"epochs": 2, "output_dir": str(tmp_path)}
    once = {"train::trainer::max_epochs": 1, "batch_size": 1}
    done = torchrun(
        *(part for key, value in (settings | once).items() for part in (f"--{key}", str(value))), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert last["epoch"] == 1 and not any(key.startswith("module.") for key in (*last["model"], *best))
    reports = (done.stdout + done.stderr).count("Key metric: val_mean_dice best value")
    assert reports == 1  # by the first process alone

    run(TRAIN, **settings)  # and one process goes on
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_two_processes_refuse_a_wrong_dataset_folder(tmp_path):
    done = torchrun("--dataset_dir", tmp_path, "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert done.returncode != 0
    assert "is not in the dataset folder" in done.stderr
