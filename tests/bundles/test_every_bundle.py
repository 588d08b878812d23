"""What holds for every bundle that ships: its files, its weights, its metadata, and MONAI's names for its parts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

from medseg3d.catalogue import shipped_bundles
from medseg3d.data.manifest import load_manifest
from medseg3d.resources import resource_folder

SCHEMA = resource_folder("bundles") / "metadata_schema.json"
FILES = (
    *("LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt", "configs/logging.conf"),
    *(f"configs/{name}.json" for name in ("metadata", "inference", "train", "evaluate", "multi_gpu_train")),
)
HEADINGS = (
    *("Model Overview", "Data", "Training configuration", "Performance", "MONAI Bundle Commands", "References"),
    "License",
)
# What MONAI Label and the MONAI Deploy App SDK look up in inference.json.
CONSUMED = ("bundle_root", "device", "network_def", "preprocessing", "postprocessing", "inferer", "dataset_dir")
# MONAI's commands that take no network of objects; the card of a detector says so.
TENSORS_ONLY = {"verify_net_in_out", "ckpt_export"}


@pytest.fixture(params=shipped_bundles(), ids=lambda bundle: bundle.name)
def bundle(request):
    return request.param


def config(bundle, name):
    return json.loads((bundle.path / "configs" / f"{name}.json").read_text())


def gives_tensors(bundle):
    """Whether the network returns a tensor; a detector returns a dictionary for each picture."""
    return config(bundle, "metadata")["network_data_format"]["outputs"]["pred"]["type"] != "object"


def trained(bundle):
    parser = ConfigParser()
    parser.read_config(str(bundle.path / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle.path / "models" / "model.pt", weights_only=True))
    return network.eval()


def test_every_folder_is_a_bundle():
    folders = {path.name for path in resource_folder("bundles").iterdir() if path.is_dir()}
    assert folders == {bundle.name for bundle in shipped_bundles()} and folders


def test_files(bundle):
    assert [name for name in FILES if not (bundle.path / name).is_file()] == []
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", bundle.name)
    assert "Apache License" in (bundle.path / "LICENSE").read_text()


def test_model_card(bundle):
    text = (bundle.path / "docs" / "README.md").read_text()
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
    assert "not for clinical" in text.lower()
    assert [name for name in bundle.labels.values() if name not in text] == []


def test_commands_of_the_model_card_name_what_exists(bundle):
    """Every file and every id that a command of the card gives is there, so that a rename cannot leave it behind."""
    text = (bundle.path / "docs" / "README.md").read_text()
    commands = re.findall(r"^(?:python|torchrun) .*-m monai\.bundle (\w+) (.+)$", text, re.MULTILINE)
    needed = {"run", "verify_metadata", *(TENSORS_ONLY if gives_tensors(bundle) else ())}
    assert {verb for verb, _ in commands} == needed
    assert [verb for verb in TENSORS_ONLY if f"`{verb}`" not in text and f"monai.bundle {verb}" not in text] == []
    for verb, rest in commands:
        words = shlex.split(rest)
        options = dict(zip(words[::2], words[1::2], strict=True))
        named = re.findall(r"[\w./]+\.(?:json|pt)\b", " ".join(options.values()))
        missing = [name for name in named if not name.startswith("eval/") and not (bundle.path / name).is_file()]
        assert missing == [], rest
        if verb == "run":
            parser = ConfigParser()
            parser.read_config([str(bundle.path / name) for name in named])
            ids = {option.removeprefix("--") for option in options} - {"config_file"}
            assert [name for name in ids if name not in parser] == [], rest


def test_weights_are_plain_tensors(bundle):
    path = bundle.path / "models" / "model.pt"
    state = torch.load(path, weights_only=True)
    assert isinstance(state, dict)
    assert all(isinstance(key, str) and type(value) is torch.Tensor for key, value in state.items())
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert not any(key.startswith("module.") for key in state)
    assert path.stat().st_size < 25_000_000


def test_metadata_follows_the_schema_without_a_network(bundle, tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    schema = shutil.copy(SCHEMA, tmp_path / "schema.json")
    verify_metadata(meta_file=str(bundle.path / "configs" / "metadata.json"), filepath=schema)


@pytest.mark.parametrize(
    "damage",
    [
        lambda metadata: metadata.pop("required_packages_version"),
        lambda metadata: metadata.update(version=1),
        lambda metadata: metadata.update(supported_apps=["medseg3d"]),
        lambda metadata: metadata["network_data_format"]["inputs"]["image"].pop("dtype"),
        lambda metadata: metadata["network_data_format"]["outputs"]["pred"].update(num_channels="8"),
        lambda metadata: metadata["network_data_format"]["outputs"].pop("pred"),
    ],
)
def test_damaged_metadata_is_refused(bundle, damage, tmp_path):
    metadata = config(bundle, "metadata")
    damage(metadata)
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(SCHEMA))


def test_version_and_labels(bundle):
    metadata = config(bundle, "metadata")
    assert metadata["version"] in metadata["changelog"]
    data_format = metadata["network_data_format"]
    pred = data_format["outputs"]["pred"]
    assert list(pred["channel_def"]) == [str(number) for number in range(pred["num_channels"])]
    if not bundle.labels:  # it does not segment: weights to start another network from
        assert metadata["label_classes"] == "none"
        return
    assert pred["channel_def"]["0"] == "background"
    last = 65535 if bundle.pictures == "instances" else pred["num_channels"] - 1
    assert data_format["post_processed_outputs"]["pred"]["value_range"] == [0, last]
    assert load_manifest(config(bundle, "train")["manifest"])["labels"] == pred["channel_def"]
    listed = ", ".join(f"{number} {name}" for number, name in pred["channel_def"].items())
    assert metadata["label_classes"] == listed


def test_network_in_and_out_fit_the_metadata(bundle):
    if not gives_tensors(bundle):
        check_detections(bundle)
        return
    configs = bundle.path / "configs"
    verify_net_in_out(
        net_id="network_def", meta_file=str(configs / "metadata.json"), config_file=str(configs / "inference.json")
    )


def check_detections(bundle):
    """What MONAI's command cannot: a dictionary for each picture, of objects whose classes the metadata names."""
    data_format = config(bundle, "metadata")["network_data_format"]
    channels = data_format["inputs"]["image"]["num_channels"]
    batch = torch.zeros(2, channels, 60, 70)
    batch[1, :, 20:40, 25:45] = 1
    with torch.no_grad():
        found = trained(bundle)(batch)
    assert len(found) == 2 and len(found[1]["labels"]) > 0
    for one in found:
        n = len(one["labels"])
        shapes = {"boxes": (n, 4), "labels": (n,), "scores": (n,), "masks": (n, 1, 60, 70)}
        assert {name: tuple(value.shape) for name, value in one.items()} == shapes
        assert set(one["labels"].tolist()) <= bundle.labels.keys()


