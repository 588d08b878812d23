"""Any MONAI segmentation bundle runs as MONAI runs it; what cannot run says why."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg3d.bundle import OwnModules, load_model
from medseg3d.catalogue import UntrustedBundle
from tests import tiny_bundles as tiny

ROOT = Path(__file__).resolve().parents[1]


def load(path, **options):
    return load_model(path, "cpu", trust=True, precision="fp32", **options)


def labels(model, scan):
    return model.predict(scan).segmentation.array


# Trust


def test_foreign_code_does_not_run_without_trust(tmp_path):
    ran = tmp_path / "ran"

    def edit(config):
        config["inferer"] = f"$open({str(ran)!r}, 'w') and None"

    folder = tiny.write_zoo_bundle(tmp_path / "bundle", edit=edit)
    with pytest.raises(UntrustedBundle, match=r"run as code on this machine.*--trust \(in Python: trust=True\)"):
        load_model(folder, "cpu")
    assert not ran.exists()
    load(folder)
    assert ran.exists()  # so that the test could have failed


def test_shipped_bundles_run_without_asking(shipped_model):
    assert shipped_model.name.startswith("headneck_ct_unet ") and shipped_model.notes == ()
    assert shipped_model.expects_hu and shipped_model.device == torch.device("cpu")
    assert not shipped_model.network.training
    assert len(shipped_model.record["weights_sha256"]) == 64


# The same as MONAI


def test_the_labels_are_those_of_monai_bundle_run(bundles, models, tmp_path):
    """A file that is oblique and stored as int16, through MONAI's own command and through predict."""
    turn = np.array([[-3.8, 0.6, 0.1], [-0.7, -3.9, 0.4], [0.2, 0.3, 4.2]])
    scan = tiny.write_ct(tmp_path / "in" / "scan.nii.gz", tiny.centred(turn))
    command = ["monai.bundle", "run", "--config_file", bundles.zoo / "configs" / "inference.json"]
    overrides = {"bundle_root": bundles.zoo, "dataset_dir": scan.parent, "output_dir": tmp_path / "out"}
    overrides["device"] = "$torch.device('cpu')"
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), *(f"--{key}={value}" for key, value in overrides.items())],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = nib.load(tmp_path / "out" / "scan" / "scan_trans.nii.gz")
    result = models.zoo.predict(scan).segmentation
    assert (np.bincount(result.array.ravel(), minlength=3) > 100).all()
    np.testing.assert_array_equal(result.array, np.asarray(written.dataobj))
    np.testing.assert_allclose(result.affine, written.affine, atol=1e-5)


@pytest.mark.parametrize("form", ["yaml", "zip", "zip with a folder", "wrapped weights", "weights of several GPUs"])
def test_other_forms_of_the_same_bundle(form, bundles, models, ct_file, tmp_path):
    state = tiny.unet_state()
    path = {
        "yaml": lambda: tiny.write_zoo_bundle(tmp_path / "b", suffix="yaml"),
        "zip": lambda: tiny.zipped(bundles.zoo, tmp_path / "b.zip"),
        "zip with a folder": lambda: tiny.zipped(bundles.zoo, tmp_path / "download.zip", "b"),
        "wrapped weights": lambda: tiny.write_zoo_bundle(tmp_path / "b", state={"state_dict": state}),
        "weights of several GPUs": lambda: tiny.write_zoo_bundle(
            tmp_path / "b", state={"model": {f"module.{key}": value for key, value in state.items()}}
        ),
    }[form]()
    model = load(path)
    assert model.name == "b 0.5.3"
    np.testing.assert_array_equal(labels(model, ct_file), labels(models.zoo, ct_file))


