"""Configs of networks from older releases of MONAI, and the numbers that they gave there."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import SwinUNETR

from medseg3d.compatibility import adapt_network, legacy_merging
from tests.parity.golden import GoldenModel

OLD_SWIN = {
    "_target_": "SwinUNETR",
    "spatial_dims": 3,
    "img_size": "@patch_size",
    "in_channels": 1,
    "out_channels": 2,
    "feature_size": 12,
    "use_checkpoint": True,
}


def test_swin_unetr_of_old(shared):
    """The whole network with the weights and the output of MONAI 1.4 and before."""
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_legacy")
    adapted, notes = adapt_network(OLD_SWIN, "1.3.0")
    assert len(notes) == 2 and "img_size=@patch_size" in notes[0] and "MONAI 1.3.0" in notes[1]
    parser = ConfigParser({"network_def": adapted, "patch_size": [64, 64, 32]})
    network = golden.prepare(parser.get_parsed_content("network_def"))
    with torch.no_grad():
        golden.check_output("y", network(golden.input()))


def test_swin_unetr_of_today_is_left_alone(shared):
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_merging")
    config = {key: value for key, value in OLD_SWIN.items() if key != "img_size"}
    adapted, notes = adapt_network(config, "1.5.1")
    assert (adapted, notes) == (config, [])
    network = golden.prepare(ConfigParser({"network_def": adapted}).get_parsed_content("network_def"))
    with torch.no_grad():
        golden.check_output("y", network(golden.input()))


@pytest.mark.parametrize(
    ("version", "downsample", "legacy"),
    [
        ("0.9.1", None, True),
        ("1.4.0", None, True),
        ("1.4.0", "merging", True),
        ("1.4.0", "mergingv2", False),
        ("1.5.0", None, False),
        ("1.5rc1", None, False),
        ("1.10.0", None, False),
        ("", None, True),  # a bundle that does not say is an old one
    ],
)
def test_which_swin_unetr_gets_the_old_order(version, downsample, legacy):
    config = {"_target_": "monai.networks.nets.SwinUNETR"} | ({"downsample": downsample} if downsample else {})
    adapted, notes = adapt_network(config, version)
    assert isinstance(adapted.get("downsample"), type) == legacy == bool(notes)


@pytest.mark.parametrize("name", ["UNETR", "ViT", "ViTAutoEnc"])
def test_renamed_arguments(name):
    config = {"_target_": name, "img_size": [32, 32, 32], "pos_embed": "perceptron"}
    adapted, notes = adapt_network(config, "1.0.0")
    assert adapted == {"_target_": name, "img_size": [32, 32, 32], "proj_type": "perceptron"}
    assert notes == [f"{name}: the argument pos_embed is now called proj_type"]
    assert "pos_embed" in config  # the caller's config stays as it was


def test_other_networks_are_left_alone():
    config = {"_target_": "UNet", "spatial_dims": 3, "img_size": 3}
    assert adapt_network(config, "0.8.0") == (config, [])


def test_legacy_merging_of_odd_sizes_and_of_images():
    from monai.networks.nets.swin_unetr import PatchMerging

    torch.manual_seed(0)
    merging = legacy_merging()(dim=3)
    assert merging(torch.randn(1, 5, 3, 2, 3)).shape == (1, 3, 2, 1, 6)
    old, new = legacy_merging()(dim=3, spatial_dims=2), PatchMerging(dim=3, spatial_dims=2)
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 5, 4, 3)
    torch.testing.assert_close(old(x), new(x), rtol=0, atol=0)


def test_a_network_adapted_twice_is_the_same():
    adapted, _ = adapt_network(OLD_SWIN | {"img_size": [64, 64, 32]}, "1.3.0")
    again, notes = adapt_network(adapted, "1.3.0")
    assert again == adapted and notes == []
    assert isinstance(SwinUNETR(1, 2, feature_size=12, downsample=adapted["downsample"]), torch.nn.Module)
