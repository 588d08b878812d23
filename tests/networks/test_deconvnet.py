"""DeconvNet: folded batch norm, sizes, arguments."""

from __future__ import annotations

import pytest
import torch

from medseg3d.networks.deconvnet import DeconvNet, ScaleAndShift


def test_folding_changes_nothing():
    torch.manual_seed(0)
    network = DeconvNet(1, 3, width=1 / 32)
    for layer in network.children():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                torch.nn.init.normal_(tensor, mean=0.5, std=0.3)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
        else:
            torch.nn.init.kaiming_normal_(layer.weight)
    deployed = network.eval().folded()
    assert any(isinstance(layer, ScaleAndShift) for layer in deployed.children())
    x = torch.randn(1, 1, 224, 256)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert expected.std() > 0
    assert torch.equal(deployed.folded().fc6.weight, network.fc6.weight)


def test_initial_weights_of_the_paper():
    torch.manual_seed(0)
    network = DeconvNet(width=1 / 8)
    assert float(network.deconv5_1.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert torch.equal(network.debn5_1.bias, torch.full((64,), 0.001)) and network.bn1_1.weight.eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"norm": "none"}, "norm must be one of 'batch', 'folded', got 'none'"), ({"width": 0.01}, "whole widths")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeconvNet(**arguments)


@pytest.mark.parametrize(("shape", "good"), [((100, 240), (224, 256)), ((0, 224), (224, 224))])
def test_bad_sizes(shape, good):
    with pytest.raises(ValueError, match=f"the next size that it takes is \\({good[0]}, {good[1]}\\)"):
        DeconvNet(1, width=1 / 32)(torch.zeros(1, 1, *shape))
    with pytest.raises(ValueError, match="images of 1 channels"):
        DeconvNet(1, width=1 / 32)(torch.zeros(1, 3, 224, 224))
