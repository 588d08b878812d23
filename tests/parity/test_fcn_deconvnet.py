"""FCN and DeconvNet against the published Caffe nets (golden/2d/fcn_deconvnet), FCN on ResNet against torchvision."""

from __future__ import annotations

import json

import pytest
import torch

from medseg3d.layers.upsampling import bilinear_weight
from medseg3d.networks.deconvnet import DeconvNet
from medseg3d.networks.fcn import FCN
from medseg3d.networks.fcn_resnet import fcn_resnet50
from tests.parity.golden2d import Golden2d, seeded_input

NETS = {
    "fcn32s": {"stride": 32},
    "fcn16s": {"stride": 16},
    "fcn8s": {"stride": 8},
    "fcn8s_atonce": {"stride": 8, "at_once": True},
    "fcn_alexnet": {"backbone": "alexnet"},
}
FULL = {"fcn8s_full": ("fcn8s", 134_362_751), "fcn_alexnet_full": ("fcn_alexnet", 56_954_261)}


def filled(golden, network):
    """The network with the drawn weights; its upsampling, which is not drawn, must be what the reference has."""
    state, bilinear = golden.state(), golden.spec["bilinear"]
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert shapes == {key: list(tensor.shape) for key, tensor in state.items()} | bilinear
    for key, (channels, _, size, _) in bilinear.items():
        torch.testing.assert_close(network.state_dict()[key], bilinear_weight(channels, size))
    network.load_state_dict(state, strict=False)
    return network.eval()


class Maps:
    """What each layer of a network gave in its last pass."""

    def __init__(self, network):
        self.network, self.maps = network, {}
        for name, layer in network.named_children():
            layer.register_forward_hook(lambda _, __, output, name=name: self.maps.update({name: output.clone()}))

    def __getitem__(self, name):
        """``score_pool4c`` is the score map as far as it takes part in the sum."""
        if name in self.maps:
            return self.maps[name]
        score = name.removesuffix("c")
        (fusion,) = (fusion for fusion in self.network.fusions if fusion.score == score)
        rows, columns = self.maps[fusion.upsampling].shape[2:]
        return self.maps[score][:, :, fusion.crop : fusion.crop + rows, fusion.crop : fusion.crop + columns]


def check_case(golden, network, prefix):
    maps = Maps(network)
    with torch.no_grad():
        y = network(golden.tensor(f"{prefix}input"))
    names = [name for name in golden.arrays.files if name.startswith(prefix) and not name.endswith("input")]
    assert len(names) >= 2
    for name in names:
        plain = name.removeprefix(prefix)
        if plain.startswith("score_s"):
            golden.check(name, y)
        elif plain == "score_pool3c":
            stored = golden.tensor(name).shape[1]  # the first channels, or every fourth
            ours = maps[plain]
            golden.check(name, ours[:, :: -(-ours.shape[1] // stored)])
        else:
            golden.check(name, maps[plain])


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", NETS)
def test_narrow_nets_give_the_published_scores(name, case, shared):
    golden = Golden2d(shared("golden", "2d", "fcn_deconvnet"), f"{name}_div8")
    network = filled(golden, FCN(width=1 / 8, **NETS[name]))
    assert sum(p.numel() for p in network.parameters()) == golden.spec["n_params_without_bilinear"]
    check_case(golden, network, f"case{case}_")


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_nets_give_the_published_scores(name, shared):
    golden = Golden2d(shared("golden", "2d", "fcn_deconvnet"), name)
    plain, count = FULL[name]
    network = filled(golden, FCN(**NETS[plain]))
    assert sum(p.numel() for p in network.parameters()) == count
    check_case(golden, network, "")


@pytest.mark.parametrize("name", NETS)
def test_sizes_of_all_maps_and_crops_are_the_published_ones(name, shared):
    table = json.loads(shared("golden", "2d", "fcn_deconvnet", "fcn_shapes.json").read_text())[name]
    with torch.device("meta"):
        network = FCN(width=1 / 8, **NETS[name])
        maps = Maps(network)
        assert {key.removesuffix("c"): crop for key, crop in table["crop_offsets"].items()} == network.crops
        for row in table["rows"]:
            assert list(network(torch.empty(1, 3, *row["in"])).shape[2:]) == row["out"]
            sizes = {key: list(maps[key].shape[2:]) for key in row.keys() - {"in", "out"}}
            assert sizes == {key: row[key] for key in sizes}


def test_deconvnet_gives_the_published_maps(shared):
    golden = Golden2d(shared("golden", "2d", "fcn_deconvnet"), "deconvnet_div16")
    network = filled(golden, DeconvNet(norm="folded", width=1 / 16))
    maps, x = {}, seeded_input(int(golden.arrays["input_seed"]), (1, 3, 224, 224))
    for name in ("conv5_1", "deconv5_1", "deconv4_1"):
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: maps.update({name: inputs[0].clone()})
        )
    for name in ("bnfc7", "fc6-deconv-bn", "debn5_3", "debn3_3"):
        network.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: maps.update({name: y.clone().relu()})
        )
    network.fc6.register_forward_pre_hook(lambda _, inputs: maps.update(pool5=inputs[0].clone()))
    with torch.no_grad():
        golden.check("score_s4", network(x))
    golden.check("pool5", maps["pool5"])
    golden.check("fc7", maps["bnfc7"])
    golden.check("fc6-deconv", maps["fc6-deconv-bn"])
    golden.check("unpool5", maps["deconv5_1"])
    golden.check("deconv5_3", maps["debn5_3"])
    golden.check("unpool4", maps["deconv4_1"])
    golden.check("deconv3_3_s2", maps["debn3_3"])


def test_deconvnet_has_the_published_layers(shared):
    table = json.loads(shared("golden", "2d", "fcn_deconvnet", "deconvnet_layout.json").read_text())
    with torch.device("meta"):
        network = DeconvNet(norm="folded")
    assert [[key, list(tensor.shape)] for key, tensor in network.state_dict().items()] == table["tensors"]
    assert sum(p.numel() for p in network.parameters()) == table["n_params"] == 251_805_653


@pytest.mark.parametrize("case", [0, 1])
def test_fcn_resnet50_gives_what_torchvision_gives(case, shared):
    golden = Golden2d(shared("golden", "2d", "backbones"), "fcn_resnet50")
    network = golden.fill(fcn_resnet50(num_classes=5, aux_loss=True))
    x = golden.tensor(f"case{case}_input")
    maps = {}
    for name in ("layer1", "layer4"):
        network.backbone[name].register_forward_hook(lambda _, __, y, name=name: maps.update({name: y}))
    with torch.no_grad():
        outputs = network.outputs(x)
        assert torch.equal(network(x), outputs["out"])
    for name in ("out", "aux"):
        golden.check(f"case{case}_{name}", outputs[name])
    for name in ("layer1", "layer4"):
        golden.check(f"case{case}_{name}_ch4", maps[name])
