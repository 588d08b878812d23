"""Upsampling merged with the convolutions behind it, against the two one after the other in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from medseg3d.layers import residual, winograd
from medseg3d.layers.residual import ConvBlock, UpBlock
from medseg3d.layers.upsampling import (
    add_upsampled_conv_,
    add_upsampled_pointwise_,
    merged_pointwise_weight,
    merged_weight,
)

CONV = {2: F.conv2d, 3: F.conv3d}
UP = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("axes", "grid"), [(2, (3, 5)), (3, (3, 4, 2)), (3, (1, 1, 1))])
def test_one_convolution_of_the_coarse_grid_does_the_work_of_both(axes, grid):
    x = random(2, 5, *grid)
    up, conv, narrow = random(5, 4, *[2] * axes), random(6, 4, *[3] * axes, seed=1), random(6, 4, *[1] * axes, seed=2)
    fine = UP[axes](x, up, stride=2)
    y = torch.zeros(2, 6, *fine.shape[2:], dtype=torch.float64)
    merged = merged_weight(up, conv).double()
    torch.testing.assert_close(
        add_upsampled_conv_(y.clone(), x, merged), CONV[axes](fine, conv, padding=1), rtol=0, atol=1e-5
    )
    merged = merged_pointwise_weight(up, narrow).double()
    torch.testing.assert_close(add_upsampled_pointwise_(y, x, merged), CONV[axes](fine, narrow), rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("axes", [2, 3])
def test_an_up_block_gives_the_same_either_way(axes, with_shortcut, monkeypatch):
    block = UpBlock(axes, 12, 8, "instance", with_shortcut)
    x, skip = random(2, 12, *[5] * axes).float(), random(2, 8, *[10] * axes, seed=1).float()
    with torch.no_grad():
        plain = block(x, skip)
        monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 1)
        monkeypatch.setattr(residual, "MERGE_FROM_CHANNELS", 1)
        assert block._merges(x)
        torch.testing.assert_close(block(x, skip), plain, rtol=0, atol=1e-4)
        for parameter in block.parameters():
            parameter.mul_(-0.5)
        changed = block(x, skip)
        monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 10**9)
        torch.testing.assert_close(changed, block(x, skip), rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("axes", [2, 3])
def test_gradients_of_an_up_block_are_the_same_either_way(axes, with_shortcut, monkeypatch):
    block = UpBlock(axes, 6, 4, "instance", with_shortcut)
    x = random(2, 6, *[4] * axes).float().requires_grad_()
    skip = random(2, 4, *[8] * axes, seed=1).float().requires_grad_()
    inputs = [x, skip, *block.parameters()]
    cotangent = random(2, 4, *[8] * axes, seed=2).float()
    plain = torch.autograd.grad((block(x, skip) * cotangent).sum(), inputs)
    monkeypatch.setattr(winograd, "FROM_VOXELS", 1)
    monkeypatch.setattr(winograd, "FROM_VOXELS_WITH_GRADIENTS", 1)
    monkeypatch.setitem(winograd.FROM_CHANNELS_TIMES_TAPS, torch.float32, 1)
    monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 1)
    monkeypatch.setattr(residual, "MERGE_FROM_CHANNELS", 1)
    merged = torch.autograd.grad((block(x, skip) * cotangent).sum(), inputs)
    for one, other in zip(merged, plain, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_a_strided_block_halves_the_size():
    block = ConvBlock(3, 4, 6, "instance", residual=True, stride=2)
    assert block(torch.randn(1, 4, 8, 8, 8)).shape == (1, 6, 4, 4, 4)


def test_training_computes_what_inference_does():
    block = ConvBlock(3, 4, 6, "instance", residual=True)
    x = random(2, 4, 6, 7, 8).float()
    trained = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), trained, rtol=0, atol=1e-5)
        assert torch.equal(copy.deepcopy(block)(x), block(x))
