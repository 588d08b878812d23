"""Networks on PyTorch's own operations: every derivative there is, and the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from medseg3d.layers import derived, residual
from medseg3d.networks import UNETR, SwinUNETR, UNet, VNet, plain_pytorch

NETWORKS = {
    "unet": lambda n: UNet(n, 1, 2, channels=(8, 16), norm="group", act="leakyrelu"),
    "vnet": lambda n: VNet(n, 1, 2, width=4),
    "unetr": lambda n: UNETR(1, 2, 32, feature_size=8, hidden_size=48, num_heads=4, mlp_dim=64, spatial_dims=n),
    "swin_unetr": lambda n: SwinUNETR(1, 2, feature_size=12, spatial_dims=n),
}


def make(name, axes=2):
    torch.manual_seed(0)
    network = NETWORKS[name](axes).eval()
    return network, torch.randn(1, 1, 32 if name == "unetr" else 64, *[32] * (axes - 1))


def slope(network, image):
    image = image.detach().requires_grad_()
    return image, torch.autograd.grad(network(image).square().mean(), image, create_graph=True)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_derivative_is_that_of_the_first(name):
    network, image = make(name)
    network, image = network.double(), image.double()
    direction = torch.randn_like(image)
    step = 1e-6 * direction
    with plain_pytorch():
        given, gradient = slope(network, image)
        (found,) = torch.autograd.grad(gradient, given, direction)
        ahead, behind = (slope(network, image + sign * step)[1] for sign in (1, -1))
    expected = (ahead - behind) / 2e-6
    assert (found - expected).norm() < 1e-2 * expected.norm()  # a kink may lie between


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("name", ["unetr", "swin_unetr"])
def test_a_penalty_of_gradients_reaches_every_parameter(name, axes):
    network, image = make(name, axes)
    with plain_pytorch():
        slope(network.train(), image)[1].square().sum().backward()
    no_gradient = {key for key, one in network.named_parameters() if one.requires_grad and one.grad is None}
    assert no_gradient <= {"out.conv.conv.bias"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_derivative_is_that_of_the_backward_pass(name, grad):
    network, image = make(name)
    direction = torch.randn_like(image)
    with plain_pytorch():
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(network(forward_ad.make_dual(image, direction))).tangent
        of_func = torch.func.jvp(network, (image,), (direction,))[1]
        image.requires_grad_()
        weights = torch.randn_like(tangent)
        (gradient,) = torch.autograd.grad(network(image), image, weights)
    torch.testing.assert_close((gradient * direction).sum(), (tangent * weights).sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_func, tangent, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_and_gradients_are_the_same(name, axes, batch):
    network, image = make(name, axes)
    image = torch.cat([image, image.flip(-1)])[:batch]
    with torch.no_grad():
        quick = network(image)
        with plain_pytorch():
            torch.testing.assert_close(network(image), quick, rtol=1e-3, atol=1e-4)
    gradients = [slope(network, image)[1].detach()]
    with plain_pytorch():
        gradients.append(slope(network, image)[1].detach())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()  # a kink may lie between


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_function_of_our_own_runs(name, grad, monkeypatch):
    monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 1)
    monkeypatch.setattr(residual, "MERGE_FROM_CHANNELS", 1)
    network, image = make(name, 3)

    def fails(*_, **__):
        raise AssertionError("a short cut was taken")

    for function in derived.OwnGradient.__subclasses__():
        monkeypatch.setattr(function, "forward", fails)
    for path in ("winograd._convolve", "normalization._normalize_", "residual.UpBlock._merged"):
        monkeypatch.setattr(f"medseg3d.layers.{path}", fails)
    monkeypatch.setattr("medseg3d.networks.vnet._BatchNorm.overwrite", fails)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fails)
    with plain_pytorch(), torch.set_grad_enabled(grad):
        network(image.requires_grad_(grad))
    if not grad or "unetr" in name:  # the test would see one
        with torch.set_grad_enabled(grad), pytest.raises(AssertionError, match="short cut"):
            network(image)


@pytest.mark.parametrize("name", ["unetr", "swin_unetr"])
def test_without_it_errors_say_what_to_do(name):
    network, image = make(name)
    with pytest.raises(RuntimeError, match=r"differentiated twice: .*plain_pytorch\(\)"):
        slope(network, image)[1].sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"plain_pytorch\(\)"):
        network(forward_ad.make_dual(image, image))


def test_a_second_derivative_is_never_dropped_in_silence():
    """Also where what comes into the backward pass has no gradient itself."""
    layer = residual.OutBlock(2, 3, 2)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="plain_pytorch"):
        gradient.square().sum().backward()
    with plain_pytorch():
        (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), layer.conv.conv.weight)[0].abs().min() > 0


def test_it_ends_and_may_be_nested_and_hooks_see_all():
    network, image = make("swin_unetr")
    called = []
    network.out.conv.conv.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(ZeroDivisionError), plain_pytorch():
        with plain_pytorch():
            pass
        assert not derived.is_plain_eager()
        network(image)
        assert called
        _ = 1 / 0
    assert derived.is_plain_eager()


def test_a_compiler_does_not_mind_it():
    layer = nn.Sequential(residual.ConvBlock(2, 8, 8, "instance", True))
    x = torch.randn(1, 8, 16, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad(), plain_pytorch():
        torch.testing.assert_close(compiled(x), layer(x))
