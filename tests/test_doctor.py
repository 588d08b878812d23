"""What `medseg3d doctor` tells of installations that are whole and of those that are not."""

from __future__ import annotations

import builtins
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from medseg3d import doctor
from medseg3d.catalogue import BundleInfo, shipped_bundles
from medseg3d.cli import main

ROOT = Path(__file__).resolve().parents[1]


def verdicts():
    return {finding.subject: finding.verdict for finding in doctor.examine()}


@pytest.fixture
def versions(monkeypatch):
    """Pretends that packages have other versions; None for one that is not installed."""
    pretended = {}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: pretended.get(package, real(package)))
    return pretended


def test_this_installation_has_all_that_is_needed():
    found = verdicts()
    for subject in ("python", *doctor._REQUIRED, "cpu", *(f"model {bundle.name}" for bundle in shipped_bundles())):
        assert found[subject] == "ok", subject
    assert {f"extra {name}" for name in doctor._EXTRAS} <= found.keys()


def test_the_packages_are_those_of_the_project_file():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    of_developers = {"notebooks", "dev"}

    def names(requirements):
        return [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]

    assert list(doctor._REQUIRED) == names(project["dependencies"])
    assert {extra: list(packages) for extra, packages in doctor._EXTRAS.items()} == {
        extra: names(requirements) for extra, requirements in extras.items() if extra not in of_developers
    }


@pytest.mark.parametrize(
    ("package", "version", "subject", "verdict"),
    [
        ("nibabel", None, "nibabel", "problem"),
        ("pydicom", None, "extra dicom", "note"),
        ("tqdm", None, "extra train", "note"),
        ("torch", "2.9.1", "torch 2.9.1", "problem"),
        ("torch", "2.10.0", "torch 2.10.0", None),
    ],
)
def test_versions(package, version, subject, verdict, versions):
    versions[package] = version
    assert verdicts().get(subject) == verdict
    if verdict == "note":
        (finding,) = (finding for finding in doctor.examine() if finding.subject == subject)
        assert f"lacks {package}: pip install medseg3d[{subject.split()[1]}]" in finding.text


def test_torch_that_cannot_be_imported(monkeypatch):
    real = builtins.__import__

    def broken(name, *arguments, **options):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    (finding,) = doctor._devices()
    assert finding.verdict == "problem" and "libcudart.so.12" in finding.text


def test_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**30, 2**34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    texts = {finding.subject: finding.text for finding in doctor._devices()}
    assert texts["gpu:1"] == "card 1, 1.0 of 16.0 GiB free" and "gpu" not in texts


def test_a_cuda_build_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    texts = {finding.subject: finding.text for finding in doctor._devices()}
    assert "check the driver" in texts["gpu"]


def test_missing_weights(monkeypatch, tmp_path, capsys):
    bundle = shipped_bundles()[0]
    copied = shutil.copytree(bundle.path / "configs", tmp_path / bundle.name / "configs").parent
    monkeypatch.setattr(doctor, "shipped_bundles", lambda: [BundleInfo(copied, shipped=True)])
    assert verdicts()[f"model {bundle.name}"] == "problem"
    assert main(["doctor"]) == 1
    assert "its weights are missing" in capsys.readouterr().out


def test_command(capsys, versions):
    versions["torch"] = "2.10.0"
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.examine()) and all(line.startswith(("ok ", "note ")) for line in lines)
    assert main(["doctor", "--json"]) == 0
    assert [entry["subject"] for entry in json.loads(capsys.readouterr().out)] == [f.subject for f in doctor.examine()]
