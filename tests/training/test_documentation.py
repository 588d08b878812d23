"""What docs/training.md says can be typed, and names what exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

import medseg3d.training
from medseg3d import cli
from medseg3d.resources import resource_folder
from medseg3d.training.run import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
BLOCKS = {
    language: re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL) for language in ("sh", "json", "python")
}
LINES = [line for block in BLOCKS["sh"] for line in block.splitlines()]
SCRIPTS = [line for line in LINES if line.startswith("python scripts/")]
COMMANDS = [line for line in LINES if line not in SCRIPTS]


@pytest.fixture(scope="module")
def train_json():
    parser = ConfigParser()
    parser.read_config(str(resource_folder("bundles") / "headneck_ct_unet" / "configs" / "train.json"))
    return parser


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, train_json):
    words = shlex.split(command.partition("#")[0])
    words = words[words.index("medseg3d") + 1 :]
    arguments = cli._parser().parse_args(words)
    assert arguments.function.__name__ == words[0]
    if words[0] == "train":
        assert [name for name, _ in arguments.set if name not in train_json] == []


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_are_there(command):
    assert (ROOT / command.split()[1]).is_file()


def test_every_flag_and_id_is_there(train_json):
    table = re.findall(r"^\| `(--[\w-]+)[^`]*` \| (?:`(\w+)`|any) \|", PAGE, flags=re.MULTILINE)
    flags = {action.option_strings[-1] for action in _train_verb()._actions}
    assert {flag for flag, _ in table} <= flags and len(table) >= 6
    named = [name for _, name in table if name] + re.findall(
        r"`(\w+)`", PAGE.partition("Ids worth knowing:")[2].partition("MONAI's command")[0]
    )
    assert [name for name in named if name not in train_json] == []
    extras = re.findall(r"medseg3d\[(\w+)\]", PAGE)
    assert {*EXTRAS, "train"} == set(extras) and all(f"{extra} = [" in _project() for extra in extras)


def _train_verb():
    (choices,) = (action.choices for action in cli._parser()._actions if action.choices)
    return choices["train"]


def _project():
    return (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("text", BLOCKS["json"])
def test_losses_can_be_built(text):
    loss = ConfigParser(json.loads(text)).get_parsed_content("loss")
    logits, labels = torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4)
    assert torch.isfinite(loss(logits, labels, torch.tensor([[1, 1, 0]])))


def test_names_exist():
    for name in re.findall(r"`([A-Z]\w+)`", PAGE):
        monai_losses = __import__("monai.losses", fromlist=["losses"])
        from medseg3d import losses
        from medseg3d.data import augmentation

        assert any(hasattr(module, name) for module in (medseg3d.training, losses, augmentation, monai_losses)), name
