"""ViT and its auto-encoder against MONAI 1.6.1: stored values (golden/3d/models), and MONAI itself."""

from __future__ import annotations

import json

import pytest
import torch
from monai.networks import nets as monai

from medseg3d.networks.backbones.vit import ViT, ViTAutoEnc
from tests.parity.golden import GoldenModel, fill

CASES = ["vit_conv_3d", "vit_perceptron_cls_qkvbias", "vit_sincos_2d", "vit_sincos_3d_cls_notanh", "vitautoenc_16"]
NETWORKS = {"ViT": ViT, "ViTAutoEnc": ViTAutoEnc}
SMALL = {"hidden_size": 24, "mlp_dim": 40, "num_layers": 2, "num_heads": 3}


@pytest.mark.parametrize("name", CASES)
def test_same_weights_give_the_same_output_and_hidden_states(name, shared):
    golden = GoldenModel(shared("golden", "3d", "models"), name)
    network = golden.prepare(NETWORKS[golden.case["class"]](**golden.case["kwargs"]))
    with torch.no_grad():
        result, states = network(golden.input())
    outputs = {"y0": result, **{f"y1_{i}": state for i, state in enumerate(states)}}
    assert outputs.keys() == golden.case["outputs"].keys()
    for key, output in outputs.items():
        golden.check_output(key, output)


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_shapes_and_types_of_the_usual_network(name, shared):
    stored = json.loads(shared("golden", "3d", "keys", f"{name}_96_16.json").read_text())
    with torch.device("meta"):
        state = NETWORKS[name](1, 96, 16).state_dict()
    ours = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()}
    assert ours == {key: (shape, f"torch.{dtype}") for key, shape, dtype in stored}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ViT", {"in_channels": 3, "img_size": (12, 20), "patch_size": (4, 5), "spatial_dims": 2}),
        ("ViT", {"in_channels": 2, "img_size": (9, 10, 11), "patch_size": (4, 5, 3)}),  # no whole patches
        ("ViT", {"in_channels": 2, "img_size": (8, 12, 6), "patch_size": (4, 6, 3), "proj_type": "perceptron"}),
        ("ViT", {"in_channels": 1, "img_size": 8, "patch_size": 4, "pos_embed_type": "none", "qkv_bias": True}),
        ("ViT", {"in_channels": 1, "img_size": 8, "patch_size": 4, "pos_embed_type": "sincos"}),
        (
            "ViT",
            {
                "in_channels": 4,
                "img_size": (16, 8),
                "patch_size": 8,
                "classification": True,
                "num_classes": 4,
                "post_activation": "",
                "spatial_dims": 2,
            },
        ),
        ("ViTAutoEnc", {"in_channels": 1, "img_size": (8, 12), "patch_size": 4, "out_channels": 3, "spatial_dims": 2}),
        ("ViTAutoEnc", {"in_channels": 2, "img_size": (8, 18, 4), "patch_size": (4, 9, 4), "deconv_chns": 5}),
        ("ViTAutoEnc", {"in_channels": 2, "img_size": 8, "patch_size": 4, "proj_type": "perceptron", "qkv_bias": True}),
    ],
)
def test_other_arguments_give_what_monai_gives(name, arguments):
    arguments = {**SMALL, **arguments}
    ours, theirs = NETWORKS[name](**arguments), getattr(monai, name)(**arguments)
    assert {k: v.requires_grad for k, v in ours.named_parameters() if "cross" not in k} == {
        k: v.requires_grad for k, v in theirs.named_parameters() if "cross" not in k
    }
    keep = ("position_embeddings",) if arguments.get("pos_embed_type") == "sincos" else ()
    fill(theirs, 5, keep)
    ours.load_state_dict(theirs.state_dict())
    results = []
    sizes = ours.patch_embedding.img_size
    x = torch.randn(2, arguments["in_channels"], *sizes, dtype=torch.float64)
    for network in (ours.double(), theirs.double()):
        result, states = network(x)
        (result.square().sum() + sum(state.sin().sum() for state in states)).backward()
        gradients = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
        results.append((result, list(states), gradients))
    assert results[0][2].keys() == results[1][2].keys()
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
