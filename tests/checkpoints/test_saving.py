"""What save_checkpoint writes, load_checkpoint restores exactly."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from medseg3d import __version__
from medseg3d.checkpoints import load_checkpoint, save_checkpoint
from tests.checkpoints.conftest import assert_same, copy_of, filled, swin, unetr


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_what_is_saved_is_restored(tmp_path, suffix):
    source = filled(swin(downsample="mergingv2", norm_name="batch"))
    path = save_checkpoint(source, tmp_path / "new" / f"weights.{suffix}")
    assert [file.name for file in path.parent.iterdir()] == [f"weights.{suffix}"]
    target = swin(norm_name="batch")
    report = load_checkpoint(target, path)
    assert_same(target.state_dict(), source.state_dict())
    assert target.merging_order == "mergingv2"
    assert report.complete and report.used == 1 and not (report.renamed or report.missing or report.left_over)


def test_what_a_file_says_of_itself(tmp_path):
    record = {"format": 1, "version": __version__, "network": "SwinUNETR", "merging_order": "legacy"}
    content = torch.load(save_checkpoint(swin(downsample="legacy"), tmp_path / "a.pt"), weights_only=True)
    assert content.keys() == {"state_dict", "medseg3d"} and content["medseg3d"] == record
    with safetensors.safe_open(save_checkpoint(swin(downsample="legacy"), tmp_path / "a.safetensors"), "pt") as opened:
        assert json.loads(opened.metadata()["medseg3d"]) == record
        assert opened.metadata()["format"] == "pt"  # which other readers of safetensors ask for
    content = torch.load(save_checkpoint(unetr(), tmp_path / "b.pt"), weights_only=True)
    assert content["medseg3d"] == {"format": 1, "version": __version__, "network": "UNETR"}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_shared_strided_and_half_precision_tensors(tmp_path, suffix):
    """A view is saved without what it is a view of; two names of one tensor stay two names."""
    source = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 3), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    source[2].weight = source[1].weight
    source[0].weight.data = torch.randn(1000, 4, 3, 3, 3).bfloat16()[:4].to(memory_format=torch.channels_last_3d)
    path = save_checkpoint(source, tmp_path / f"a.{suffix}")
    assert path.stat().st_size < 10_000
    target = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 3), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    load_checkpoint(target, path)
    assert_same(target.state_dict(), source.state_dict())


def test_wrappers_leave_no_trace(tmp_path):
    source, part_compiled = filled(unetr()), filled(unetr())
    part_compiled.vit = torch.compile(part_compiled.vit)
    parallel = torch.nn.DataParallel(source)
    for wrapped in (parallel, torch.compile(source), torch.compile(parallel), part_compiled):
        path = save_checkpoint(wrapped, tmp_path / "a.pt")
        content = torch.load(path, weights_only=True)
        assert_same(content["state_dict"], source.state_dict())
        assert content["medseg3d"]["network"] == "UNETR"
        target = unetr()
        assert load_checkpoint(torch.nn.DataParallel(target), path).network == "UNETR"
        assert_same(target.state_dict(), source.state_dict())
        target = unetr()
        assert load_checkpoint(torch.compile(target), path).complete
        assert_same(target.state_dict(), source.state_dict())


def test_a_part_named_module_is_kept(tmp_path):
    source = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    content = torch.load(save_checkpoint(source, tmp_path / "a.pt"), weights_only=True)
    assert_same(content["state_dict"], source.state_dict())


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    before = path.read_bytes()

    def fails(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(torch.nn.Linear(2, 2), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_saving_moves_and_changes_nothing(tmp_path):
    source = filled(unetr())
    before = copy_of(source)
    save_checkpoint(source, tmp_path / "a.pt")
    assert_same(source.state_dict(), before)


def test_a_file_of_another_class_is_noted(tmp_path):
    class Own(torch.nn.Linear):
        pass

    path = save_checkpoint(Own(2, 2), tmp_path / "a.pt")
    assert load_checkpoint(torch.nn.Linear(2, 2), path).notes == [
        "the file was saved from a Own, the network is a Linear"
    ]


@pytest.mark.parametrize(
    ("network", "name", "words"),
    [
        (torch.nn.Linear(2, 2), "a.onnx", r"weights are saved as \.pt, \.pth, \.safetensors, got a\.onnx"),
        (torch.nn.ReLU(), "a.pt", "this ReLU has no weights to save"),
        (torch.nn.Linear(2, 2, device="meta"), "a.pt", "this Linear has no weights to save"),
    ],
)
def test_what_cannot_be_saved(tmp_path, network, name, words):
    with pytest.raises(ValueError, match=words):
        save_checkpoint(network, tmp_path / name)
    assert not list(tmp_path.iterdir())
