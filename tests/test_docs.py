"""What docs/inference.md and docs/pictures.md say can be typed and run."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import medseg3d
from medseg3d import cli
from medseg3d.catalogue import BundleInfo
from medseg3d.io import write_label_image

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("inference", "pictures")


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
    for module in ("medseg3d.cli", "medseg3d.bundle"):
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


@pytest.mark.parametrize("command", commands(*PAGES))
def test_commands_are_understood(command):
    arguments = shlex.split(command)
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
