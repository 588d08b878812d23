"""The notebooks run from an empty folder, write nothing elsewhere, hold no outputs and are listed.

Here they run as scripts, which takes nothing of Jupyter; ``make notebooks`` runs them in a kernel.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
# Where a bundle, a data set or a notebook would write if nobody told it where to.
WATCHED = ("notebooks", "bundles", "data_manifests", "medseg3d/data/sample")
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Path) -> list[tuple[bool, str]]:
    """Whether each is prose, and its text."""
    parts = re.split(r"^# %%(.*)\n", notebook.read_text(), flags=re.MULTILINE)[1:]
    return [(title.strip() == "[markdown]", text) for title, text in zip(parts[::2], parts[1::2], strict=True)]


def files() -> dict[Path, int]:
    """When each file was last written."""
    found = [path for name in WATCHED for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    found += ROOT.iterdir()
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}


@each
def test_it_runs_and_writes_only_where_it_stands(notebook: Path, tmp_path: Path) -> None:
    before = files()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, notebook], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout
    assert files() == before


@each
def test_it_is_text_without_outputs(notebook: Path) -> None:
    header, text = notebook.read_text().split("# %%", 1)
    assert "format_name: percent" in header and all(line.startswith("#") for line in header.splitlines() if line)
    assert "image/png" not in text and "base64" not in text
    prose = [text for is_prose, text in cells(notebook) if is_prose]
    assert prose[0].startswith("# # "), "the first cell is the title"
    assert all(line.startswith("#") for text in prose for line in text.splitlines() if line)
    code = [text for is_prose, text in cells(notebook) if not is_prose]
    assert code and all(ast.parse(text).body for text in code)


def test_nothing_else_is_kept() -> None:
    """Pairs that jupytext writes hold outputs; they stay out of the repository."""
    others = {path.name for path in FOLDER.iterdir() if path.is_file()} - {path.name for path in NOTEBOOKS}
    assert {name for name in others if not name.endswith(".ipynb")} == {"README.md"}
    assert "notebooks/*.ipynb" in (ROOT / ".gitignore").read_text().splitlines()


def test_all_are_listed() -> None:
    listed = re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == [path.name for path in NOTEBOOKS]
    assert "(notebooks/README.md)" in (ROOT / "README.md").read_text()


def test_links_in_the_text_lead_somewhere() -> None:
    for notebook in NOTEBOOKS:
        for page in re.findall(r"(?:\(\.\./|`)(docs/\w+\.md)", notebook.read_text()):
            assert (ROOT / page).is_file(), f"{notebook.name} names {page}"