def test_names_of_older_bundles(models, ct_file, tmp_path):
    def edit(config):
        config["pre_transforms"], config["post_transforms"] = config.pop("preprocessing"), config.pop("postprocessing")
        config["pre_transforms"]["transforms"][:2] = [
            {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
        ]
        config["post_transforms"]["transforms"][1]["transform"] = "@pre_transforms"
        config["network"] = "@network_def"

    model = load(tiny.write_zoo_bundle(tmp_path / "b", edit=edit))
    np.testing.assert_array_equal(labels(model, ct_file), labels(models.zoo, ct_file))


LOADER = {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/best.pt'"}


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(handlers=[{**LOADER, "load_dict": {"model": "@network"}}]),
        lambda config: config.update(handlers=[{**LOADER, "load_dict": {"epoch": "@epoch", "ema": "@network"}}]),
        lambda config: config.update(checkpointloader={**LOADER, "load_dict": {"ema": "@network_def"}}, handlers=[]),
        lambda config: config.update(ckpt_path=LOADER["load_path"], handlers=[]),
        lambda config: config["handlers"][0].update(load_path="models/best.pt"),
    ],
)
def test_the_weights_are_those_that_the_config_loads(edit, models, ct_file, tmp_path):
    folder = tiny.write_zoo_bundle(tmp_path / "b", edit=edit, state=tiny.unet_state(3))
    entry = "ema" if "ema" in (folder / "configs" / "inference.json").read_text() else "model"
    saved = {"network": tiny.unet_state(3), entry: tiny.unet_state()} if entry == "ema" else tiny.unet_state()
    torch.save(saved, folder / "models" / "best.pt")
    model = load(folder)
    np.testing.assert_array_equal(labels(model, ct_file), labels(models.zoo, ct_file))
    assert model.record["weights"] == str(folder / "models" / "best.pt")
    other = load(folder, weights="model.pt")
    assert (labels(other, ct_file) != labels(model, ct_file)).any(), "what is asked for goes before"


@pytest.mark.parametrize("of_author", [False, True])
def test_without_the_file_that_the_config_names_it_is_the_usual_one(of_author, models, ct_file, tmp_path):
    def edit(config):
        config["handlers"][0]["load_path" if of_author else "_disabled_"] = (
            "/home/author/best.pt" if of_author else True
        )

    model = load(tiny.write_zoo_bundle(tmp_path / "b", edit=edit))
    np.testing.assert_array_equal(labels(model, ct_file), labels(models.zoo, ct_file))
    assert any("loads /home/author/best.pt, which is not there" in note for note in model.notes) == of_author


def test_nothing_is_written_by_the_bundle(bundles, models, ct_file):
    models.zoo.predict(ct_file)
    assert sorted(path.name for path in bundles.zoo.iterdir()) == ["configs", "models"]


# Code of its own


def with_script(folder, threshold):
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "__init__.py").write_text("")
    (folder / "scripts" / "inferer.py").write_text(
        f"class Threshold:\n    def __call__(self, image, network):\n        return (image > {threshold}).float()\n"
    )

    def edit(config):
        config["inferer"] = {"_target_": "scripts.inferer.Threshold"}
        config["postprocessing"]["transforms"][:1] = []
        config["postprocessing"]["transforms"][1] = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}

    return tiny.write_zoo_bundle(folder, edit=edit)


def test_each_bundle_has_its_own_scripts(ct_file, tmp_path):
    first, second = (load(with_script(tmp_path / f"b{t}", t)) for t in (0.05, 0.8))
    body, bone = (np.count_nonzero(labels(model, ct_file)) for model in (first, second))
    assert body > 10 * bone > 0
    assert "scripts" not in sys.modules and not {str(tmp_path / "b0.05"), str(tmp_path / "b0.8")} & set(sys.path)


LATE = """
import torch

class Net(torch.nn.Conv3d):
    def forward(self, window):
        from scripts.helper import act
        return act(super().forward(window))

class Label:
    def __call__(self, data):
        from scripts.helper import moved
        return {**data, "pred": moved(data["pred"])}
"""


