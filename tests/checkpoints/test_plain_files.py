"""Files of plain PyTorch: the order of patch merging, and files that are open already."""

from __future__ import annotations

import io
import zipfile

import pytest
import safetensors.torch
import torch

from medseg3d.checkpoints import load_checkpoint
from medseg3d.networks import SwinUNETR


@pytest.mark.parametrize("order", ["legacy", "merging", "mergingv2"])
def test_torch_save_keeps_the_order(order, tmp_path):
    trained = SwinUNETR(1, 2, feature_size=12, downsample=order)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "model.pt")
    network = SwinUNETR(1, 2, feature_size=12)
    report = load_checkpoint(network, tmp_path / "model.pt")
    assert network.merging_order == order
    assert report.complete


def saved(name, weights, path):
    if name == "weights.safetensors":
        safetensors.torch.save_file(weights, path)
    elif name == "weights.zip":
        torch.save(weights, path.with_suffix(".pt"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(path.with_suffix(".pt"), "weights.pt")
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=name == "weights.pt")
    return path


@pytest.mark.parametrize("name", ["weights.pt", "old.pt", "weights.safetensors", "weights.zip"])
def test_a_file_may_be_open(name, tmp_path):
    weights = torch.nn.Conv3d(1, 4, 3).state_dict()
    path = saved(name, weights, tmp_path / name)
    for opened in (path.open("rb"), io.BytesIO(path.read_bytes())):
        target = torch.nn.Conv3d(1, 4, 3)
        with opened:
            report = load_checkpoint(target, opened)
        assert report.complete and all(torch.equal(value, weights[key]) for key, value in target.state_dict().items())


def test_an_open_file_that_gives_no_bytes(tmp_path):
    path = saved("weights.pt", torch.nn.Conv3d(1, 4, 3).state_dict(), tmp_path / "weights.pt")
    with path.open("rb") as opened:
        opened.read()
        with pytest.raises(ValueError, match=r"weights.pt has nothing left to read: call its seek\(0\) first"):
            load_checkpoint(torch.nn.Conv3d(1, 4, 3), opened)
    with pytest.raises(ValueError, match=r"is open as text, weights are bytes: open it with mode 'rb'"):
        load_checkpoint(torch.nn.Conv3d(1, 4, 3), io.StringIO("weights"))
    with pytest.raises(TypeError, match="or a mapping, got a NoneType"):
        load_checkpoint(torch.nn.Conv3d(1, 4, 3), None)
