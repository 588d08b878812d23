"""Public files of detectors: the names of 2021 and of now, ImageNet's ResNets, other classes."""

from __future__ import annotations

import json

import pytest
import torch

from medseg3d.checkpoints import CheckpointMismatch, load_checkpoint
from medseg3d.checkpoints.comparison import align, compare
from medseg3d.checkpoints.report import CheckpointReport
from medseg3d.networks import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from medseg3d.networks.backbones.resnet import FrozenBatchNorm2d, resnet18
from tests.checkpoints.conftest import assert_same, copy_of, filled

PUBLIC = {
    "torchvision_maskrcnn_resnet50_fpn_coco": maskrcnn_resnet50_fpn,
    "torchvision_maskrcnn_resnet50_fpn_coco_file_names": maskrcnn_resnet50_fpn,
    "torchvision_maskrcnn_resnet50_fpn_v2_coco": maskrcnn_resnet50_fpn_v2,
}
SMALL = {"fpn_channels": 8, "box_features": 16, "mask_channels": 8}


def tensors_of(shared, name, device):
    tensors = json.loads(shared("golden", "2d", "layouts", f"{name}.json").read_text())["tensors"]
    dtypes = {True: torch.int64, False: torch.float32}
    return {k: torch.zeros(s, dtype=dtypes[k.endswith("num_batches_tracked")], device=device) for k, s in tensors}


def small(**arguments):
    return MaskRCNN("resnet18", **{"num_classes": 3, **SMALL, **arguments})


def old_names(state):
    """torchvision's names of 2021 for a state_dict of now, without norms beside the backbone's."""
    names = {}
    for key in state:
        old = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if "fpn." in key:
            old = old.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        for i in range(4):
            old = old.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        names[key] = old
    return {names[key]: value for key, value in state.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_key_has_its_place(shared, name):
    with torch.device("meta"):
        network = PUBLIC[name]()
    report = CheckpointReport(name, "MaskRCNN")
    compare(align(tensors_of(shared, name, "meta"), network.state_dict()), report, None, ())
    assert report.complete and report.used == 1 and not report.problems()
    assert not report.missing and not report.left_over
    assert len(report.renamed) == (26 if name.endswith("file_names") else 0)


def test_a_file_with_the_keys_of_the_public_one(shared, write):
    network = maskrcnn_resnet50_fpn()
    values = tensors_of(shared, "torchvision_maskrcnn_resnet50_fpn_coco_file_names", "cpu")
    report = load_checkpoint(network, write(values, "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"))
    assert report.complete and not report.missing and not report.left_over
    assert not any(value.any() for value in network.state_dict().values())


def test_values_come_where_they_belong_whatever_the_names():
    source = filled(small(norm_layer=FrozenBatchNorm2d))
    wanted = copy_of(source)
    old = old_names(wanted)
    assert len(old.keys() - wanted.keys()) == 26
    by_loader, by_torch = small(norm_layer=FrozenBatchNorm2d), small(norm_layer=FrozenBatchNorm2d)
    load_checkpoint(by_loader, old)
    by_torch.load_state_dict(old)
    assert_same(copy_of(by_loader), wanted)
    assert_same(copy_of(by_torch), wanted)


@pytest.mark.parametrize("norm_layer", [torch.nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_classifier_fills_the_backbone(norm_layer):
    classifier, network = filled(resnet18()), small(norm_layer=norm_layer)
    before = copy_of(network)
    report = load_checkpoint(network, classifier.state_dict())
    assert report.scope == "backbone.body." and not report.complete
    trunk = {
        k: v for k, v in copy_of(classifier).items() if not k.startswith("fc.") and k in copy_of(network.backbone.body)
    }
    assert len(trunk) >= 100
    assert_same(copy_of(network.backbone.body), trunk)
    rest = {k for k in before if not k.startswith("backbone.body.")}
    assert_same({k: v for k, v in copy_of(network).items() if k in rest}, {k: before[k] for k in rest})


def test_another_number_of_classes():
    source, network = filled(small()), small(num_classes=5)
    with pytest.raises(
        CheckpointMismatch, match=r"pass skip=\('roi_heads.box_predictor.', 'roi_heads.mask_pred"
    ) as error:
        load_checkpoint(network, source.state_dict())
    heads = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    assert str(heads) in str(error.value)
    report = load_checkpoint(network, source.state_dict(), skip=heads)
    assert len(report.skipped) == 6
    torch.testing.assert_close(network.backbone.state_dict(), source.backbone.state_dict())
