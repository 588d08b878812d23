"""Files of classifiers, of FCN and of torchvision's FCN into the networks here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.checkpoints import CheckpointMismatch, load_checkpoint
from medseg3d.checkpoints.comparison import align, compare
from medseg3d.checkpoints.report import CheckpointReport
from medseg3d.networks.backbones.alexnet import CaffeNet
from medseg3d.networks.backbones.vgg import VGG16, make_layers
from medseg3d.networks.deconvnet import DeconvNet
from medseg3d.networks.fcn import FCN
from medseg3d.networks.fcn_resnet import FCNResNet, fcn_resnet50, fcn_resnet101
from tests.checkpoints.conftest import assert_same, copy_of, filled
from tests.checkpoints.test_public_2d import layout, tensors_of

NARROW = {"width": 1 / 32, "out_channels": 3}


def report_of(network, tensors, skip=()):
    """What would become of a file's tensors."""
    report = CheckpointReport("file.pth", type(network).__name__)
    compare(align(tensors, network.state_dict()), report, None, skip)
    return report


CLASSIFIERS = {
    "torchvision_vgg16": "vgg16",
    "torchvision_vgg16_bn": "vgg16_bn",
    "torchvision_alexnet": "torchvision_alexnet",
    "torchvision_googlenet": "torchvision_googlenet",
}


@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_layer_of_a_public_classifier_but_the_last_has_its_place(name, stride, shared):
    with torch.device("meta"):
        network = FCN(backbone=CLASSIFIERS[name], stride=stride)
    report = report_of(network, tensors_of(layout(shared, name), "meta"))
    assert report.scope_share == 1 and report.used == 1 and not report.problems() and not report.complete
    assert {key.partition("_")[0] for key in report.skipped} == {"score"}
    assert all(key.startswith("upscore") for key in report.missing)
    assert {key.partition(".")[0] for key in report.left_over} <= {"classifier", "fc", "aux1", "aux2"}


