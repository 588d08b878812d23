"""What PyTorch's and MONAI's tools do to a network from outside: hooks, pruning, state dictionaries, metadata."""

from __future__ import annotations

import monai
import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn.utils import prune, spectral_norm
from torch.optim.swa_utils import update_bn

from medseg3d.layers.normalization import GroupNorm, InstanceNorm
from medseg3d.networks import FCN, UNETR, SwinUNETR, UNet, VNet
from medseg3d.networks.backbones.alexnet import AlexNet
from medseg3d.networks.backbones.googlenet import googlenet
from medseg3d.networks.backbones.resnet import resnet18
from medseg3d.networks.backbones.vgg import vgg11
from medseg3d.networks.vnet import _BatchNorm

NETWORKS = {
    "unet": lambda: UNet(3, 1, 2, channels=(8, 16), norm="group", act="leakyrelu"),
    "vnet": lambda: VNet(3, 1, 2),
    "unetr": lambda: UNETR(1, 2, (32, 32, 32), feature_size=8, hidden_size=48, num_heads=4, mlp_dim=64),
    "swin_unetr": lambda: SwinUNETR(1, 2, feature_size=12),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.fixture
def image():
    return torch.randn(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sized(network, image):
    return image[:, :, :32] if isinstance(network, UNETR) else image


@pytest.mark.parametrize("grad", [False, True])
def test_the_affine_of_a_meta_tensor_comes_along(network, sized, grad):
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    network.eval()
    with torch.set_grad_enabled(grad):
        output = network(MetaTensor(sized, affine=affine))
        plain = network(sized)
    assert isinstance(output, MetaTensor) and torch.equal(output.affine, affine)
    assert type(plain) is torch.Tensor and torch.equal(output.as_tensor(), plain)
    if grad:
        output.square().mean().backward()
        assert all(one.grad is not None for one in network.parameters() if one.requires_grad)


@pytest.mark.parametrize("grad", [False, True])
def test_no_images_give_no_logits(network, sized, grad):
    network.eval()
    with torch.set_grad_enabled(grad):
        assert network(sized[:0]).shape == (0, 2, *sized.shape[2:])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["unet", "unetr", "swin_unetr"])
def test_a_hook_keeps_what_a_convolution_gave(name, grad, image):
    network = NETWORKS[name]().eval()
    image = image[:, :, :32] if name == "unetr" else image
    convs = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    kept, copies = {}, {}

    def look(module, _, output):
        kept[module], copies[module] = output, output.detach().clone()

    with torch.set_grad_enabled(grad):
        expected = network(image)
        for conv in convs:
            conv.register_forward_hook(look)
        torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
    assert len(kept) > 5
    for conv, output in kept.items():
        assert torch.equal(output.detach(), copies[conv]), "overwritten after the hook saw it"


def overwritten(network, image):
    """Names of the modules of which a hook holds an input or an output that was overwritten later on."""
    held = []

    def look(name, given, output):
        held.extend((name, tensor, tensor.clone()) for tensor in (given[0], output))

    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, given, output, name=name: look(name, given, output))
    with torch.no_grad():
        network(image)
    return {name for name, tensor, copy in held if not torch.equal(tensor, copy)}


@pytest.mark.parametrize("arguments", [{"act": "prelu"}, {"act": ("elu", {"inplace": True})}, {"published": True}])
def test_vnet_overwrites_no_more_of_what_hooks_see_than_monai_does(arguments, image):
    """That is what its activation overwrites where it is asked to work in place."""
    torch.manual_seed(0)
    theirs = monai.networks.nets.VNet(3, 1, 2, act=arguments.get("act", ("elu", {"inplace": False})))
    allowed = overwritten(theirs.eval(), image)
    assert overwritten(VNet(3, 1, 2, **{"act": "elu", **arguments}).eval(), image) <= allowed
    assert bool(allowed) == isinstance(arguments.get("act"), tuple)


@pytest.mark.parametrize("part", ["in_tr.conv_block", "down_tr64.ops", "up_tr128.ops.0.conv_block.conv", "up_tr64"])
def test_what_a_single_hook_of_vnet_holds_stays(part, image):
    network = VNet(3, 1, 2, act="prelu").eval()
    held = []
    network.get_submodule(part).register_forward_hook(lambda *call: held.append((call[2], call[2].clone())))
    with torch.no_grad():
        network(image)
    assert torch.equal(*held[0])


def test_a_layer_of_vnet_may_give_its_input(image):
    network = VNet(3, 1, 2).eval()
    network.down_tr64.ops[0].conv_block.conv = nn.Identity()
    expected = network(image).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(image), expected)


@pytest.mark.parametrize("name", ["unet", "swin_unetr"])
def test_norms_tell_their_hooks(name, image):
    network, seen = NETWORKS[name]().eval(), set()
    norms = {module for module in network.modules() if isinstance(module, GroupNorm | InstanceNorm)}
    for norm in norms:
        norm.register_forward_hook(lambda module, *_: seen.add(module))
    with torch.no_grad():
        network(image)
    assert norms and seen == norms


def test_another_number_of_channels_is_told_with_and_without_gradients(network, sized):
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match="1 channels, got"),
        ):
            network(torch.cat([sized, sized], 1))


@pytest.mark.parametrize("make", [resnet18, vgg11, AlexNet, googlenet])
def test_backbones_are_traced_by_fx(make):
    backbone, picture = make().eval(), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(backbone)(picture), backbone(picture))


@pytest.mark.parametrize("backbone", ["alexnet", "googlenet"])
def test_local_response_norm_runs_in_bfloat16(backbone):
    network, picture = FCN(backbone=backbone).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert network.bfloat16()(picture.bfloat16()).dtype == torch.bfloat16


def test_pruned_convolutions_train(network, sized):
    convs = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    for conv in convs:
        prune.l1_unstructured(conv, "weight", 0.3)
    before = [conv.weight_orig.detach().clone() for conv in convs]
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)  # moves weights before a norm too, of tiny gradients
    for _ in range(2):
        optimizer.zero_grad()
        network(sized).square().mean().backward()
        optimizer.step()
    network(sized)  # which masks the weights of the last step
    for conv, old in zip(convs, before, strict=True):
        kept = conv.weight_mask > 0
        gradient = conv.weight_orig.grad
        assert gradient[kept].any() and not gradient[~kept].any()
        assert not torch.equal(conv.weight_orig, old)
        assert conv.weight[kept].any() and not conv.weight[~kept].any() and not kept.all()


def test_spectral_norm_has_a_gradient(network, sized):
    convs = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    for conv in convs:
        spectral_norm(conv)
    network(sized).square().mean().backward()
    assert all(conv.weight_orig.grad is not None for conv in convs)


def test_the_order_of_merging_comes_back_with_the_weights(tmp_path, image):
    network = SwinUNETR(1, 2, feature_size=12, downsample="legacy").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    again = SwinUNETR(1, 2, feature_size=12).eval()
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again(image), network(image))


@pytest.mark.parametrize("argument", [{"momentum": None}, {"track_running_stats": False}])
def test_batch_norm_of_vnet_is_that_of_pytorch(argument):
    ours, theirs = _BatchNorm(3, **argument), nn.BatchNorm3d(3, **argument)
    for seed in range(3):
        x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) + seed
        torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x.clone()), theirs.eval()(x))


def test_statistics_of_vnet_are_collected_anew(image):
    network = VNet(3, 1, 2)
    update_bn([image, image + 1], network)
    assert int(network.in_tr.conv_block.adn.N.num_batches_tracked) == 2
