"""ResNet, its frozen norm and its pyramid: what the reference values do not show."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from medseg3d.networks.backbones.fpn import (
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
    resnet_fpn_backbone,
)
from medseg3d.networks.backbones.resnet import (
    RESNETS,
    FrozenBatchNorm2d,
    resnet18,
    resnet50,
    train_last_layers,
)
from medseg3d.networks.backbones.stages import IntermediateLayerGetter

STAGES = {f"layer{i}": f"layer{i}" for i in range(1, 5)}
COUNTS = {
    "resnet18": 11689512,
    "resnet34": 21797672,
    "resnet50": 25557032,
    "resnet101": 44549160,
    "resnet152": 60192808,
}


def maps_of(network, x):
    with torch.no_grad():
        return IntermediateLayerGetter(network.eval(), STAGES)(x)


def filled_norm(channels=3):
    norm = nn.BatchNorm2d(channels).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_parameters(name):
    with torch.device("meta"):
        network = RESNETS[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[name]


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_frozen_norm_is_batch_norm_in_eval_mode_even_in_training(eps):
    norm, x = filled_norm(), torch.randn(2, 3, 4, 5)
    norm.eps = eps
    frozen = FrozenBatchNorm2d(3, eps).train()
    frozen.load_state_dict(norm.state_dict())  # strict, though there is a counter of batches in it
    assert not list(frozen.parameters())
    torch.testing.assert_close(frozen(x), norm(x))
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_the_state_of_a_norm_is_not_changed_by_loading_it():
    state = filled_norm().state_dict()
    FrozenBatchNorm2d(3).load_state_dict(state)
    assert "num_batches_tracked" in state


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (64, 31)])
def test_sizes_of_the_stages(size):
    maps = maps_of(resnet18(num_classes=2), torch.randn(1, 3, *size))
    for i, x in enumerate(maps.values()):
        assert x.shape == (1, 64 * 2**i, *(-(-n // 2 ** (i + 2)) for n in size))


def test_dilation_keeps_the_size_and_the_weights_are_the_same():
    plain = resnet50(num_classes=2)
    dilated = resnet50(num_classes=2, replace_stride_with_dilation=[False, False, True])
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    plain, dilated = maps_of(plain, x), maps_of(dilated, x)
    assert dilated["layer4"].shape[2:] == dilated["layer3"].shape[2:] == (4, 4)
    assert torch.equal(plain["layer3"], dilated["layer3"])


def test_caffe_strides_in_the_first_convolution():
    keys, network = resnet50().state_dict().keys(), resnet50(stride_in_1x1=True)
    assert network.state_dict().keys() == keys
    block = network.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    block = resnet50().layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_blocks_that_do_nothing_at_first():
    network = resnet18(zero_init_residual=True).eval()
    x = torch.rand(1, 64, 5, 5)
    torch.testing.assert_close(network.layer1(x), x)


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"basic blocks take no groups.*no dilation, got .*dilation=2"):
        resnet18(replace_stride_with_dilation=(False, True, True))
    with pytest.raises(ValueError, match="a choice for each of layer2, layer3 and layer4"):
        resnet50(replace_stride_with_dilation=(True,))
    with pytest.raises(ValueError, match=r"takes 2 spatial axes.*\(batch, 3, height, width\).*\(1, 4, 32, 32\)"):
        resnet18()(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="at least 1x1 pixels, got 0x32"):
        resnet18()(torch.zeros(1, 3, 0, 32))
    with pytest.raises(ValueError, match="has no layer layer5; its layers are conv1, bn1"):
        IntermediateLayerGetter(resnet18(), {"layer5": "0"})
    with pytest.raises(ValueError, match=r"between 0 .* and 5"):
        resnet_fpn_backbone("resnet18", trainable_layers=6)
    with pytest.raises(ValueError, match="there is no backbone 'resnet51'"):
        resnet_fpn_backbone("resnet51")
    with pytest.raises(ValueError, match="returned_layers"):
        resnet_fpn_backbone("resnet18", returned_layers=(2, 1))


@pytest.mark.parametrize(("layers", "trained"), [(0, []), (2, ["layer3", "layer4"]), (5, None)])
def test_the_last_layers_are_trained(layers, trained):
    network = resnet18()
    network.fc = nn.Identity()
    train_last_layers(network, layers)
    names = {name.partition(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert names == (set(trained) if trained is not None else {"conv1", "bn1", *STAGES})


def test_a_map_before_an_activation_in_place_stays_as_it_was():
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    x = torch.randn(1, 3, 4, 4)
    maps = IntermediateLayerGetter(layers, {"0": "convolved", "1": "rectified"})(x)
    assert torch.equal(maps["convolved"], layers[0](x)) and maps["convolved"].min() < 0
    assert torch.equal(maps["rectified"], maps["convolved"].relu())


def pyramid_inputs():
    return {"a": torch.randn(2, 4, 9, 7), "b": torch.randn(2, 6, 5, 4)}


def test_global_pooling_adds_the_same_to_every_pixel_of_the_coarsest_lateral_map():
    with_pool = FeaturePyramidNetwork((4, 6), 8, global_pool=True)
    without = FeaturePyramidNetwork((4, 6), 8)
    without.load_state_dict({k: v for k, v in with_pool.state_dict().items() if not k.startswith("global_block.")})
    x = pyramid_inputs()
    pooled = with_pool.global_block(x["b"].mean((2, 3), keepdim=True))
    with torch.no_grad():  # without the branch, the same comes in through the lateral map of a shifted bias
        expected = without.layer_blocks[1](without.inner_blocks[1](x["b"]) + pooled)
    maps = with_pool(x)
    torch.testing.assert_close(maps["b"], expected)
    assert not torch.allclose(maps["a"], without(x)["a"])
    sum(y.sum() for y in maps.values()).backward()
    assert with_pool.global_block[0].weight.grad.any()


def test_keys_of_2021_load():
    network = FeaturePyramidNetwork((4, 6), 8)
    state = {
        key.replace(".0.weight", ".weight").replace(".0.bias", ".bias"): x for key, x in network.state_dict().items()
    }
    other = FeaturePyramidNetwork((4, 6), 8)
    other.load_state_dict(state)
    x = pyramid_inputs()
    assert torch.equal(other(x)["a"], network(x)["a"])


def test_a_pyramid_with_norms_has_no_biases():
    keys = FeaturePyramidNetwork((4,), 8, norm_layer=nn.BatchNorm2d).state_dict().keys()
    assert "inner_blocks.0.1.running_mean" in keys and "inner_blocks.0.0.bias" not in keys


def test_another_number_of_maps_is_refused():
    with pytest.raises(ValueError, match="this pyramid takes 2 maps, got 1: a"):
        FeaturePyramidNetwork((4, 6), 8)({"a": torch.randn(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="numbers of channels are positive"):
        FeaturePyramidNetwork((4, 0), 8)


def test_p6_comes_from_the_input_where_widths_differ():
    extra = LastLevelP6P7(6, 8)
    maps = FeaturePyramidNetwork((4, 6), 8, extra)(x := pyramid_inputs())
    assert list(maps) == ["a", "b", "p6", "p7"]
    assert torch.equal(maps["p6"], extra.p6(x["b"]))


@pytest.mark.parametrize(
    "arguments", [{}, {"returned_layers": (2, 4)}, {"extra_blocks": LastLevelP6P7(512, 16)}, {"global_pool": True}]
)
def test_backbone_with_a_pyramid(arguments):
    network = resnet_fpn_backbone("resnet18", out_channels=16, **arguments)
    maps = network(torch.randn(1, 3, 65, 40))
    names = [str(i) for i in range(len(arguments.get("returned_layers", (1, 2, 3, 4))))]
    assert list(maps) == names + (["p6", "p7"] if "extra_blocks" in arguments else ["pool"])
    assert {x.shape[1] for x in maps.values()} == {network.out_channels} == {16}
    trained = {name.split(".")[1] for name, p in network.body.named_parameters(prefix="body") if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


class Sum(nn.Module):
    """One tensor of a pyramid, which every exporter can handle."""

    def __init__(self):
        super().__init__()
        self.backbone = resnet_fpn_backbone("resnet18", partial(FrozenBatchNorm2d, eps=0.0), out_channels=8)

    def forward(self, x):
        return torch.cat([y.mean((2, 3)) for y in self.backbone(x).values()])


def test_export_trace_and_bfloat16():
    network, x = Sum().eval(), torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        y = network(x)
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(network, x)(x), y, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - y).norm() < 0.05 * y.norm()


def test_lateral_maps_of_a_max_pool_level_are_every_second_pixel():
    p5 = torch.randn(1, 2, 5, 4)
    results, names = LastLevelMaxPool()([p5], [p5], ["3"])
    assert names == ["3", "pool"] and torch.equal(results[1], p5[:, :, ::2, ::2])
