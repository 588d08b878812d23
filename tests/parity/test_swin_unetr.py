"""Swin UNETR, its encoder and its SSL head against MONAI 1.6.1 (golden/3d/models and keys), and MONAI itself."""

from __future__ import annotations

import json

import pytest
import torch
from monai.networks import nets as monai

from medseg3d.layers import winograd
from medseg3d.networks import SSLHead, SwinUNETR
from medseg3d.networks.backbones.swin import SwinTransformer
from tests.parity.golden import GoldenModel, fill

SWIN_UNETR = [
    "swin2d_f12",
    "swin2d_f24_v2",
    "swin_f12_depths_heads_noqkvbias",
    "swin_f12_legacy",
    "swin_f12_merging",
    "swin_f12_mergingv2",
    "swin_f12_norm_batch",
    "swin_f12_norm_group",
    "swin_f12_norm_instaffine_nonormalize",
    "swin_f12_v2",
    "swin_f12_v2_mergingv2_2ch",
    "swin_f12_window4_exact",
    "swin_f12_window_8_6_4",
    "swin_f24_4ch",
    pytest.param("swin_f48_btcv_96_legacy", marks=pytest.mark.slow),
    pytest.param("swin_f48_btcv_96_merging", marks=pytest.mark.slow),
]
SSL = [
    "ssl_f12_deconv",
    "ssl_f12_large_kernel",
    "ssl_f12_vae",
    "ssl_f12_vae_legacy",
    pytest.param("ssl_f48_vae_96", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", SWIN_UNETR)
def test_same_weights_give_the_same_output_and_gradients(name, shared):
    golden = GoldenModel(shared("golden", "3d", "models"), name)
    network = golden.prepare(SwinUNETR(**golden.case["kwargs"]))
    x = golden.input()
    with torch.no_grad():
        golden.check_output("y", network(x))
    golden.check_output("y", network(x))  # what training computes takes another path
    if golden.param_grads:
        golden.check_gradients_in_both_precisions(network, x)


def test_the_encoder_gives_the_same_maps(shared):
    golden = GoldenModel(shared("golden", "3d", "models"), "swinvit_f12_hidden")
    network = golden.prepare(SwinTransformer(**golden.case["kwargs"]))
    with torch.no_grad():
        maps = network(golden.input())
    assert len(maps) == 5
    for i, each in enumerate(maps):
        golden.check_output(f"y{i}", each)


@pytest.mark.parametrize("name", SSL)
def test_the_heads_of_pre_training_give_the_same(name, shared):
    golden = GoldenModel(shared("golden", "3d", "models"), name)
    network = golden.prepare(SSLHead(**golden.case["kwargs"]))
    with torch.no_grad():
        outputs = network(golden.input())
    for i, output in enumerate(outputs):
        golden.check_output(f"y{i}", output)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("SwinUNETR_btcv_f48", lambda: SwinUNETR(1, 14, feature_size=48)),
        ("SwinUNETR_brats_f48", lambda: SwinUNETR(4, 3, feature_size=48)),
        ("SwinUNETR_f48_v2", lambda: SwinUNETR(1, 14, feature_size=48, use_v2=True)),
        ("SSLHead_f48", lambda: SSLHead(feature_size=48)),
    ],
)
def test_keys_shapes_and_types_of_the_usual_networks(name, build, shared):
    stored = json.loads(shared("golden", "3d", "keys", f"{name}.json").read_text())
    with torch.device("meta"):
        state = build().state_dict()
    ours = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()}
    assert ours == {key: (shape, f"torch.{dtype}") for key, shape, dtype in stored}


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"window_size": (2, 3, 5), "feature_size": 12, "depths": (2, 1, 2, 2)}, (2, 1, 32, 64, 96)),
        ({"window_size": 6, "feature_size": 12, "num_heads": (2, 3, 4, 6), "in_channels": 2}, (1, 2, 96, 32, 32)),
        ({"window_size": 8, "feature_size": 12, "use_v2": True, "norm_name": "batch"}, (1, 1, 64, 32, 32)),
        ({"spatial_dims": 2, "feature_size": 24, "downsample": "mergingv2", "window_size": (5, 7)}, (3, 1, 96, 160)),
        ({"spatial_dims": 2, "feature_size": 12, "use_v2": True, "patch_norm": True}, (2, 1, 64, 224)),
        ({"feature_size": 36, "norm_name": ("group", {"num_groups": 6}), "mlp_ratio": 1.5}, (1, 1, 32, 32, 64)),
    ],
)
def test_other_arguments_agree_with_monai(arguments, shape):
    arguments = {"in_channels": 1, "out_channels": 3, **arguments}
    theirs, ours = monai.SwinUNETR(**arguments).eval(), SwinUNETR(**arguments).eval()
    fill(theirs, seed=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-4)


def test_the_merged_upsampling_of_wide_layers_agrees_with_monai(monkeypatch):
    monkeypatch.setattr("medseg3d.layers.residual.MERGE_FROM_VOXELS", 1)
    monkeypatch.setattr("medseg3d.layers.residual.MERGE_FROM_CHANNELS", 1)
    monkeypatch.setattr(winograd, "FROM_VOXELS", 1)
    monkeypatch.setitem(winograd.FROM_CHANNELS_TIMES_TAPS, torch.float32, 1)
    for arguments, shape in (({}, (2, 1, 64, 32, 32)), ({"spatial_dims": 2}, (2, 1, 64, 96))):
        theirs = monai.SwinUNETR(1, 2, feature_size=12, **arguments).eval()
        ours = SwinUNETR(1, 2, feature_size=12, **arguments).eval()
        fill(theirs, seed=6)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-4)
