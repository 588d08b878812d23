"""AlexNet, VGG, GoogLeNet and ResNet against torchvision 0.28: the same weights, the same maps and logits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from medseg3d.networks.backbones.alexnet import AlexNet
from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from medseg3d.networks.backbones.googlenet import GoogLeNet, to_inception_range
from medseg3d.networks.backbones.resnet import FrozenBatchNorm2d, resnet50, resnet101
from medseg3d.networks.backbones.stages import IntermediateLayerGetter
from medseg3d.networks.backbones.vgg import VGG16, make_layers, vgg16, vgg16_bn
from tests.parity.golden2d import Golden2d

# Places of the stored maps among the layers.
FEATURES = {
    "alexnet": (lambda: AlexNet(10).features, {2: "pool1", 5: "pool2", 6: "conv3", 12: "pool5"}),
    "vgg16": (lambda: make_layers(VGG16), {16: "pool3", 23: "pool4", 30: "pool5"}),
    "vgg16_bn": (lambda: make_layers(VGG16, batch_norm=True), {23: "pool3", 33: "pool4", 43: "pool5"}),
}
PUBLIC = {
    "alexnet": AlexNet,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "googlenet": GoogLeNet,
    "resnet50": resnet50,
    "resnet101": resnet101,
}


def cases(golden):
    return sorted({name.partition("_")[0] for name in golden.arrays.files})


@pytest.mark.parametrize("name", FEATURES)
def test_features(shared, name):
    golden = Golden2d(shared("golden", "2d", "backbones"), name)
    build, places = FEATURES[name]
    network = golden.fill(nn.ModuleDict({"features": build()}))["features"]
    getter = IntermediateLayerGetter(network, {str(index): place for index, place in places.items()})
    for case in cases(golden):
        with torch.no_grad():
            maps = getter(golden.tensor(f"{case}_input"))
        for place, x in maps.items():
            golden.check(f"{case}_{place}", x)


def test_googlenet(shared):
    golden = Golden2d(shared("golden", "2d", "backbones"), "googlenet")
    network = golden.fill(GoogLeNet(10, transform_input=True, init_weights=False))
    places = ["maxpool2", "inception3b", "inception4a", "inception4d", "inception5b"]
    getter = IntermediateLayerGetter(network, {place: place for place in places})
    for case in cases(golden):
        x = golden.tensor(f"{case}_input")
        with torch.no_grad():
            golden.check(f"{case}_logits", network(x))
            maps = getter(to_inception_range(x))
        stored = [name for name in golden.arrays.files if name.startswith(case) and "_input" not in name]
        for name in set(stored) - {f"{case}_logits"}:
            golden.check(name, maps[name.split("_")[1]])


def test_dilated_resnet(shared):
    golden = Golden2d(shared("golden", "2d", "backbones"), "fcn_resnet50")
    body = resnet50(replace_stride_with_dilation=(False, True, True))
    getter = IntermediateLayerGetter(body, {"layer1": "layer1", "layer4": "layer4"})
    state = {key.removeprefix("backbone."): x for key, x in golden.state().items() if key.startswith("backbone.")}
    missing, unexpected = getter.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    getter.eval()
    for case in cases(golden):
        with torch.no_grad():
            maps = getter(golden.tensor(f"{case}_input"))
        for name, x in maps.items():
            golden.check(f"{case}_{name}_ch4", x)


@pytest.mark.parametrize("name", PUBLIC)
def test_keys_and_shapes_of_public_files(shared, name):
    layout = json.loads(shared("golden", "2d", "layouts", f"torchvision_{name}.json").read_text())
    with torch.device("meta"):
        network = PUBLIC[name]()
    assert [[key, list(x.shape)] for key, x in network.state_dict().items()] == layout["tensors"]
    assert sum(p.numel() for p in network.parameters()) == layout["n_parameters"]


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("maskrcnn_resnet50_fpn", {"norm_layer": FrozenBatchNorm2d}),
        ("maskrcnn_resnet50_fpn_v2", {"norm_layer": nn.BatchNorm2d, "fpn_norm_layer": nn.BatchNorm2d}),
    ],
)
def test_keys_and_shapes_of_the_detectors_backbone(shared, name, norms):
    tensors = json.loads(shared("golden", "2d", "detection", f"{name}.spec.json").read_text())["tensors"]
    with torch.device("meta"):
        network = resnet_fpn_backbone(**norms)
    theirs = [[key.removeprefix("backbone."), shape] for key, shape, *_ in tensors if key.startswith("backbone.")]
    assert [[key, list(x.shape)] for key, x in network.state_dict().items()] == theirs
