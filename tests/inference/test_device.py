"""Names of devices, on machines that have them and on those that do not."""

from __future__ import annotations

import pytest
import torch

from medseg3d.inference.device import device_name, resolve_device


@pytest.fixture
def gpus(monkeypatch):
    def set_count(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("name", "count", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        (" CPU ", 0, "cpu"),
        ("gpu", 1, "cuda:0"),
        ("GPU:1", 2, "cuda:1"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        (torch.device("cpu"), 0, "cpu"),
    ],
)
def test_spellings(name, count, device, gpus):
    gpus(count)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("tpu", 1, "unknown device 'tpu'; a device is auto, cpu, gpu"),
        ("gpu:x", 1, "unknown device"),
        ("cuda:-1", 1, "unknown device"),
        ("", 1, "unknown device"),
        ("gpu", 0, "sees none; take --device cpu"),
        ("cuda:2", 2, r"sees only 2 \(gpu:0 to gpu:1\)"),
    ],
)
def test_devices_that_are_not_there(name, count, reason, gpus):
    gpus(count)
    with pytest.raises(ValueError, match=reason):
        resolve_device(name)


@pytest.mark.parametrize("there", [True, False])
def test_mps(there, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    if there:
        assert resolve_device("mps") == torch.device("mps")
    else:
        with pytest.raises(ValueError, match="needs an Apple GPU"):
            resolve_device("mps")


def test_device_name(monkeypatch):
    assert device_name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_name(torch.device("cuda:1")) == "cuda:1 (NVIDIA H200)"
