"""Convolution in tiles and over patches against PyTorch's own in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional as F

from medseg3d.layers import winograd
from medseg3d.layers.derived import Derived
from medseg3d.layers.winograd import Conv3d, convolve, convolve_patches, convolve_tiles, transform_weight, transforms


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape):
    return random(*shape).contiguous(memory_format=torch.channels_last_3d)


def exact(x, weight):
    return F.conv3d(x.double(), weight.double(), padding=weight.shape[-1] // 2)


@pytest.mark.parametrize(("slices", "taps"), winograd.POINTS)
def test_the_transforms_filter(slices, taps):
    outputs, weights, inputs = transforms(slices, taps)
    values, taps_ = random(slices + taps - 1).double(), random(taps, seed=1).double()
    expected = F.conv1d(values.view(1, 1, -1), taps_.view(1, 1, -1)).flatten()
    torch.testing.assert_close(outputs @ ((weights @ taps_) * (inputs @ values)), expected)


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("depth", [4, 8, 20])
@pytest.mark.parametrize("workspace", [1, 2**22])
def test_tiles(taps, depth, workspace, monkeypatch):
    monkeypatch.setattr(winograd, "WORKSPACE", workspace)
    x, weight = image(2, 6, depth, 9, 7), random(5, 6, taps, taps, taps, seed=1)
    y = convolve_tiles(x, transform_weight(weight))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    reference = exact(x, weight)
    assert (y - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("taps", [3, 5])
def test_patches(taps):
    x, weight = random(2, 3, 5, 6, 7), random(4, 3, taps, taps, taps, seed=1)
    y = convolve_patches(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y.double(), exact(x, weight), rtol=0, atol=1e-4)


def test_the_module_follows_its_weights(monkeypatch):
    monkeypatch.setattr(winograd, "FROM_VOXELS", 1)
    monkeypatch.setattr(winograd, "FROM_VOXELS_WITH_GRADIENTS", 1)
    conv, x = Conv3d(32, 32, 3, padding=1), image(1, 32, 8, 6, 5)
    for change in (
        lambda: None,
        lambda: conv.weight.mul_(2),
        lambda: conv.load_state_dict(Conv3d(32, 32, 3).state_dict()),
    ):
        with torch.no_grad():
            change()
            expected = exact(x, conv.weight) + conv.bias.view(-1, 1, 1, 1)
            torch.testing.assert_close(conv(x).double(), expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(copy.deepcopy(conv)(x).double(), expected, rtol=0, atol=1e-4)


def test_what_does_not_keep_its_size_is_left_to_torch():
    x = image(1, 4, 8, 8, 8)
    for arguments in ({"stride": 2}, {"padding": 1, "dilation": 2}, {"padding": 1, "groups": 2}, {}):
        conv = Conv3d(4, 4, 3, **arguments)
        with torch.no_grad():
            assert torch.equal(conv(x), torch.nn.Conv3d.forward(conv, x))


@pytest.mark.parametrize("taps", [3, 5])
def test_gradients(taps, monkeypatch):
    monkeypatch.setattr(winograd, "FROM_VOXELS", 1)
    monkeypatch.setattr(winograd, "FROM_VOXELS_WITH_GRADIENTS", 1)
    monkeypatch.setattr(winograd, "WORKSPACE", 1)
    conv, x = Conv3d(32, 40, taps, padding=taps // 2), image(2, 32, 12, 6, 5).requires_grad_()
    y, cotangent = conv(x), random(2, 40, 12, 6, 5, seed=3)
    assert "_Convolution" in y.grad_fn.next_functions[0][0].name()
    inputs = [x, conv.weight, conv.bias]
    got = torch.autograd.grad((y * cotangent).sum(), inputs)
    exactly = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=taps // 2)
    expected = torch.autograd.grad((exactly * cotangent).sum(), inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_autocast_computes_in_its_own_type(monkeypatch):
    monkeypatch.setattr(winograd, "FROM_VOXELS", 1)
    monkeypatch.setattr(winograd, "FROM_VOXELS_WITH_GRADIENTS", 1)
    conv, x = Conv3d(32, 32, 3, padding=1), image(1, 32, 8, 6, 5)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        assert y.dtype == torch.bfloat16
        reference = exact(x, conv.weight) + conv.bias.view(-1, 1, 1, 1)
        assert (y - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("taps", [3, 5])
def test_in_half_the_bits_tiles_have_some_twice_the_error(taps, monkeypatch):
    monkeypatch.setattr(winograd, "_multiplies_bfloat16_in_tiles", lambda: False)
    x, weight = image(1, 48, 26, 24, 24).bfloat16(), random(48, 48, taps, taps, taps, seed=1).bfloat16()
    x = x[:, :, : 24 if taps == 3 else 26]
    reference = exact(x, weight)
    with torch.no_grad():
        error = (convolve(x, weight, None, Derived()) - reference).norm() / reference.norm()
    assert 4e-3 < error < 8e-3  # PyTorch's is below 3e-3


def test_a_subclass_of_tensor_goes_through():
    """MONAI's, for one, whose ``new_empty`` takes a size as one argument only."""
    x, weight = random(1, 1, 8, 16, 16), random(16, 1, 3, 3, 3)
    with torch.inference_mode():
        result = convolve_patches(MetaTensor(x), weight).as_subclass(torch.Tensor)
        torch.testing.assert_close(result, convolve_patches(x, weight), rtol=0, atol=0)
