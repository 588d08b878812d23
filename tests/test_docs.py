"""What docs/inference.md says can be typed and run."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import medseg3d
from medseg3d import cli

ROOT = Path(__file__).resolve().parents[1]
INFERENCE = (ROOT / "docs" / "inference.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", INFERENCE, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def test_the_snippets_run_one_after_another(ct_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(medseg3d, "sample_ct", lambda: ct_file)  # a smaller one
    snippets = blocks("python")
    assert len(snippets) > 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/inference.md", "exec"), names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    arguments = shlex.split(command)
    assert arguments[0] == "medseg3d"
    assert cli._parser().parse_args(arguments[1:]).function is cli.predict


@pytest.mark.parametrize("text", [text for text in blocks("json") if "inferer" in text])
def test_inferers_can_be_built(text):
    config = json.loads(text)["inferer"]
    module, _, name = config.pop("_target_").rpartition(".")
    assert getattr(import_module(module), name)(**config)


def test_links_lead_somewhere():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
