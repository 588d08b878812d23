"""docs/flops.md shows what the command prints, and its notebook runs as a script."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "flops.md").read_text()
SHOWN = re.findall(r"```sh\n([^\n]*)\n```\n\n```text\n(.*?)\n```", PAGE, flags=re.DOTALL)


def test_every_command_shows_its_output():
    assert len(SHOWN) == PAGE.count("```sh") == PAGE.count("```text") > 5


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_outputs_are_those_of_the_command(command, output, run):
    code, out, err = run(*shlex.split(command)[1:])
    assert (code, err) == (0, [])
    *shown, empty, convention = out
    assert shown == output.split("\n") and empty == "" and convention.startswith("A multiply-add")


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(snippet, "docs/flops.md", "exec"), names)
    assert names["reach"].coarsest == (8, 8, 8) and all(names["reach"].field)
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_the_notebook_runs_as_a_script(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(str(ROOT / "notebooks" / "flops_of_attention.py"))
    out = capsys.readouterr().out
    assert "full / windowed = 128.5" in out and "256.0" in out
    assert re.search(r"Swin UNETR\s+62,187,296\s+637.05\s+318.52", out)
