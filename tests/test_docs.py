"""What docs/inference.md and docs/pictures.md say can be typed and run."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import medseg3d
from medseg3d import cli
from medseg3d.catalogue import BundleInfo
from medseg3d.data.datasets import Case, Dataset
from medseg3d.io import LabelTable, write_label_image, write_label_map
from medseg3d.volume import Volume

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("inference", "pictures", "data", "flops", "compare")


def blocks(language: str, page: str = "inference") -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(*pages: str) -> list[str]:
    return [line for page in pages for block in blocks("sh", page) for line in block.splitlines()]


def test_the_snippets_run_one_after_another(ct_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(medseg3d, "sample_ct", lambda: ct_file)  # a smaller one
    snippets = blocks("python")
    assert len(snippets) > 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/inference.md", "exec"), names)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder to work in with the pictures that docs/pictures.md names, and a tiny model in place of the large one."""
    from tests import tiny_pictures as tiny

    monkeypatch.chdir(tmp_path)
    for name in ("cells.png", "pictures/a.png", "pictures/b.tif", "more/c.tif"):
        tiny.write_picture(tmp_path / name)
    write_label_image(tmp_path / "references" / "a_labels.png", tiny.numbered())
    monkeypatch.setenv("MEDSEG3D_DEVICE", "cpu")
    folder = tiny.write_picture_bundle(tmp_path / "model" / "nuclei_microscopy_unet", "instances")
    bundle = BundleInfo(folder, shipped=True)
    for module in ("medseg3d.cli.predicting", "medseg3d.cli.verbs", "medseg3d.bundle"):
        monkeypatch.setattr(f"{module}.find_bundle", lambda name: bundle)
    return tmp_path


def test_the_snippets_on_pictures_run(pictures):
    names: dict[str, object] = {}
    for snippet in blocks("python", "pictures"):
        exec(compile(snippet, "docs/pictures.md", "exec"), names)
    assert names["labels"].max() == len(names["found"].result) == len(names["objects"]) == 3
    assert {"cells_seg.json", "overlay.png"} <= {path.name for path in pictures.iterdir()}


def test_the_commands_on_pictures_run_and_write_what_is_listed(pictures, run):
    for command in commands("pictures"):
        code, out, _ = run(*shlex.split(command)[1:])
        assert code == 0
    assert "found         3" in out and (pictures / "objects.csv").is_file()
    written = {path.name for path in (pictures / "results").iterdir()}
    ends = ("_seg.png", "_seg.json", ".preview.png")
    assert written == {f"{name}{end}" for name in "abc" for end in ends} | {
        "instances.json",
        "finished.json",
        "run.json",
    }
    assert (pictures / "cells_seg.png").is_file() and (pictures / "cells_seg.json").is_file()


def test_the_snippet_on_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = [{"image": f"{n}.nii.gz", "label": f"{n}_seg.nii.gz", "fold": n} for n in range(2)]
    for entry in entries:
        Path(entry["image"]).touch()
        Path(entry["label"]).touch()
    Path("datalist.json").write_text(json.dumps({"training": entries, "labels": {"1": "liver"}}))
    names: dict[str, object] = {}
    (snippet,) = blocks("python", "data")
    exec(compile(snippet, "docs/data.md", "exec"), names)
    assert [case["case"] for case in names["cases"]] == ["0"] and names["dataset"].labels == {
        0: "background",
        1: "liver",
    }


def test_the_snippet_on_comparisons_runs(tmp_path, monkeypatch):
    """With a tiny model in place of the large one, and a CT that is made up."""
    from tests import tiny_bundles as tiny

    monkeypatch.chdir(tmp_path)
    one = tiny.write_threshold_bundle(tmp_path / "headneck_ct_unet", ("background", "mandible"))
    for module in ("medseg3d.compare.contenders", "medseg3d.bundle"):
        monkeypatch.setattr(f"{module}.find_bundle", lambda name: BundleInfo(one, shipped=True))
    bone = Volume(tiny.bone().astype(np.uint8), tiny.LPS)
    label = write_label_map(bone, tmp_path / "seg.nii.gz", LabelTable({1: "mandible"}))
    case = Case("ct", (tiny.write_ct(tmp_path / "ct.nii.gz"),), label, "patient", "test")
    data = Dataset("tiny", tmp_path, (case,), {0: "background", 1: "mandible"})
    monkeypatch.setattr("medseg3d.data.manifest.dataset_of", lambda *source: data)
    names: dict[str, object] = {}
    for snippet in blocks("python", "compare"):
        exec(compile(snippet, "docs/compare.md", "exec"), names)
    assert len(names["result"].rows) == 2 and not names["result"].failures
    assert (tmp_path / "comparison" / "comparison.html").is_file()


@pytest.mark.parametrize("command", commands(*PAGES))
def test_commands_are_understood(command):
    arguments = shlex.split(command)
    if arguments[:2] == ["git", "clone"]:
        return
    if arguments[0] == "python":
        assert (ROOT / arguments[1]).is_file()
        return
    assert arguments[0] == "medseg3d"
    assert cli._parser().parse_args(arguments[1:]).function.__name__ == arguments[1]


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks("json", page) if "inferer" in text])
def test_inferers_can_be_built(text):
    config = json.loads(text)["inferer"]
    module, _, name = config.pop("_target_").rpartition(".")
    assert getattr(import_module(module), name)(**config)


def test_links_lead_somewhere():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
