"""Stored reference values of networks: the rule that makes weights and inputs from a seed, and the comparison."""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.parity.kinks import KINKS, Sides

# With one input channel an instance norm divides this 1x1x1 convolution's weights out again, but for its epsilon.
DIVIDED_OUT = "encoder1.layer.conv3.conv.weight"
PRELU = ("act_function.weight", "act_function1.weight", "act_function2.weight", "adn.A.weight")


def stream(seed: int, name: str, n: int) -> np.ndarray:
    """`n` random uint64 of the stream that belongs to `name`."""
    return np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(n)


def unit(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """float64 in [0, 1)."""
    return ((stream(seed, name, int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def grid_input(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 multiples of 1/64 in [-2, 2), exact in half precision too."""
    k = (stream(seed, name, int(np.prod(shape))) >> np.uint64(56)).astype(np.int64)
    return ((k - 128) / 64.0).astype(np.float32).reshape(shape)


def weights(seed: int, key: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 values of the parameter or buffer `key`."""
    u = unit(seed, key, shape)
    s = 2 * u - 1
    if key.endswith("running_var"):
        values = 0.5 + u
    elif key.endswith("running_mean"):
        values = 0.2 * s
    elif key.endswith(("relative_position_bias_table", "position_embeddings", "cls_token")):
        values = 0.5 * s
    elif len(shape) == 1 and key.endswith(PRELU):
        values = 0.25 + 0.1 * s
    elif len(shape) == 1:
        values = 1 + 0.2 * s if key.endswith("weight") else 0.1 * s
    else:
        values = np.sqrt(3 / np.prod(shape[1:])) * s
    return values.astype("<f4")


def fill(network: nn.Module, seed: int, keep: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Set the network's state by the rule; what was set, by key. Integers, scalars and the keys `keep` stay."""
    filled = {}
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() and not key.endswith(tuple(keep)):
            filled[key] = weights(seed, key, tensor.shape)
            tensor.copy_(torch.from_numpy(filled[key]))
    return filled


class GoldenModel:
    """One whole network: its arguments, its keys and what it gave."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.case = json.loads((folder / "manifest.json").read_text())[name]
        self.keys = json.loads((folder / f"{name}.keys.json").read_text())
        self.arrays = np.load(folder / f"{name}.npz")
        self.seed, self.atol = self.case["seed"], self.case["atol"]
        gradients = folder / f"{name}.param_grads.json"
        self.param_grads = json.loads(gradients.read_text()) if self.case["has_grads"] else None

    def input(self) -> torch.Tensor:
        made = grid_input(self.seed, "input", self.case["input_shape"])
        if self.case["input_stored"]:
            np.testing.assert_array_equal(made, self.arrays["x"])
        return torch.from_numpy(made)

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network in eval mode with the reference's weights, after a check of its keys and shapes."""
        ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        assert ours == {key: shape for key, shape, *_ in self.keys}
        assert sum(p.numel() for p in network.parameters()) == self.case["n_params"]
        filled = fill(network, self.seed, self.case["keep"])
        digest = hashlib.sha256()
        for key, _, _, kind in self.keys:
            if kind != "keep":
                digest.update(filled[key].tobytes())
        assert digest.hexdigest() == self.case["filled_sha256"], "the weights are not those of the reference"
        return network.eval()

    def check_output(self, name: str, output: torch.Tensor) -> None:
        """The stored voxels, and the statistics of each channel over all of them."""
        reference = self.case["outputs"][name]
        assert list(output.shape) == reference["shape"]
        y = output.detach().double().numpy()
        np.testing.assert_allclose(self.strided(name, y), self.arrays[name], rtol=0, atol=self.atol)
        channels = np.moveaxis(y, 1, 0).reshape(y.shape[1], -1)
        if f"{name}_stats" not in self.arrays:  # not an image
            return
        mean, _, least, most, norm = self.arrays[f"{name}_stats"]
        np.testing.assert_allclose(channels.mean(axis=1), mean, rtol=1e-4, atol=self.atol)
        np.testing.assert_allclose(np.linalg.norm(channels, axis=1), norm, rtol=1e-4)
        np.testing.assert_allclose(channels.min(axis=1), least, rtol=0, atol=self.atol)
        np.testing.assert_allclose(channels.max(axis=1), most, rtol=0, atol=self.atol)

    def strided(self, name: str, array: np.ndarray) -> np.ndarray:
        step = slice(None, None, self.case["outputs"][name]["stored_stride"])
        return array[(slice(None), slice(None), *[step] * (array.ndim - 2))]

    def check_gradients_in_both_precisions(self, network: nn.Module, x: torch.Tensor) -> None:
        exact = copy.deepcopy(network).double()
        sides = Sides(exact, x.double(), KINKS.get(self.name, ()))
        self.check_gradients(exact, x.double(), sides)
        self.check_gradients(network, x, sides)

    def check_gradients(self, network: nn.Module, x: torch.Tensor, sides: Sides) -> None:
        """Gradients of the mean of output times cotangent, to the input and to every parameter, on those ``sides``."""
        x = x.clone().requires_grad_()
        with sides.forced():
            y = network(x)
        cotangent = torch.from_numpy(grid_input(self.seed, "cotangent", y.shape)).to(y.dtype)
        (y * cotangent).mean().backward()
        expected, relative = self.arrays["grad_input"], self.case["grad_atol_over_max"]
        ours = self.strided("y", x.grad.double().numpy())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=relative * abs(expected).max())
        # Parameters that nothing uses are kept for their keys and have no gradient.
        gradients = {name: p.grad.double() for name, p in network.named_parameters() if p.requires_grad}
        assert gradients.keys() == self.param_grads.keys()
        for name, reference in self.param_grads.items():
            scale = max(map(abs, reference))
            if name == DIVIDED_OUT:  # what is left of a sum that cancels: it is measured by the block's gradients
                scale = max(map(abs, self.param_grads["encoder1.layer.conv2.conv.weight"]))
            gradient = gradients[name]
            found = [float(gradient.norm()), float(gradient.sum())]
            np.testing.assert_allclose(found, reference, rtol=0, atol=relative * scale, err_msg=name)
