"""Gradients in bfloat16 are those of float32, up to rounding, however small the maps of a network are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medseg3d.networks import build
from medseg3d.training import PretrainingIteration, SegmentationIteration
from medseg3d.training.autocast import thin_maps_in_float32


def gradient(network, image, dtype, through=lambda network, image: network(image)):
    network.zero_grad()
    with thin_maps_in_float32(network):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = through(network, image)
            assert torch.is_autocast_enabled("cpu") == (dtype != torch.float32)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output.float() * weights).sum().backward()
    return network[0].weight.grad.clone()


def twice(network, image):
    return checkpoint(network, image, use_reentrant=False)


@pytest.mark.parametrize(("kernel", "size"), [(3, (2, 2, 2)), (5, (4, 4, 4)), (5, (2, 8, 8)), (3, (6, 6, 6))])
@pytest.mark.parametrize("through", [lambda network, image: network(image), twice], ids=["once", "checkpoint"])
def test_small_maps(kernel, size, through):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(16, 16, kernel, padding=kernel // 2), nn.Conv3d(16, 16, 1))
    image = torch.randn(2, 16, *size)
    expected = gradient(network, image, torch.float32)
    error = gradient(network, image, torch.bfloat16, through) - expected
    assert error.norm() < 0.02 * expected.norm()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network)


def test_an_error_leaves_autocast_as_it_was():
    network = nn.Sequential(nn.Conv3d(16, 16, 3, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        with thin_maps_in_float32(network), pytest.raises(RuntimeError):
            network(torch.randn(2, 8, 2, 2, 2))
        assert torch.is_autocast_enabled("cpu") and not network[0]._forward_hooks


def test_a_step_of_training_is_protected():
    """V-Net's deepest maps have 4 voxels along an axis here, and its kernels 5."""
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = build("vnet", out_channels=2, width=2, dropout_prob_down=None, dropout_prob_up=(None, None))
        engine = SimpleNamespace(
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), 0.0),
            inferer=lambda image, network: network(image),
            loss_function=lambda logits, label: nn.functional.cross_entropy(logits.float(), label[:, 0].long()),
            state=SimpleNamespace(device="cpu", iteration=1),
        )
        image = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(2))
        SegmentationIteration(dtype=dtype)(engine, {"image": image, "label": (image > 0).float()})
        grads[dtype] = network.down_tr256.ops[1].conv_block.conv.weight.grad
    error = (grads[torch.bfloat16] - grads[torch.float32]).norm()
    assert error < 0.2 * grads[torch.float32].norm()


def test_a_step_of_pretraining_is_protected_too():
    weights = torch.randn(4, 16, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 16, 1))
        engine = SimpleNamespace(
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), 0.0),
            loss_function=lambda output, turns, images: {"loss": (output.float() * weights).sum()},
            state=SimpleNamespace(device="cpu", iteration=1),
        )
        PretrainingIteration(dtype=dtype)(engine, {"image": torch.randn(2, 16, 2, 2, 2)})
        grads[dtype] = network[0].weight.grad
    error = (grads[torch.bfloat16] - grads[torch.float32]).norm()
    assert error < 0.02 * grads[torch.float32].norm()
