"""The full-size networks and the key lists of every release, by name and shape alone: no memory, no values."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from monai.networks import nets

from medseg3d.checkpoints.comparison import align, compare
from medseg3d.checkpoints.report import CheckpointReport
from medseg3d.networks.backbones.vit import ViT, ViTAutoEnc
from medseg3d.networks.ssl_head import SSLHead
from medseg3d.networks.swin_unetr import SwinUNETR
from medseg3d.networks.unetr import UNETR
from medseg3d.networks.vnet import VNet

BTCV = {"in_channels": 1, "out_channels": 14}
SPLEEN = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2, "norm": "batch"}
NETWORKS = {
    "SSLHead_f48": lambda: SSLHead(feature_size=48),
    "SwinUNETR_brats_f48": lambda: SwinUNETR(in_channels=4, out_channels=3, feature_size=48),
    "SwinUNETR_btcv_f48": lambda: SwinUNETR(**BTCV, feature_size=48),
    "SwinUNETR_f48_v2": lambda: SwinUNETR(**BTCV, feature_size=48, use_v2=True),
    "UNETR_btcv": lambda: UNETR(**BTCV, img_size=96),
    "UNETR_btcv_perceptron": lambda: UNETR(**BTCV, img_size=96, proj_type="perceptron"),
    "UNet_spleen_bundle": lambda: nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, **SPLEEN),
    "VNet_1to2": lambda: VNet(out_channels=2),
    "ViTAutoEnc_96_16": lambda: ViTAutoEnc(in_channels=1, img_size=96, patch_size=16),
    "ViT_96_16": lambda: ViT(in_channels=1, img_size=96, patch_size=16),
}
# The classes of the release table, by the key list that they have in MONAI 1.6.1.
CLASSES = {
    "VNet": "VNet_1to2",
    "UNETR": "UNETR_btcv",
    "ViT": "ViT_96_16",
    "ViTAutoEnc": "ViTAutoEnc_96_16",
    "SwinUNETR48": "SwinUNETR_btcv_f48",
    "SwinUNETR48_v2": "SwinUNETR_f48_v2",
    "UNet_spleen": "UNet_spleen_bundle",
}
RELEASES = ("0.6.0", "0.7.0", "0.8.1", "0.9.0", "0.9.1", "1.0.1", "1.1.0", "1.2.0", "1.3.2", "1.4.0", "1.5.0")


def shapes(pairs):
    """Tensors without values; index tables of whole numbers."""
    dtypes = {True: torch.int64, False: torch.float32}
    return {key: torch.empty(shape, dtype=dtypes[key.endswith("index")], device="meta") for key, shape in pairs}


def stored(shared, name):
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in json.loads(shared("golden", "3d", "keys", f"{name}.json").read_text())
    }


@functools.cache
def state_of(name):
    return {key: tensor.to("meta") for key, tensor in NETWORKS[name]().state_dict().items()}


def compared(tensors, name):
    report = CheckpointReport("the list", name)
    compare(align(tensors, state_of(name)), report, None, ())
    return report


@pytest.mark.parametrize("name", NETWORKS)
def test_every_key_of_monai_1_6_has_its_place(shared, name):
    tensors = stored(shared, name)
    report = compared(tensors, name)
    assert sorted(report.matched) == sorted(tensors)
    assert report.complete and report.used == 1
    assert not (report.missing or report.left_over or report.mismatched or report.renamed)


@pytest.mark.parametrize("release", RELEASES)
def test_every_key_of_older_releases_has_its_place_or_a_reason(shared, release):
    differences = json.loads(shared("golden", "3d", "keys", "release_key_differences.json").read_text())[release]
    assert differences.keys() <= CLASSES.keys()
    for name, difference in differences.items():
        gone, new = shapes(difference["not_in_1.6.1"]), {key for key, _ in difference["new_in_1.6.1"]}
        assert not difference["shape_changed"]
        tensors = {key: value for key, value in stored(shared, CLASSES[name]).items() if key not in new} | gone
        assert len(tensors) == difference["n_state"]
        report = compared(tensors, CLASSES[name])
        assert report.complete and report.used == 1 and not report.problems(), (name, str(report))
        assert (report.left_over.keys(), report.missing.keys()) == (gone.keys(), new), name


def test_the_public_swin_encoder_goes_where_its_map_says(shared):
    pairs = json.loads(shared("golden", "3d", "keys", "map_model_swinvit_to_swinunetr.json").read_text())
    report = compared(shapes((key, shape) for key, _, shape in pairs), "SwinUNETR_btcv_f48")
    assert sorted(report.renamed) == sorted((file, network) for file, network, _ in pairs)
    assert (report.scope, report.scope_share, report.used) == ("swinViT.", 1, 1)


def test_the_disruptive_autoencoder_goes_where_its_map_says(shared):
    pairs = json.loads(shared("golden", "3d", "keys", "map_disruptive_autoencoder_examples.json").read_text())
    network = stored(shared, "SwinUNETR_btcv_f48")
    tensors = {file: network[target or "out.conv.conv.weight"] for file, target in pairs}
    report = compared(tensors, "SwinUNETR_btcv_f48")
    assert sorted(report.renamed) == sorted((file, target) for file, target in pairs if target)
    assert report.left_over.keys() == {file for file, target in pairs if not target}
    assert all(report.left_over.values())


def test_the_public_perceptron_unetr(shared):
    """By the release it came from: without norm_cross_attn, with a class token and unused shortcuts."""
    tensors = {k: v for k, v in stored(shared, "UNETR_btcv_perceptron").items() if "norm_cross_attn" not in k}
    extras = json.loads(shared("golden", "3d", "keys", "release_key_differences.json").read_text())["0.8.1"]["UNETR"]
    report = compared(tensors | shapes(extras["not_in_1.6.1"]), "UNETR_btcv_perceptron")
    assert report.complete and report.used == 1 and not report.problems()
    assert len(report.left_over) == 4
