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
        golden.check_gradients_in_both_precisions(network, x)


def test_keys_shapes_and_types_of_the_usual_network(shared):
    stored = json.loads(shared("golden", "3d", "keys", "VNet_1to2.json").read_text())
    with torch.device("meta"):
        state = VNet(out_channels=2).state_dict()
    ours = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()}
    assert ours == {key: (shape, f"torch.{dtype}") for key, shape, dtype in stored}