def with_late_imports(folder, label):
    """Every voxel gets the label, by modules that are imported when the first scan is there."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "net.py").write_text(LATE)
    (folder / "scripts" / "helper.py").write_text(
        f"def act(x):\n    return 0 * x\n\ndef moved(pred):\n    return 0 * pred + {label}\n"
    )

    def edit(config):
        config["network_def"] = {"_target_": "scripts.net.Net", "in_channels": 1, "out_channels": 3, "kernel_size": 1}
        config["postprocessing"]["transforms"].insert(3, {"_target_": "scripts.net.Label"})

    return tiny.write_zoo_bundle(folder, edit=edit, state=torch.nn.Conv3d(1, 3, 1).state_dict())


def test_a_bundle_imports_its_own_scripts_while_it_segments(ct_file, tmp_path):
    models = [load(with_late_imports(tmp_path / f"late{label}", label)) for label in (1, 2)]
    for _ in range(2):
        for label, model in enumerate(models, 1):
            assert (labels(model, ct_file) == label).all()
    models[0].plan(models[0].read(ct_file))
    assert not {name for name in sys.modules if name.split(".")[0] == "scripts"}


@pytest.fixture
def foreign(monkeypatch):
    """Modules of names that a bundle has too, imported by the program that segments."""
    modules = {name: ModuleType(name) for name in ("scripts", "scripts.net", "models", "docs")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def test_a_bundle_gets_its_own_scripts_where_others_are_imported_already(ct_file, tmp_path, foreign):
    model = load(with_late_imports(tmp_path / "late", 2))
    assert (labels(model, ct_file) == 2).all()
    assert {name: sys.modules.get(name) for name in foreign} == foreign and "scripts.helper" not in sys.modules


def test_only_names_of_python_code_are_hidden(tmp_path, foreign):
    for name in ("scripts/net.py", "docs/README.md", "models/model.pt", "__main__.py", "json.py", "torch/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    own = OwnModules(tmp_path)
    assert own.names == {"scripts"}
    with own.importable():
        assert not {"scripts", "scripts.net"} & set(sys.modules)
        assert all(sys.modules[name] is foreign[name] for name in ("docs", "models"))
        assert importlib.import_module("scripts.net").__file__ == str(tmp_path / "scripts" / "net.py")
    assert sys.modules["scripts.net"] is foreign["scripts.net"]


# What cannot run


def no_invert(config):
    config["postprocessing"]["transforms"] = [
        step for step in config["postprocessing"]["transforms"] if step["_target_"] != "Invertd"
    ]


def set_to(*path, value):
    def edit(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return edit


def without(*names):
    return lambda config: [config.pop(name) for name in names]


FOREGROUND = {"pred": {"channel_def": {"0": "background", "1": "spleen"}}}
OTHER = {"other.weight": torch.zeros(3)}
NOT_FINITE = {key: value / 0 if value.is_floating_point() else value for key, value in tiny.unet_state().items()}
WRONG_SHAPE = {key: value[..., :1] if value.dim() > 1 else value for key, value in tiny.unet_state().items()}


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"state": None}, FileNotFoundError, r"weights of b are missing: there is no .*model\.pt"),
        ({"state": OTHER}, ValueError, r"weights of b do not fit its UNet: missing in the file: .*; left over in"),
        ({"state": WRONG_SHAPE}, ValueError, r"weights of b do not fit its UNet: of another shape: "),
        ({"state": NOT_FINITE}, ValueError, r"weights of b do not fit its UNet: with NaN, infinity"),
        ({"edit": without("inferer")}, ValueError, "defines no 'inferer'"),
        ({"edit": without("network", "network_def")}, ValueError, "defines no 'network' or 'network_def'"),
        ({"edit": without("preprocessing")}, ValueError, "defines no 'preprocessing' or 'pre_transforms'"),
        ({"edit": set_to("network_def", "_target_", value="NoSuchNet")}, ValueError, "'network' of its .*NoSuchNet"),
        ({"edit": set_to("network_def", "no_such", value=1)}, ValueError, "'network' of its .*no_such"),
        ({"edit": set_to("inferer", "roi_size", value="@nowhere")}, ValueError, "'inferer' of its .*nowhere"),
        (
            {"edit": set_to("preprocessing", "transforms", 0, "keys", value="t2w")},
            ValueError,
            "does not load the key 'image'",
        ),
        (
            {"network_data_format": {"inputs": {"image": {"num_channels": 4}}, "outputs": FOREGROUND}},
            ValueError,
            "takes 4 channels, but from one image it gets 1",
        ),
        ({"network_data_format": {}}, ValueError, "names no labels"),
    ],
)
def test_what_cannot_be_loaded_says_why(options, error, reason, tmp_path):
    folder = tiny.write_zoo_bundle(tmp_path / "b", **options)
    with pytest.raises(error, match=reason) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("configs/inference.json", None, r"has no configs/inference\.json or inference\.yaml"),
        ("configs/inference.json", "{", r"inference\.json cannot be read"),
        ("configs/metadata.json", None, "not a MONAI Bundle"),
        ("configs/metadata.json", '{"version"', "not valid JSON"),
        ("models/model.pt", "", r"the weights of b cannot be read: .*model\.pt is empty"),
        ("models/model.pt", "version https://git-lfs.github.com/spec/v1\noid sha256:12", "Git LFS pointer"),
    ],
)
def test_damaged_files(name, content, reason, tmp_path):
    folder = tiny.write_zoo_bundle(tmp_path / "b")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_damaged_yaml(tmp_path):
    folder = tiny.write_zoo_bundle(tmp_path / "b", suffix="yaml")
    (folder / "configs" / "inference.yaml").write_text("network: [1, 2")
    with pytest.raises(ValueError, match=r"inference\.yaml cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (torch.nn.Conv3d(1, 2, 1), "holds code or objects other than tensors"),
        ([torch.zeros(2)], "holds no tensors by name"),
    ],
)
def test_weights_that_are_no_dictionary_of_tensors(saved, reason, tmp_path):
    folder = tiny.write_zoo_bundle(tmp_path / "b")
    torch.save(saved, folder / "models" / "model.pt")
    with pytest.raises(ValueError, match=f"the weights of b cannot be read: .*{reason}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_half_of_the_weights(tmp_path):
    folder = tiny.write_zoo_bundle(tmp_path / "b")
    path = folder / "models" / "model.pt"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"the weights of b cannot be read: .*model\.pt is damaged or was cut short"):
        load(folder)


def test_an_unknown_device_is_refused_before_the_model_is_built(bundles):
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        load_model(bundles.zoo, "tpu", trust=True)


def test_postprocessing_that_does_not_come_back_to_the_scan(ct_file, tmp_path):
    model = load(tiny.write_zoo_bundle(tmp_path / "b", edit=no_invert))
    with pytest.raises(ValueError, match=r"gives a volume of .* but the scan has .*must end with Invertd"):
        model.predict(ct_file)


def test_an_mr_bundle_expects_no_hounsfield_units(tmp_path):
    data_format = {
        "inputs": {"image": {"format": "magnitude", "modality": "MR", "num_channels": 1}},
        "outputs": {"pred": {"channel_def": {"0": "background", "1": "left", "2": "right"}}},
    }
    model = load(tiny.write_zoo_bundle(tmp_path / "b", network_data_format=data_format))
    mr = np.abs(tiny.ct())
    assert not model.expects_hu and model.predict((mr, tiny.LPS)).segmentation.shape == tiny.SHAPE


def test_loading_leaves_the_logging_of_others_alone(bundles):
    before = logging.getLogger().handlers[:], logging.getLogger().level
    load(bundles.zoo)
    assert (logging.getLogger().handlers, logging.getLogger().level) == before


def test_record_for_the_run_report(bundles, models):
    record = models.zoo.record
    assert record["name"] == "spleen_ct_segmentation" and record["version"] == "0.5.3"
    assert record["bundle"] == str(bundles.zoo) and record["weights"].endswith("model.pt")
    assert json.loads(json.dumps(record)) == record
