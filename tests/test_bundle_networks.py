"""The networks of bundles: ours in place of MONAI's with the same labels, and patches merged as the weights need it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks import nets

from medseg3d import load_model, networks
from medseg3d.checkpoints import save_checkpoint
from medseg3d.checkpoints.merging import order_of
from tests import tiny_bundles as tiny
from tests.parity.golden import GoldenModel, fill

OWN_IS_USED = "{}: medseg3d's own network is used, which takes the same weights"
SWIN = {"_target_": "SwinUNETR", "in_channels": 1, "out_channels": 3, "feature_size": 12}
MERGED_AS = "SwinUNETR: its weights are of MONAI {}, whose patch merging took the neighbours in another order than"


def filled(network):
    fill(network, seed=3)
    return network


def load(path):
    return load_model(path, "cpu", trust=True, precision="fp32")


def labels(model, scan):
    return model.predict(scan).segmentation.array


def swin_bundle(folder, network_def, version, weights=None, roi_size=(64, 32, 32)):
    """A bundle with the config given; its weights are a state_dict of MONAI, which records no order, or `weights`."""
    state = filled(nets.SwinUNETR(1, 3, feature_size=12)).state_dict() if weights is None else None
    tiny.write_bundle(folder, tiny.zoo_config(network_def, roi_size), state, monai_version=version)
    if weights is not None:
        save_checkpoint(weights, folder / "models" / "model.pt")
    return folder


@pytest.mark.parametrize(
    "network",
    [
        SWIN,
        {"_target_": "VNet", "in_channels": 1, "out_channels": 3},
        {
            "_target_": "UNETR",
            "in_channels": 1,
            "out_channels": 3,
            "img_size": [64, 32, 32],
            "feature_size": 4,
            "hidden_size": 24,
            "mlp_dim": 24,
            "num_heads": 2,
        },
    ],
    ids=lambda network: network["_target_"],
)
def test_ours_stands_in_for_monais_and_gives_its_labels(network, ct_file, tmp_path):
    name = network["_target_"]
    arguments = {key: value for key, value in network.items() if key != "_target_"}
    state = filled(getattr(nets, name)(**arguments)).state_dict()
    config = tiny.zoo_config(network, roi_size=(64, 32, 32))
    model = load(tiny.write_bundle(tmp_path / "named", config, state))
    assert type(model.network) is getattr(networks, name) and model.notes == (OWN_IS_USED.format(name),)
    config["network_def"]["_target_"] = f"$vars(monai.networks.nets)['{name}']"  # which is no name
    config["imports"].append("$import monai")
    reference = load(tiny.write_bundle(tmp_path / "computed", config, state))
    assert type(reference.network) is getattr(nets, name) and reference.notes == ()
    expected = labels(reference, ct_file)
    assert (np.bincount(expected.ravel(), minlength=3) > 100).all()
    assert np.count_nonzero(labels(model, ct_file) != expected) <= 3  # where two classes are level


def test_swin_unetr_of_monai_1_3(shared, tmp_path):
    """A zoo bundle with img_size, from its config to the numbers of MONAI 1.3 for the whole network."""
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_legacy")
    network = {"_target_": "SwinUNETR", "img_size": [64, 64, 32], "in_channels": 1, "out_channels": 2}
    config = tiny.zoo_config(network | {"feature_size": 12}, roi_size=(64, 64, 32))
    state = golden.prepare(nets.SwinUNETR(1, 2, feature_size=12)).state_dict()
    folder = tiny.write_bundle(tmp_path / "swin_unetr", config, state, ("background", "spleen"), monai_version="1.3.0")
    model = load(folder)
    assert type(model.network) is networks.SwinUNETR and model.network.merging_order == "legacy"
    dropped, order, own = model.notes
    assert "dropped the argument img_size=[64, 64, 32]" in dropped and order.startswith(MERGED_AS.format("1.3.0"))
    assert own == OWN_IS_USED.format("SwinUNETR")
    with torch.no_grad():
        golden.check_output("y", model.network(golden.input()))
    assert labels(model, (tiny.ct()[:16, :16, :12], tiny.LPS)).shape == (16, 16, 12)


def test_monais_swin_unetr_stays_where_ours_lacks_an_argument(ct_file, tmp_path):
    """With the old order all the same, and so with the labels of ours."""
    ours = load(swin_bundle(tmp_path / "ours", SWIN, "1.3.0"))
    theirs = load(swin_bundle(tmp_path / "theirs", SWIN | {"norm_layer": "$torch.nn.LayerNorm"}, "1.3.0"))
    assert type(ours.network) is networks.SwinUNETR and type(theirs.network) is nets.SwinUNETR
    (note,) = theirs.notes
    assert note.startswith(MERGED_AS.format("1.3.0"))
    expected = labels(theirs, ct_file)
    assert np.count_nonzero(labels(ours, ct_file) != expected) <= 3
    of_today = labels(load(swin_bundle(tmp_path / "today", SWIN, "1.6.1")), ct_file)
    assert np.count_nonzero(of_today != expected) > 1000  # so that the order matters here


def test_monais_network_is_used_where_ours_refuses_a_value(tmp_path):
    arguments = {"in_channels": 1, "out_channels": 3, "act": "mish"}
    state = filled(nets.VNet(**arguments)).state_dict()
    model = load(tiny.write_bundle(tmp_path / "b", tiny.zoo_config({"_target_": "VNet", **arguments}), state))
    (note,) = model.notes
    assert note.startswith("MONAI's network is used; medseg3d's own cannot be: activation must be one of")
    assert type(model.network) is nets.VNet


def test_unetr_with_pos_embed(ct_file, tmp_path):
    arguments = {"in_channels": 1, "out_channels": 3, "img_size": [16, 16, 16], "feature_size": 4}
    arguments |= {"hidden_size": 24, "mlp_dim": 24, "num_heads": 2}
    today = filled(nets.UNETR(**arguments, proj_type="perceptron")).eval()
    config = tiny.zoo_config({"_target_": "UNETR", **arguments, "pos_embed": "perceptron"}, roi_size=(16, 16, 16))
    model = load(tiny.write_bundle(tmp_path / "unetr", config, today.state_dict(), monai_version="1.0.0"))
    assert model.notes == ("UNETR: the argument pos_embed is now called proj_type", OWN_IS_USED.format("UNETR"))
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.network(x), today(x), rtol=0, atol=1e-4)
    labels(model, ct_file)


# The order of patch merging


OURS = SWIN | {"_target_": "medseg3d.networks.SwinUNETR"}
RECORDED = 'patch merging order "{}": as the file records'
WITH_ANOTHER = "mean the order {!r}, but the weights were saved with another, which is used"


@pytest.mark.parametrize("downsample", ["legacy", "merging", "mergingv2"])
def test_a_bundle_of_our_class_is_taken_at_its_word(downsample, tmp_path):
    model = load(swin_bundle(tmp_path / "b", OURS | {"downsample": downsample}, "1.3.0"))
    assert model.network.merging_order == downsample and model.notes == ()


@pytest.mark.parametrize(
    ("network_def", "version", "recorded", "meant"),
    [
        (SWIN, "1.3.0", "merging", "legacy"),
        (SWIN, "1.6.1", "legacy", "merging"),
        (SWIN | {"norm_layer": "$torch.nn.LayerNorm"}, "1.3.0", "merging", "legacy"),
        (OURS | {"downsample": "mergingv2"}, "1.6.1", "legacy", "mergingv2"),
        (SWIN, "1.3.0", "legacy", None),
        (OURS, "1.6.1", "merging", None),
    ],
)
def test_what_the_weights_record_decides(network_def, version, recorded, meant, tmp_path):
    weights = filled(networks.SwinUNETR(1, 3, feature_size=12, downsample=recorded))
    model = load(swin_bundle(tmp_path / "b", network_def, version, weights))
    assert order_of(model.network) == recorded
    assert RECORDED.format(recorded) in model.notes
    contrary = [note for note in model.notes if "saved with another" in note]
    assert [WITH_ANOTHER.format(meant) in note for note in contrary] == [True] * (meant is not None)


def test_monais_own_merging_is_refused_where_the_weights_need_another(tmp_path):
    weights = filled(networks.SwinUNETR(1, 3, feature_size=12, downsample="legacy"))
    network_def = SWIN | {"norm_layer": "$torch.nn.LayerNorm"}
    with pytest.raises(
        ValueError, match=r"weights of b do not fit its SwinUNETR: .*would give wrong results"
    ) as caught:
        load(swin_bundle(tmp_path / "b", network_def, "1.6.1", weights))
    assert "\n" not in str(caught.value)


def test_a_merging_of_the_bundles_own_runs_as_it_is(tmp_path):
    scripts = tmp_path / "b" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "__init__.py").write_text("")
    (scripts / "merging.py").write_text(
        "from monai.networks.nets.swin_unetr import PatchMerging\nclass Mine(PatchMerging):\n    pass\n"
    )
    network_def = SWIN | {"downsample": "$Mine"}
    config = tiny.zoo_config(network_def)
    config["imports"].append("$from scripts.merging import Mine")
    state = filled(nets.SwinUNETR(1, 3, feature_size=12)).state_dict()
    model = load(tiny.write_bundle(tmp_path / "b", config, state, monai_version="1.3.0"))
    assert type(model.network) is nets.SwinUNETR
    (note,) = model.notes
    assert "medseg3d's own cannot be: the order of patch merging must be one of legacy, merging" in note
