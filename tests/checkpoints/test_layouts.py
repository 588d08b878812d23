"""Files in every layout that public codes write give the networks here the values that they hold."""

from __future__ import annotations

import json

import pytest
import torch
from monai.networks import nets

from medseg3d.checkpoints import load_checkpoint
from medseg3d.networks.backbones.swin import SwinTransformer
from medseg3d.networks.backbones.vit import ViT, ViTAutoEnc
from medseg3d.networks.ssl_head import SSLHead
from medseg3d.networks.vnet import VNet
from tests.checkpoints.conftest import SMALL_UNETR, SMALL_VIT, assert_same, copy_of, filled, swin, unetr

HEADS = ("rotation_head.", "contrastive_head.", "conv.")


def monai_swin(**arguments):
    return filled(nets.SwinUNETR(**{"in_channels": 1, "out_channels": 2, "feature_size": 12, **arguments}))


def encoder_of(state):
    return {key.removeprefix("swinViT."): value for key, value in state.items() if key.startswith("swinViT.")}


def bare_encoder():
    return SwinTransformer(1, 12, 7, 2, (2, 2, 2, 2), (3, 6, 12, 24))


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.module.", "net.model."]
)
@pytest.mark.parametrize("entry", [None, "state_dict", "model", "net", "weights"])
def test_wrappers_holders_and_containers(write, prefix, entry):
    source = filled(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2)))
    state = {prefix + key: value for key, value in source.state_dict().items()}
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2))
    content = (
        state if entry is None else {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}, entry: state}
    )
    report = load_checkpoint(network, write(content))
    assert_same(network.state_dict(), source.state_dict())
    assert report.complete and report.used == 1
    assert report.renamed == [(prefix + key, key) for key in source.state_dict() if prefix]


def test_names_of_a_wrapped_network_match_too(write):
    source = filled(swin())
    wrapped = torch.nn.ModuleDict({"net": swin()})
    report = load_checkpoint(wrapped, write(source.state_dict()), merging_order="merging")
    assert_same(wrapped["net"].state_dict(), source.state_dict())
    assert report.renamed[0] == ("swinViT.patch_embed.proj.weight", "net.swinViT.patch_embed.proj.weight")


def test_a_wrapper_s_part_of_a_name_stays_where_two_names_would_meet(write):
    def build():
        return torch.nn.ModuleDict(
            {"a": torch.nn.Linear(2, 2), "module": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})}
        )

    source, network = filled(build()), build()
    load_checkpoint(network, write(source.state_dict()))
    assert_same(network.state_dict(), source.state_dict())


@pytest.fixture
def ssl_state():
    """Tensors of a self-supervised run: the encoder under swinViT., and the three heads."""
    return copy_of(filled(SSLHead(feature_size=12), 11))


@pytest.fixture
def swinvit_file(write, shared, ssl_state):
    """In the layout of model_swinvit.pt: no prefix but module., fc1 and fc2, a last norm, heads."""
    pairs = json.loads(shared("golden", "3d", "keys", "map_model_swinvit_to_swinunetr.json").read_text())
    state = {file: ssl_state[network] for file, network, _ in pairs}
    state |= {"module." + key: value for key, value in ssl_state.items() if key.startswith(HEADS)}
    state |= {"module.norm.weight": torch.ones(192), "module.norm.bias": torch.ones(192)}
    return write({"epoch": 1, "state_dict": state, "optimizer": {}}, "model_swinvit.pt")


def test_model_swinvit_fills_the_encoder_of_swin_unetr(swinvit_file, ssl_state, caplog):
    network = filled(swin())
    before = copy_of(network)
    report = load_checkpoint(network, swinvit_file)
    assert_same(encoder_of(network.state_dict()), encoder_of(ssl_state))
    assert_same({**network.state_dict(), **{f"swinViT.{k}": v for k, v in encoder_of(before).items()}}, before)
    assert (report.scope, report.scope_share, report.used, len(report.matched)) == ("swinViT.", 1, 1, 126)
    encoder = sum(p.numel() for p in network.swinViT.parameters())
    assert report.share == encoder / sum(p.numel() for p in network.parameters())
    assert not report.complete and not report.problems()
    assert {"module.norm.weight", "module.rotation_head.weight", "module.conv.0.weight"} <= report.left_over.keys()
    assert all(report.left_over.values())
    assert (
        "module.layers1.0.blocks.0.mlp.fc1.weight",
        "swinViT.layers1.0.blocks.0.mlp.linear1.weight",
    ) in report.renamed
    assert network.merging_order == report.merging_order == "legacy"
    assert "take no value from the file" in caplog.text  # a network that is part random is never silent


