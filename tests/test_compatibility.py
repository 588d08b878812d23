"""Which class the name of a network in a bundle stands for, and configs from older releases of MONAI."""

from __future__ import annotations

import functools

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks import nets

from medseg3d import networks
from medseg3d.compatibility import adapt_network, legacy_merging
from tests.parity.golden import GoldenModel, fill

OLD_SWIN = {
    "_target_": "SwinUNETR",
    "spatial_dims": 3,
    "img_size": "@patch_size",
    "in_channels": 1,
    "out_channels": 2,
    "feature_size": 12,
    "use_checkpoint": True,
}
SWIN = {key: value for key, value in OLD_SWIN.items() if key != "img_size"}
OWN_IS_USED = "{}: medseg3d's own network is used, which takes the same weights"


def built(config):
    return ConfigParser({"network_def": config, "patch_size": [64, 64, 32]}).get_parsed_content("network_def")


@pytest.mark.parametrize("prefer_own", [True, False])
def test_swin_unetr_of_old(shared, prefer_own):
    """The whole network with the weights and the output of MONAI 1.4 and before, in our class and in MONAI's."""
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_legacy")
    adapted, notes = adapt_network(OLD_SWIN, "1.3.0", prefer_own)
    assert "img_size=@patch_size" in notes[0] and "MONAI 1.3.0" in notes[1]
    assert notes[2:] == [OWN_IS_USED.format("SwinUNETR")] * prefer_own
    network = golden.prepare(built(adapted))
    assert type(network) is (networks.SwinUNETR if prefer_own else nets.SwinUNETR)
    with torch.no_grad():
        golden.check_output("y", network(golden.input()))


@pytest.mark.parametrize("prefer_own", [True, False])
def test_swin_unetr_of_today(shared, prefer_own):
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_merging")
    adapted, notes = adapt_network(SWIN, "1.5.1", prefer_own)
    assert notes == [OWN_IS_USED.format("SwinUNETR")] * prefer_own
    assert adapted == (SWIN | {"_target_": "medseg3d.networks.SwinUNETR"} if prefer_own else SWIN)
    network = golden.prepare(built(adapted))
    with torch.no_grad():
        golden.check_output("y", network(golden.input()))


# Which class


SMALL = {
    "SwinUNETR": ({"in_channels": 1, "out_channels": 2, "feature_size": 12, "use_v2": True}, (1, 1, 64, 32, 32)),
    "UNETR": (
        {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": [32, 32, 16],
            "feature_size": 4,
            "hidden_size": 24,
            "mlp_dim": 24,
            "num_heads": 2,
            "norm_name": "batch",
        },
        (1, 1, 32, 32, 16),
    ),
    "VNet": ({"in_channels": 1, "out_channels": 2, "act": "prelu", "bias": True}, (1, 1, 32, 16, 16)),
}
MODULES = {"SwinUNETR": "swin_unetr", "UNETR": "unetr", "VNet": "vnet"}


@pytest.mark.parametrize("spelling", ["{0}", "monai.networks.nets.{0}", "monai.networks.nets.{1}.{0}"])
@pytest.mark.parametrize("name", SMALL)
def test_our_class_stands_in_for_monais(name, spelling):
    arguments, shape = SMALL[name]
    config = {"_target_": spelling.format(name, MODULES[name]), "_desc_": "whatever", **arguments}
    adapted, notes = adapt_network(config, "1.6.1")
    assert adapted == config | {"_target_": f"medseg3d.networks.{name}"}
    assert notes == [OWN_IS_USED.format(name)]
    ours, theirs = built(adapted).eval(), built(config).eval()
    assert type(ours) is getattr(networks, name) and type(theirs) is getattr(nets, name)
    fill(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_an_expression_that_names_the_class():
    adapted, _ = adapt_network({"_target_": "$monai.networks.nets.VNet", "out_channels": 2}, "1.6.1")
    assert adapted == {"_target_": "medseg3d.networks.VNet", "out_channels": 2}


@pytest.mark.parametrize(
    "target",
    [
        "medseg3d.networks.SwinUNETR",
        "medseg3d.networks.swin_unetr.SwinUNETR",
        "scripts.networks.SwinUNETR",
        "monai.apps.SwinUNETR",
        "my_monai.networks.nets.SwinUNETR",
        "$SwinUNETR",
        "$@network_class",
        "UNet",
    ],
)
def test_classes_of_others_are_left_alone(target):
    config = SWIN | {"_target_": target, "img_size": 96, "pos_embed": "perceptron"}
    assert adapt_network(config, "1.3.0") == (config, [])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("use_hyena", False), ("hyena_kernel_size", 3), ("norm_layer", "$torch.nn.LayerNorm"), ("no_such", 1)],
)
def test_an_argument_that_ours_lacks_keeps_monais_class(argument, value):
    config = SWIN | {argument: value}
    assert adapt_network(config, "1.6.1") == (config, [])
    adapted, notes = adapt_network(config, "1.3.0")
    assert adapted == config | {"downsample": legacy_merging} and len(notes) == 1


# Configs of old


@pytest.mark.parametrize(
    ("version", "downsample", "order"),
    [
        ("0.9.1", None, "legacy"),
        ("1.4.0", None, "legacy"),
        ("1.4.0", "merging", "legacy"),
        ("1.4.0", "mergingv2", "mergingv2"),
        ("1.5.0", None, "merging"),
        ("1.5rc1", None, "merging"),
        ("1.10.0", None, "merging"),
        ("", None, "legacy"),  # a bundle that does not say is an old one
    ],
)
def test_which_swin_unetr_gets_the_old_order(version, downsample, order):
    config = SWIN | {"_target_": "monai.networks.nets.SwinUNETR"} | ({"downsample": downsample} if downsample else {})
    adapted, notes = adapt_network(config, version)
    assert built(adapted).merging_order == order
    assert any("that order is used" in note for note in notes) == (order == "legacy")
    adapted, _ = adapt_network(config, version, prefer_own=False)
    assert (adapted.get("downsample") is legacy_merging) == (order == "legacy")


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_legacy_merging_has_the_norm_that_monai_hands_it(spatial_dims):
    merging = legacy_merging(
        dim=3, norm_layer=functools.partial(torch.nn.LayerNorm, eps=0.5), spatial_dims=spatial_dims
    )
    assert merging.norm.eps == 0.5 and merging.order == "legacy"
    assert merging(torch.randn(1, *[5] * spatial_dims, 3)).shape == (1, *[3] * spatial_dims, 6)


@pytest.mark.parametrize("name", ["UNETR", "ViT", "ViTAutoEnc"])
def test_renamed_arguments(name):
    config = {"_target_": name, "img_size": [32, 32, 32], "pos_embed": "perceptron"}
    adapted, notes = adapt_network(config, "1.0.0", prefer_own=False)
    assert adapted == {"_target_": name, "img_size": [32, 32, 32], "proj_type": "perceptron"}
    assert notes == [f"{name}: the argument pos_embed is now called proj_type"]
    assert "pos_embed" in config  # the caller's config stays as it was
    target = "medseg3d.networks.UNETR" if name == "UNETR" else name
    assert adapt_network(config, "1.0.0")[0] == adapted | {"_target_": target}


@pytest.mark.parametrize("prefer_own", [True, False])
def test_a_network_adapted_twice_is_the_same(prefer_own):
    adapted, _ = adapt_network(OLD_SWIN | {"img_size": [64, 64, 32]}, "1.3.0", prefer_own)
    again, notes = adapt_network(adapted, "1.3.0", prefer_own)
    assert again == adapted and notes == []
