"""Stored reference values of the 2D systems: the rule that makes weights from a seed, and the comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def draws(bits: np.random.PCG64, shape: Iterable[int], mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Float32 values, uniform with that mean and standard deviation, from the next raw numbers of ``bits``."""
    shape = tuple(shape)
    u = (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy((mean + std * np.sqrt(12) * (u - 0.5)).astype(np.float32).reshape(shape))


def seeded_input(seed: int, shape: Iterable[int]) -> torch.Tensor:
    """The input that a file names by ``*_seed``."""
    return draws(np.random.PCG64(seed), shape)


class Golden2d:
    """One file of reference values with the weights that its spec describes; ``spec`` where it is named otherwise."""

    def __init__(self, folder: Path, name: str, spec: str | None = None) -> None:
        self.arrays = np.load(folder / f"{name}.npz")
        self.spec: dict[str, Any] = json.loads((folder / f"{spec or name}.spec.json").read_text())

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def state(self) -> dict[str, torch.Tensor]:
        """The drawn weights by key, after a check of each first value and of their sum."""
        bits, total, state = np.random.PCG64(self.spec["seed"]), 0.0, {}
        for key, shape, _, mean, std, *first in self.spec["tensors"]:
            if mean is None:  # integers keep their values
                continue
            state[key] = draws(bits, shape, mean, std)
            np.testing.assert_allclose(float(state[key].flatten()[0]), *first, rtol=1e-6)
            total += float(state[key].double().abs().sum())
        np.testing.assert_allclose(total, self.spec["sum_abs"], rtol=1e-6)
        for key, values in self.spec.get("assign", {}).items():
            state[key] = torch.tensor(values, dtype=torch.float32).reshape(state[key].shape)
        return state

    def fill(self, network: nn.Module) -> nn.Module:
        """The network in eval mode with the reference's weights: its keys and shapes must be the reference's."""
        shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        assert shapes == {key: list(shape) for key, shape, *_ in self.spec["tensors"]}
        network.load_state_dict(self.state(), strict=False)
        return network.eval()

    def check(self, name: str, ours: torch.Tensor | np.ndarray, tolerance: float = 1e-4) -> None:
        """``max|a - b| / max|reference|``; a suffix of ``name`` tells which channels, rows and columns are stored."""
        check(strided(name, np.asarray(torch.as_tensor(ours).detach())), self.arrays[name], tolerance, name)


def strided(name: str, array: np.ndarray) -> np.ndarray:
    """What is stored under ``name``: ``_chN`` every N-th channel, ``_sN`` every N-th row and column."""
    for suffix in reversed(name.split("_")[1:]):
        if suffix.startswith("ch") and suffix[2:].isdigit():
            array = array[:, :: int(suffix[2:])]
        elif suffix.startswith("s") and suffix[1:].isdigit():
            array = array[..., :: int(suffix[1:]), :: int(suffix[1:])]
        else:
            break
    return array


def check(ours: np.ndarray, reference: np.ndarray, tolerance: float, name: str = "") -> None:
    assert ours.shape == reference.shape, f"{name}: {ours.shape}, the reference has {reference.shape}"
    if not np.issubdtype(reference.dtype, np.floating):
        np.testing.assert_array_equal(ours, reference, err_msg=name)
        return
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * abs(reference).max(), err_msg=name)
