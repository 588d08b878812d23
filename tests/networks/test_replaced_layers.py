"""Layers that somebody put in the place of a network's own are called; so is all that has a hook."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medseg3d.layers import residual
from medseg3d.networks import UNETR, SwinUNETR, UNet, VNet

NETWORKS = {  # in 2D, which is fast and takes the same ways
    "unet": lambda: UNet(2, 1, 2, channels=(8, 16), norm="group", act="leakyrelu"),
    "vnet": lambda: VNet(2, 1, 2, width=4),
    "unetr": lambda: UNETR(1, 2, 32, feature_size=8, hidden_size=48, num_heads=4, mlp_dim=64, spatial_dims=2),
    "swin_unetr": lambda: SwinUNETR(1, 2, feature_size=12, spatial_dims=2),
}
HEADS = {"unet": "head", "vnet": "out_tr.conv2", "unetr": "out.conv.conv", "swin_unetr": "out.conv.conv"}


class Doubles(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def doubling(conv):
    """A convolution with a forward of its own and the same weights."""
    bias = conv.bias is not None
    other = Doubles(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=bias)
    other.load_state_dict(conv.state_dict())
    return other


def put(network, name, layer):
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)


def make(name):
    torch.manual_seed(0)
    return NETWORKS[name]().eval(), torch.randn(1, 1, 32 if name == "unetr" else 64, 32)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_of_a_subclass_runs_in_the_place_of_every_convolution(name, grad):
    network, image = make(name)
    doubled, expected = copy.deepcopy(network), copy.deepcopy(network)
    for path, module in network.named_modules():
        if type(module) is nn.Conv2d:
            put(doubled, path, doubling(module))
            own = expected.get_submodule(path)
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.mul_(2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(doubled(image), expected(image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_may_be_replaced_by_what_is_no_convolution_of_kernel_1(name):
    network, image = make(name)
    head = network.get_submodule(HEADS[name])
    with torch.no_grad():
        for other in (nn.Conv2d(head.in_channels, 5, 3, padding=1), doubling(head), nn.Sequential(head, nn.Sigmoid())):
            put(network, HEADS[name], other)
            calls = []
            handle = other.register_forward_hook(lambda *call, calls=calls: calls.append(call[1][0]))
            network(image)
            handle.remove()
            torch.testing.assert_close(network(image), other(calls[0]))


@pytest.mark.parametrize("other", [nn.Conv2d(12, 5, 1), doubling(nn.Conv2d(12, 5, 1)), nn.Conv2d(12, 5, 3, padding=1)])
def test_the_container_of_a_head_may_be_replaced(other):
    network, image = make("swin_unetr")
    network.out.conv = other
    with torch.no_grad():
        assert network(image).shape == (1, 5, 64, 32)


def test_the_container_of_a_head_may_hold_more():
    network, image = make("swin_unetr")
    with torch.no_grad():
        expected = network(image).sigmoid()
        network.out.conv.append(nn.Sigmoid())
        torch.testing.assert_close(network(image), expected)


@pytest.mark.parametrize("part", ["encoder1", "encoder1.layer.conv1", "encoder10", "decoder5.conv_block"])
def test_larger_parts_may_be_replaced(part):
    network, image = make("swin_unetr")
    with torch.no_grad():
        expected = network(image)
        put(network, part, nn.Sequential(network.get_submodule(part)))
        torch.testing.assert_close(network(image), expected)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_module_tells_its_hook_where_it_is_the_only_one(name, merges, monkeypatch):
    if merges:
        monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 1)
        monkeypatch.setattr(residual, "MERGE_FROM_CHANNELS", 1)
    network, image = make(name)
    silent = []
    for path, module in network.named_modules():
        if isinstance(module, nn.ModuleList) or "norm_cross_attn" in path or "vit" in path.lower():
            continue  # no call, none either (kept for files of weights), and no short cuts
        calls = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            network(image)
        handle.remove()
        silent += [] if calls else [path]
    assert not silent


@pytest.mark.parametrize("name", ["transp_conv", "conv_block.conv1", "conv_block.conv3", "conv_block"])
@pytest.mark.parametrize("deep", [True, False])
def test_merged_upsampling_calls_what_was_replaced(name, deep, monkeypatch):
    monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 1)
    monkeypatch.setattr(residual, "MERGE_FROM_CHANNELS", 1)
    torch.manual_seed(0)
    block = residual.UpBlock(3, 16, 8, "instance").eval()
    x, skip = torch.randn(1, 16, 8, 8, 8), torch.randn(1, 8, 16, 16, 16)
    called = []

    class Tells(nn.Sequential):
        def forward(self, x):
            called.append(name)
            return super().forward(x)

    with torch.no_grad():
        expected = block(x, skip)
        if deep and name != "conv_block":
            name += ".conv"
        put(block, name, Tells(block.get_submodule(name)))
        torch.testing.assert_close(block(x, skip), expected, rtol=1e-4, atol=1e-5)
    assert called


def test_a_forward_put_on_a_layer_itself_runs(monkeypatch):
    network, image = make("swin_unetr")
    head = network.out.conv.conv
    with torch.no_grad():
        expected = 2 * network(image)
        monkeypatch.setattr(head, "forward", lambda x: 2 * type(head).forward(head, x), raising=False)
        torch.testing.assert_close(network(image), expected)


class Silent(nn.LeakyReLU):
    def forward(self, x):
        return 0 * x


class Flat(nn.GroupNorm):
    def forward(self, x):
        return 0 * x


@pytest.mark.parametrize("layer", [Silent(), Flat(8, 8)])
def test_activations_and_norms_of_a_subclass_run(layer):
    network, image = make("unet")
    network.decoder[-1][5 if isinstance(layer, Silent) else 4] = layer
    with torch.no_grad():
        logits = network(image)
    assert torch.equal(logits, network.head.bias.view(1, 2, 1, 1).expand_as(logits))


def test_a_layer_may_be_put_behind_a_pair_of_convolutions():
    network, image = make("unet")
    with torch.no_grad():
        expected = network(image)
        network.decoder[-1].append(nn.Dropout2d().eval())
        torch.testing.assert_close(network(image), expected)