def test_model_swinvit_fills_an_encoder_and_an_ssl_head_whole(swinvit_file, ssl_state):
    encoder, head = bare_encoder(), SSLHead(feature_size=12)
    assert load_checkpoint(encoder, swinvit_file).complete
    assert_same(encoder.state_dict(), encoder_of(ssl_state))
    assert encoder.layers1[0].downsample.order == "legacy"
    assert load_checkpoint(head, swinvit_file).complete
    assert_same(head.state_dict(), ssl_state)


@pytest.mark.parametrize("prefix", ["module.swinViT.", "module.swin_vit.", "swinViT.", "swin_vit."])
def test_own_pre_training_runs(write, ssl_state, prefix):
    file = write({"state_dict": {
        key.replace("swinViT.", prefix) if key.startswith("swinViT.") else f"{prefix.rpartition('swin')[0]}{key}": value
        for key, value in ssl_state.items()
    }})  # fmt: skip
    network, encoder, head = filled(swin()), bare_encoder(), SSLHead(feature_size=12)
    report = load_checkpoint(network, file)
    assert (report.scope, report.scope_share, report.used) == ("swinViT.", 1, 1)
    assert_same(encoder_of(network.state_dict()), encoder_of(ssl_state))
    load_checkpoint(encoder, file)
    assert_same(encoder.state_dict(), encoder_of(ssl_state))
    load_checkpoint(head, file)
    assert_same(head.state_dict(), ssl_state)


def test_disruptive_autoencoder(write, ssl_state):
    state = {}
    for key, value in encoder_of(ssl_state).items():
        stage, _, rest = key.partition(".0.")
        state["encoder." + (f"{stage}.0.0.{rest}" if stage.startswith("layers") else key)] = value
    decoder = {
        "decoder1.transp_conv.conv.weight": torch.ones(12, 12, 2, 2, 2),
        "out.conv.conv.weight": torch.ones(2, 12, 1, 1, 1),
    }
    extras = {"encoder.mask_token": torch.ones(1, 12), "encoder.norm.weight": torch.ones(192), **decoder}
    file = write({"model": {**state, **extras}})
    network, encoder = filled(swin()), bare_encoder()
    before = copy_of(network)
    report = load_checkpoint(network, file)
    assert_same(encoder_of(network.state_dict()), encoder_of(ssl_state))
    assert torch.equal(network.decoder1.transp_conv.conv.weight, before["decoder1.transp_conv.conv.weight"])
    assert torch.equal(network.out.conv.conv.weight, before["out.conv.conv.weight"])
    assert (report.scope, report.scope_share, report.used) == ("swinViT.", 1, 1)
    assert report.left_over.keys() == extras.keys() and all(report.left_over.values())
    assert load_checkpoint(encoder, file).complete
    assert_same(encoder.state_dict(), encoder_of(ssl_state))


def test_encoder_of_a_whole_swin_unetr_into_a_bare_one(write):
    source, encoder = monai_swin(use_v2=True), SwinTransformer(1, 12, 7, 2, (2, 2, 2, 2), (3, 6, 12, 24), use_v2=True)
    report = load_checkpoint(encoder, write(source.state_dict()))
    assert report.complete and report.used == 1
    assert_same(encoder.state_dict(), encoder_of(source.state_dict()))


def perceptron_file_of_monai_0_8(write):
    """UNETR_model_best_acc.pth: flat, with a class token and shortcut convolutions that were never used."""
    source = filled(nets.UNETR(**SMALL_UNETR, proj_type="perceptron"))
    state = {key: value for key, value in source.state_dict().items() if "norm_cross_attn" not in key}
    state |= {
        "vit.patch_embedding.cls_token": torch.ones(1, 1, 48),
        "encoder2.blocks.0.1.conv3.conv.weight": torch.ones(16, 16, 1, 1, 1),
        "encoder2.blocks.1.1.conv3.conv.weight": torch.ones(16, 16, 1, 1, 1),
        "encoder3.blocks.0.1.conv3.conv.weight": torch.ones(32, 32, 1, 1, 1),
    }
    return source, write(state, "UNETR_model_best_acc.pth")


