"""V-Net against MONAI 1.6.1 (golden/3d/models and keys)."""

from __future__ import annotations

import json

import pytest
import torch

from medseg3d.networks import VNet
from tests.parity.golden import GoldenModel

CASES = [
    "vnet_2d",
    "vnet_default",
    "vnet_4ch_nodropout",
    "vnet_prelu_bias_2cls",
    pytest.param("vnet_course_128x128x64", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", CASES)
def test_same_weights_give_the_same_output_and_gradients(name, shared):
    golden = GoldenModel(shared("golden", "3d", "models"), name)
    network = golden.prepare(VNet(**golden.case["kwargs"]))
    x = golden.input()
    with torch.no_grad():
        golden.check_output("y", network(x))
    if golden.param_grads:
        # In float32 one PReLU's input, 1e-8 in float64, falls on the other side of zero here.
        golden.check_gradients(network, x, share=0.9)
        network.zero_grad()
        golden.check_gradients(network.double(), x.double())


def test_keys_shapes_and_types_of_the_usual_network(shared):
    stored = json.loads(shared("golden", "3d", "keys", "VNet_1to2.json").read_text())
    with torch.device("meta"):
        state = VNet(out_channels=2).state_dict()
    ours = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()}
    assert ours == {key: (shape, f"torch.{dtype}") for key, shape, dtype in stored}
