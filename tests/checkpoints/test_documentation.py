"""The examples of docs/checkpoints.md run, on stand-ins for the public files: their names and shapes, and zeros."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import pytest
import torch

from medseg3d.networks.swin_unetr import SwinUNETR
from medseg3d.networks.unetr import UNETR

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()


def stand_in(network):
    """The network's keys and shapes; each tensor is one stored zero."""
    return {
        key: tensor if tensor.dtype == torch.int64 else torch.zeros(()).expand(tensor.shape)
        for key, tensor in network.state_dict().items()
    }


def write_files():
    whole = stand_in(SwinUNETR(in_channels=1, out_channels=14, feature_size=48))
    torch.save({"state_dict": whole}, "swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt")
    encoder = {key.replace("swinViT.", "module."): value for key, value in whole.items() if key.startswith("swinViT.")}
    torch.save({"state_dict": encoder}, "model_swinvit.pt")
    brats = {**whole, **stand_in(SwinUNETR(in_channels=4, out_channels=3, feature_size=48))}
    stream = io.BytesIO()
    torch.save({"state_dict": brats}, stream)
    with zipfile.ZipFile("fold1_f48_ep300_4gpu_dice0_9059.zip", "w") as archive:
        archive.writestr("model.pt", stream.getvalue())
    torch.save(
        stand_in(UNETR(in_channels=1, out_channels=14, img_size=96, proj_type="perceptron")), "UNETR_model_best_acc.pth"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files()


def test_the_examples_run(folder, capsys):
    """One after the other, as a reader would type them."""
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) == 6
    names = {}
    for example in examples:
        exec(example, names)
    shown = re.findall(r"```\n(swin_unetr.*?)```", PAGE, flags=re.DOTALL)
    assert shown == [capsys.readouterr().out.partition("swinViT. False\n")[0]]
    assert Path("weights.safetensors").is_file()
