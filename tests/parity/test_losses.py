"""MONAI's losses through ``MarginalLoss``: with every organ contoured they are what they were (golden/3d/losses)."""

from __future__ import annotations

import json

import monai.losses
import numpy as np
import pytest
import torch

from medseg3d.losses import MarginalLoss

KINDS = ("Dice", "DiceCE", "DiceFocal", "GeneralizedDice", "GeneralizedDiceFocal", "Focal")
DATA = ("multi", "multi_bg", "two_d", "large")


def is_covered(entry):
    """One number, of softmax probabilities, without weights of single classes."""
    arguments = entry["args"]
    softmax = arguments.get("softmax") or arguments.get("use_softmax")
    return entry.get("shape") == [] and softmax and entry["data"] in DATA and "weight" not in arguments


@pytest.fixture
def stored(shared):
    folder = shared("golden", "3d", "losses")
    entries = json.loads((folder / "manifest.json").read_text())
    covered = {name: entry for name, entry in entries.items() if "class" in entry and is_covered(entry)}
    return folder, covered, np.load(folder / "gradients.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, stored):
    folder, entries, gradients = stored
    entries = {name: entry for name, entry in entries.items() if entry["class"] == f"{kind}Loss"}
    assert entries
    for name, entry in entries.items():
        data = np.load(folder / f"data_{entry['data']}.npz")
        logits, labels = (torch.from_numpy(data[key]) for key in ("logits", "target"))
        logits.requires_grad_()
        loss = MarginalLoss(getattr(monai.losses, entry["class"])(**entry["args"]))
        value = loss(logits, labels, torch.ones(logits.shape[:2], dtype=torch.bool))
        value.backward()
        assert value.item() == pytest.approx(entry["value"], abs=2e-6 * max(1, abs(entry["value"]))), name
        if f"{name}.grad" in gradients:
            expected = torch.from_numpy(gradients[f"{name}.grad"])
            atol = 1e-6 + 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(logits.grad, expected, rtol=0, atol=atol, msg=name)
