"""UNETR against MONAI 1.6.1: stored values (golden/3d/models and keys), and MONAI itself."""

from __future__ import annotations

import json

import pytest
import torch
from monai.networks import nets as monai

from medseg3d.networks.unetr import UNETR
from tests.parity.golden import GoldenModel, fill

CASES = [
    "unetr_2d",
    "unetr_small",
    "unetr_small_batch_noconv_nores",
    "unetr_small_conv_nores_instaffine",
    "unetr_small_perceptron_qkvbias",
    pytest.param("unetr_default_btcv_96", marks=pytest.mark.slow),
]
SMALL = {"out_channels": 2, "feature_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_heads": 3}


@pytest.mark.parametrize("name", CASES)
def test_same_weights_give_the_same_output_and_gradients(name, shared):
    golden = GoldenModel(shared("golden", "3d", "models"), name)
    network = golden.prepare(UNETR(**golden.case["kwargs"]))
    x = golden.input()
    with torch.no_grad():
        golden.check_output("y", network(x))
    if golden.param_grads:
        golden.check_gradients_in_both_precisions(network, x)


@pytest.mark.parametrize(("name", "proj_type"), [("UNETR_btcv", "conv"), ("UNETR_btcv_perceptron", "perceptron")])
def test_keys_shapes_and_types_of_the_usual_network(name, proj_type, shared):
    stored = json.loads(shared("golden", "3d", "keys", f"{name}.json").read_text())
    with torch.device("meta"):
        state = UNETR(1, 14, 96, proj_type=proj_type).state_dict()
    ours = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()}
    assert ours == {key: (shape, f"torch.{dtype}") for key, shape, dtype in stored}


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 3, "img_size": (32, 48), "spatial_dims": 2, "norm_name": "batch", "conv_block": False},
        {"in_channels": 2, "img_size": (48, 32), "spatial_dims": 2, "proj_type": "perceptron", "res_block": False},
        {"in_channels": 2, "img_size": (32, 16, 32), "conv_block": False, "norm_name": ("instance", {"affine": True})},
        {"in_channels": 4, "img_size": (16, 32, 32), "norm_name": ("group", {"num_groups": 2}), "qkv_bias": True},
        {"in_channels": 1, "img_size": 32, "res_block": False, "conv_block": False, "norm_name": "batch"},
    ],
)
def test_other_arguments_give_what_monai_gives(arguments):
    """In float64, where no rounding moves a voxel across a kink; batch norm in training."""
    arguments = {**SMALL, **arguments}
    ours, theirs = UNETR(**arguments), monai.UNETR(**arguments)
    fill(theirs, 6)
    ours.load_state_dict(theirs.state_dict())
    size = ours.vit.patch_embedding.img_size
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    results = []
    for network in (ours.double(), theirs.double()):
        y = network(x)
        y.square().mean().backward()
        results.append((y, {k: p.grad for k, p in network.named_parameters() if p.grad is not None}))
    assert results[0][1].keys() == results[1][1].keys()
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
