"""Stored reference values of single blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.parity.golden import fill

ATOL = 1e-5


class GoldenBlock:
    """One block: its arguments, and what went in and came out."""

    def __init__(self, folder: Path, name: str) -> None:
        self.case = json.loads((folder / "manifest.json").read_text())[name]
        self.arrays = {key: torch.from_numpy(array) for key, array in np.load(folder / f"{name}.npz").items()}

    def prepare(self, block: nn.Module, keys: str = "keys") -> nn.Module:
        """The block in eval mode with the reference's weights, after a check of its keys and shapes."""
        ours = {key: list(tensor.shape) for key, tensor in block.state_dict().items()}
        assert ours == {key: shape for key, shape, *_ in self.case[keys]}
        fill(block, self.case["seed"])
        return block.eval()

    def check(self, output: torch.Tensor, name: str = "y") -> None:
        torch.testing.assert_close(output, self.arrays[name], rtol=0, atol=ATOL)
