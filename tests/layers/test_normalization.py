"""Instance and group norm with activation and shortcut, in place, against PyTorch's own modules in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.layout import channels_last
from medseg3d.layers.normalization import GroupNorm, InstanceNorm, normalize_and_activate

SHAPES = [(2, 4, 6, 5, 7), (3, 4, 9, 10), (1, 4, 21, 30, 31)]  # the last has more than one piece
NORMS = {
    "instance": lambda: InstanceNorm(4),
    "affine": lambda: InstanceNorm(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
}


def reference(x, norm, slope, residual):
    x = norm.double()(x.double())
    x = x if residual is None else x + residual.double()
    return x if slope is None else F.leaky_relu(x, slope)


def random(shape, seed, mean=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + mean
    return channels_last(x)


def norm_of(kind):
    norm = NORMS[kind]()
    for i, parameter in enumerate(norm.parameters()):
        nn.init.uniform_(parameter, 0.5 + i, 1.5 + i)
    return norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("slope", [None, 0.01])
@pytest.mark.parametrize("shortcut", [False, True])
def test_without_gradients(shape, kind, slope, shortcut):
    x, norm = random(shape, 0, mean=5.0), norm_of(kind)
    residual = random(shape, 1) if shortcut else None
    with torch.no_grad():
        y = normalize_and_activate(x.clone(memory_format=torch.preserve_format), norm, slope, residual)
        torch.testing.assert_close(y.double(), reference(x, norm, slope, residual), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slope", [None, 0.01])
@pytest.mark.parametrize("shortcut", [False, True])
def test_gradients(shape, slope, shortcut):
    x, norm = random(shape, 0, mean=5.0).requires_grad_(), InstanceNorm(4)
    residual = random(shape, 1).requires_grad_() if shortcut else None
    inputs = [x] if residual is None else [x, residual]
    cotangent = random(shape, 2)
    ours = normalize_and_activate(x * 1.0, norm, slope, residual)
    theirs = reference(x, norm, slope, residual)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5)
    got = torch.autograd.grad((ours * cotangent).sum(), inputs)
    expected = torch.autograd.grad((theirs * cotangent).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_of_one_channels_last_image(batch):
    x, cotangent = random((batch, 4, 5, 6, 7), 0).double(), random((batch, 4, 5, 6, 7), 1).double()

    def formula(x):
        axes = (2, 3, 4)
        return (x - x.mean(axes, keepdim=True)) * (x.var(axes, correction=0, keepdim=True) + 1e-5).rsqrt()

    got, expected = (
        torch.autograd.grad((f(leaf) * cotangent).sum(), leaf)[0]
        for f in (InstanceNorm(4), formula)
        for leaf in (x.clone().requires_grad_(),)
    )
    torch.testing.assert_close(got, expected)


def test_a_million_voxels_cost_no_digits():
    x = random((1, 2, 100, 100, 100), 0, mean=10.0)
    with torch.no_grad():
        y = normalize_and_activate(x.clone(memory_format=torch.preserve_format), InstanceNorm(2))
    assert (y.double() - reference(x, InstanceNorm(2), None, None)).abs().max() < 2e-5


def test_bfloat16_keeps_its_type_and_is_close():
    x = random((2, 4, 8, 9, 10), 0, mean=2.0)
    with torch.no_grad():
        y = normalize_and_activate(x.bfloat16(), InstanceNorm(4, affine=True).bfloat16(), 0.01)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), reference(x, InstanceNorm(4), 0.01, None), rtol=0.02, atol=0.02)


def test_the_keys_are_those_of_torch():
    assert InstanceNorm(4, affine=True).state_dict().keys() == nn.InstanceNorm3d(4, affine=True).state_dict().keys()
    assert not InstanceNorm(4).state_dict()


def test_a_single_voxel_is_refused():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        InstanceNorm(4)(torch.zeros(1, 4, 1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_group_norm(shape, groups):
    x, cotangent = random(shape, 0, mean=5.0).requires_grad_(), random(shape, 2)
    norm = GroupNorm(groups, 4)
    for i, parameter in enumerate(norm.parameters()):
        nn.init.uniform_(parameter, 0.5 + i, 1.5 + i)
    plain = nn.GroupNorm(groups, 4).double()
    plain.load_state_dict(norm.state_dict())
    ours, theirs = norm(x), plain(x.double().contiguous())
    assert "GroupNormalize" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)  # PyTorch's own sums
    got = torch.autograd.grad((ours * cotangent).sum(), [x, *norm.parameters()])
    expected = torch.autograd.grad((theirs * cotangent).sum(), [x, *plain.parameters()])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=5e-5 * other.abs().max().item())


def test_group_norm_in_bfloat16_under_autocast():
    x, cotangent = random((2, 8, 12, 12, 12), 0, mean=1.0).bfloat16(), random((2, 8, 12, 12, 12), 1).bfloat16()
    norm, plain = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    gradients = []
    for module, image in ((norm, x), (plain, x.contiguous())):
        image = image.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(image)
        gradients.append(torch.autograd.grad((y * cotangent).sum(), [image, *module.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 5)])
def test_group_norm_is_torchs_for_everything_else(shape):
    x = torch.randn(shape, requires_grad=True)
    norm = GroupNorm(2, 4)
    assert torch.equal(norm(x), F.group_norm(x, 2, norm.weight, norm.bias))
    scripted = torch.jit.script(norm)
    assert torch.equal(scripted(x), norm(x))
