"""Models are found by name, folder or zip, and described from their metadata alone."""

from __future__ import annotations

import json
import shutil

import pytest

from medseg3d.catalogue import DEFAULT_MODEL, find_bundle, shipped_bundles
from tests.tiny_bundles import zipped


def test_what_ships():
    names = [bundle.name for bundle in shipped_bundles()]
    assert DEFAULT_MODEL in names and names == sorted(names)
    for bundle in shipped_bundles():
        assert bundle.shipped and bundle.version != "unknown"
        assert 0 not in bundle.labels
        assert bundle.labels or bundle.metadata["label_classes"] == "none"


def test_a_name_and_its_folder_are_one_bundle(tmp_path, monkeypatch):
    bundle = find_bundle(DEFAULT_MODEL)
    assert bundle.shipped and find_bundle(bundle.path) == bundle
    monkeypatch.chdir(bundle.path.parent)
    assert find_bundle(f"./{DEFAULT_MODEL}").shipped
    copied = shutil.copytree(bundle.path / "configs", tmp_path / DEFAULT_MODEL / "configs").parent
    assert not find_bundle(copied).shipped  # whoever copied it may have changed it


def test_a_folder(bundles):
    bundle = find_bundle(bundles.zoo)
    assert (bundle.name, bundle.version, bundle.shipped) == ("spleen_ct_segmentation", "0.5.3", False)
    assert bundle.labels == {1: "left", 2: "right"}
    assert bundle.input_format["format"] == "hounsfield"


@pytest.mark.parametrize("inside", ["", "spleen_ct", "deep/er/spleen_ct"])
def test_a_zip(inside, bundles, tmp_path):
    bundle = find_bundle(zipped(bundles.zoo, tmp_path / "spleen_ct.zip", inside))
    assert bundle.name == "spleen_ct" and not bundle.shipped
    assert bundle.metadata == find_bundle(bundles.zoo).metadata


def test_what_is_no_bundle(bundles, tmp_path):
    with pytest.raises(ValueError, match=f"unknown model 'lungs'.*{DEFAULT_MODEL}"):
        find_bundle("lungs")
    with pytest.raises(ValueError, match="unknown model"):
        find_bundle(bundles.zoo / "configs" / "inference.json")
    with pytest.raises(ValueError, match=r"model\.pt holds no MONAI Bundle"):  # PyTorch's files are zips
        find_bundle(bundles.zoo / "models" / "model.pt")
    with pytest.raises(ValueError, match=r"not a MONAI Bundle: it has no configs/metadata\.json"):
        find_bundle(tmp_path)
    with pytest.raises(ValueError, match="holds no MONAI Bundle"):
        find_bundle(zipped(bundles.zoo / "models", tmp_path / "weights.zip"))
    archive = zipped(bundles.zoo, tmp_path / "damaged.zip")
    archive.write_bytes(archive.read_bytes().replace(b"0.5.3", b"0.5.4", 1))  # stored, so its checksum is wrong now
    with pytest.raises(ValueError, match="cannot be unpacked"):
        find_bundle(archive)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"version": "1.0",', "not valid JSON"),
        ("[]", "must hold a JSON object, got a list"),
    ],
)
def test_damaged_metadata(text, reason, bundles, tmp_path):
    folder = shutil.copytree(bundles.zoo, tmp_path / "bundle")
    (folder / "configs" / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=f"metadata.json.*{reason}"):
        find_bundle(folder)


@pytest.mark.parametrize(
    "data_format",
    [
        None,
        [],
        {},
        {"outputs": {"pred": {}}},
        {"outputs": {"pred": {"channel_def": ["background", "spleen"]}}},
        {"outputs": {"pred": {"channel_def": {"spleen": "1"}}}},
    ],
)
def test_metadata_without_labels(data_format, bundles, tmp_path):
    folder = shutil.copytree(bundles.zoo, tmp_path / "bundle")
    path = folder / "configs" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"network_data_format": data_format}))
    bundle = find_bundle(folder)
    assert bundle.input_format == {}
    with pytest.raises(ValueError, match=r"names no labels.*channel_def"):
        _ = bundle.labels