def test_perceptron_unetr_of_monai_0_8(write):
    source, file = perceptron_file_of_monai_0_8(write)
    network = unetr(proj_type="perceptron")
    norms = copy_of(network.vit.blocks[0].norm_cross_attn)
    report = load_checkpoint(network, file)
    x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(x), source(x), rtol=0, atol=2e-5)
    assert report.complete and report.used == 1 and not report.problems()
    assert len(report.left_over) == 4 and all(report.left_over.values())
    assert len(report.missing) == 24 and all("norm_cross_attn" in key for key in report.missing)
    assert_same(network.vit.blocks[0].norm_cross_attn.state_dict(), norms)


def test_unused_weights_of_monai_1_4_are_left_out(write):
    source = filled(nets.UNETR(**SMALL_UNETR))
    unused = {f"vit.blocks.{i}.cross_attn.to_q.weight": torch.ones(48, 48) for i in range(12)}
    network = unetr()
    report = load_checkpoint(network, write({**source.state_dict(), **unused}))
    assert_same(network.state_dict(), source.state_dict())
    assert report.left_over.keys() == unused.keys() and all(report.left_over.values())


def test_vit_and_its_autoencoder_fill_the_encoder_of_unetr(write):
    for source in (filled(nets.ViTAutoEnc(**SMALL_VIT)), filled(nets.ViT(**SMALL_VIT, classification=True))):
        network = unetr()
        report = load_checkpoint(network, write({"state_dict": source.state_dict()}))
        assert (report.scope, report.scope_share, report.used) == ("vit.", 1, 1)
        expected = {key: value for key, value in source.state_dict().items() if key in network.vit.state_dict()}
        assert_same(network.vit.state_dict(), expected)


def test_encoder_of_unetr_into_vit_and_autoencoder(write):
    file = write(filled(nets.UNETR(**SMALL_UNETR)).state_dict())
    vit, autoencoder = ViT(**SMALL_VIT), ViTAutoEnc(**SMALL_VIT)
    assert load_checkpoint(vit, file).complete
    report = load_checkpoint(autoencoder, file, skip=("conv3d_transpose",))
    assert report.scope_share == 1 and not report.complete
    assert_same({k: v for k, v in autoencoder.state_dict().items() if "conv3d" not in k}, vit.state_dict())


def test_biases_of_vnet_in_monai_0_6_move_into_the_batch_norms(write, shared):
    differences = json.loads(shared("golden", "3d", "keys", "release_key_differences.json").read_text())
    biases = dict(differences["0.6.0"]["VNet"]["not_in_1.6.1"])
    source, network = nets.VNet(out_channels=2), VNet(out_channels=2).eval()
    for key, shape in biases.items():
        source.get_submodule(key.removesuffix(".bias")).bias = torch.nn.Parameter(torch.empty(shape))
    state = filled(source).state_dict()
    report = load_checkpoint(network, write(state))
    x = torch.randn(1, 1, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(x), source(x), rtol=0, atol=1e-4)
    assert report.complete and report.used == 1
    assert report.left_over.keys() == biases.keys() and all("running mean" in why for why in report.left_over.values())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: nets.UNETR(**SMALL_UNETR), unetr),
        (lambda: monai_swin(spatial_dims=2), lambda: swin(spatial_dims=2)),
        (lambda: monai_swin(use_v2=True, in_channels=2), lambda: swin(use_v2=True, in_channels=2)),
    ],
    ids=["unetr", "swin_2d", "swin_v2"],
)
def test_monai_s_own_files_and_networks(write, theirs, ours):
    """From MONAI's class into ours and back into another of MONAI's, which needs no attribute of ours."""
    source, network, back = filled(theirs()), ours(), theirs()
    report = load_checkpoint(network, write(source.state_dict()), merging_order="merging")
    assert report.complete and report.used == 1 and not report.renamed
    assert_same(network.state_dict(), source.state_dict())
    assert load_checkpoint(back, network.state_dict(), merging_order="merging").complete
    assert_same(back.state_dict(), source.state_dict())