def test_export(bundle):
    """To torch.export and TorchScript: the network, or of a detector the backbone, as its card says."""
    network = trained(bundle) if gives_tensors(bundle) else trained(bundle).backbone
    image = config(bundle, "metadata")["network_data_format"]["inputs"]["image"]
    sides = [64, 64] if len(image["spatial_shape"]) == 2 else [64, 32, 32]
    sides = config(bundle, "inference")["network_def"].get("img_size", sides)  # UNETR has positions for one size
    x = torch.randn(1, image["num_channels"], *sides, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(x)
        for exported in (torch.export.export(network, (x,)).module(), torch.jit.trace(network, x, strict=False)):
            torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)


def test_ids_that_other_programs_look_up(bundle):
    assert [name for name in CONSUMED if name not in config(bundle, "inference")] == []
    parser = ConfigParser()
    parser.read_config(str(bundle.path / "configs" / "train.json"))
    wanted = ("train::trainer::max_epochs", "train::dataset::data", "train::handlers", "validate::dataset::data")
    assert [name for name in wanted if name not in parser] == []


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_bundle_workflow_properties(bundle, kind, phantoms, picture_phantoms, tmp_path):
    data = picture_phantoms if bundle.pictures else phantoms
    small = {"crop_size": [40, 40]} if bundle.pictures else {"cache_memory": 0.0}
    overrides = data.overrides | {"output_dir": str(tmp_path)} | (small if kind == "train" else {})
    workflow = ConfigWorkflow(
        str(bundle.path / "configs" / f"{kind}.json"),
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(bundle.path),
        **overrides,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.version == bundle.version


def test_weights_fit_the_network(bundle):
    trained(bundle)  # strictly: no key is missing or left over