def test_caffenet_s_layers_have_their_places():
    with torch.device("meta"):
        network, state = FCN(backbone="alexnet"), CaffeNet().state_dict()
    report = report_of(network, state)
    assert report.scope_share == 1 and not report.problems()
    assert ("classifier.fc6.weight", "fc6.weight") in report.renamed
    assert sorted(report.left_over) == ["classifier.fc8.bias", "classifier.fc8.weight"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_classifier_made_convolutional_gives_its_answers(batch_norm, write):
    widths = [[width // 32 for width in stage] for stage in VGG16]
    layers = [nn.Linear(16 * 49, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Dropout()]
    classifier = nn.ModuleDict(
        {"features": make_layers(widths, batch_norm), "classifier": nn.Sequential(*layers, nn.Linear(128, 10))}
    )
    filled(classifier)
    network = FCN(backbone="vgg16_bn" if batch_norm else "vgg16", stride=16, **NARROW).eval()
    before = copy_of(network)
    report = load_checkpoint(network, write(classifier.state_dict(), "vgg.pth"))
    assert report.scope_share == report.used == 1 and not report.complete
    assert report.skipped == ["score_fr.weight", "score_fr.bias", "score_pool4.weight", "score_pool4.bias"]
    assert any("they are to be trained" in note for note in report.notes)
    after = network.state_dict()
    assert_same(
        {key: after[key] for key in after if "score" in key}, {key: before[key] for key in before if "score" in key}
    )
    network.conv1_1.padding = (1, 1)  # as the classifier has it
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = classifier["classifier"][:-2](classifier["features"](x).flatten(1))
        for name in network.trunk_layers:
            x = network.get_submodule(name)(x)
    assert expected.std() > 0
    torch.testing.assert_close(x[:, :, 0, 0], expected, rtol=1e-4, atol=1e-5)


PYTORCH_FCN = {
    "fcn32s": ({"stride": 32}, ("upscore",)),
    "fcn16s": ({"stride": 16}, ("score_pool4", "upscore2", "upscore16")),
    "fcn8s": ({"stride": 8}, ("score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4")),
    "fcn8s-atonce": (
        {"stride": 8, "at_once": True},
        ("score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4"),
    ),
}


@pytest.mark.parametrize("name", PYTORCH_FCN)
def test_files_of_pytorch_fcn_fill_the_published_nets(name, write):
    arguments, added = PYTORCH_FCN[name]
    source = filled(FCN(**arguments, **NARROW))
    state = source.state_dict()
    trunk = [f"conv{s}_{i}" for s, stage in enumerate(VGG16, 1) for i in range(1, len(stage) + 1)]
    keys = [f"{layer}.{kind}" for layer in (*trunk, "fc6", "fc7", "score_fr") for kind in ("weight", "bias")]
    for layer in added:
        keys += [f"{layer}.weight"] + [f"{layer}.bias"] * layer.startswith("score")
    network = FCN(**arguments, **NARROW)
    network.load_state_dict({key: state[key] for key in keys}, strict=True)
    network = FCN(**arguments, **NARROW)
    report = load_checkpoint(network, write({key: state[key] for key in keys}, f"{name}_from_caffe.pth"))
    assert report.complete and report.used == 1
    assert not report.missing and not report.left_over and not report.renamed
    assert_same(network.state_dict(), state)


def test_a_coarser_net_s_file_goes_into_a_finer_one_if_its_new_scores_are_skipped(write):
    path = write(filled(FCN(stride=32, **NARROW)).state_dict())
    network = FCN(stride=16, **NARROW)
    with pytest.raises(CheckpointMismatch, match="score_pool4"):
        load_checkpoint(network, path)
    report = load_checkpoint(network, path, skip=["score_pool4."])
    assert report.scope_share == 1 and not network.score_pool4.weight.any()
    assert {"upscore2.weight", "upscore16.weight"} == report.missing.keys()
    assert report.left_over.keys() == {"upscore.weight"}


def test_another_number_of_classes(write):
    path = write(filled(FCN(width=1 / 32, out_channels=21, stride=8)).state_dict())
    network = FCN(stride=8, **NARROW)
    with pytest.raises(CheckpointMismatch, match="another number of classes: to train new scores pass skip="):
        load_checkpoint(network, path)
    assert load_checkpoint(network, path, skip=["score_", "upscore"]).scope_share == 1


def test_another_backbone_s_file_is_refused(shared):
    with torch.device("meta"):
        network = FCN(backbone="alexnet")  # CaffeNet, whose widths are others than torchvision's
    report = report_of(network, tensors_of(layout(shared, "torchvision_alexnet"), "meta"))
    assert report.problems() and report.scope_share < 1


@pytest.mark.parametrize("name", ["torchvision_vgg16", "torchvision_vgg16_bn"])
def test_deconvnet_s_convolutions_start_from_vgg(name, shared):
    with torch.device("meta"):
        network = DeconvNet()
    skip = ["fc6-deconv", "deconv", "debn", "seg-score-voc", "bnfc", "bn"][: 5 if name.endswith("bn") else 6]
    report = report_of(network, tensors_of(layout(shared, name), "meta"), skip)
    assert report.scope_share == report.used == 1 and not report.problems()
    assert {"conv5_3.weight", "fc6.weight", "fc7.bias"} <= set(report.matched)


@pytest.mark.parametrize(("depth", "build"), [(50, fcn_resnet50), (101, fcn_resnet101)])
def test_torchvision_s_fcn(depth, build, shared):
    listed = layout(shared, f"torchvision_fcn_resnet{depth}_coco_voc")
    with torch.device("meta"):
        whole, without = build(aux_loss=True), build()
    tensors = tensors_of(listed, "meta")
    assert {key: list(x.shape) for key, x in whole.state_dict().items()} == dict(listed["tensors"])
    report = report_of(whole, tensors)
    assert report.complete and report.used == 1 and not report.missing and not report.left_over
    report = report_of(without, tensors)
    assert report.complete and report.used == 1 and all(key.startswith("aux_") for key in report.left_over)


def test_a_resnet_s_file_fills_the_backbone(shared):
    with torch.device("meta"):
        network = FCNResNet()
    report = report_of(network, tensors_of(layout(shared, "torchvision_resnet50"), "meta"))
    assert report.scope == "backbone." and report.scope_share == report.used == 1
    assert sorted(report.left_over) == ["fc.bias", "fc.weight"]
