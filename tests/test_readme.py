"""What the README says can be typed and run."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import medseg3d
from medseg3d import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("medseg3d ")]


def verbs() -> set[str]:
    actions = cli._parser()._subparsers._group_actions
    return set(actions[0].choices)


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    assert cli._parser().parse_args(cli._with_dashes(arguments)).function.__name__ == arguments[0]


def test_every_verb_is_mentioned() -> None:
    missing = {verb for verb in verbs() if f"medseg3d {verb}" not in README}
    assert not missing


def test_python_example_uses_names_that_exist() -> None:
    example, of_networks = blocks("python")
    imported = (node for node in ast.walk(ast.parse(of_networks)) if isinstance(node, ast.ImportFrom))
    for statement in imported:
        assert all(hasattr(import_module(statement.module), alias.name) for alias in statement.names)
    used = {
        node.attr
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ms"
    }
    assert used <= set(medseg3d.__all__)
    model = {"predict", "predict_many"}
    result = {"labels", "segmentation", "statistics", "save", "preview"}
    assert all(hasattr(medseg3d.Segmenter, name) for name in model)
    assert all(hasattr(medseg3d.Segmentation, name) or name in {"segmentation"} for name in result)
    assert all(f".{name}" in example for name in model | result)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_tree_names_what_is_there() -> None:
    tree = re.search(r"```\n(medseg3d/\n.*?)```", README, flags=re.DOTALL)[1]
    for line in tree.splitlines():
        folder = ROOT / "medseg3d" if line.startswith("  ") else ROOT
        for name in re.split(r",\s*", re.split(r"\s{2,}", line.strip())[0]):
            assert (folder / name).exists(), f"{name} is in the README's tree but not in the repository"


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
