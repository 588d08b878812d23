"""FCN: geometry, skips, stages of training, arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg3d.networks.fcn import FCN, parameter_groups
from medseg3d.networks.fcn_resnet import AUX_WEIGHT, FCNResNet, fcn_resnet50, fcn_resnet101
from medseg3d.networks.fcn_trunks import TRUNKS

GOOGLENETS = {"googlenet", "torchvision_googlenet"}


def fcn(backbone="vgg16", **arguments):
    width = 1 if backbone in GOOGLENETS else 1 / 16
    return FCN(**{"in_channels": 1, "out_channels": 2, "backbone": backbone, "width": width, **arguments})


def filled(network):
    """With scores that depend on the image."""
    for name, parameter in network.named_parameters():
        if name.startswith("score"):
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize("padding", [100, "same"])
@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("backbone", TRUNKS)
def test_every_size_gives_scores_of_its_size(backbone, stride, padding):
    with torch.device("meta"):
        network = fcn(backbone, stride=stride, padding=padding).eval()
        for size in [*range(1, 40, 1 if stride == 8 else 5), 64, 97]:
            assert network(torch.empty(1, 1, size, size + 7)).shape == (1, 2, size, size + 7)


@pytest.mark.parametrize("padding", [100, "same"])
@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("backbone", ["vgg16", "alexnet", "torchvision_googlenet"])
def test_a_shift_by_the_largest_stride_shifts_the_scores(backbone, stride, padding):
    """What the crops are for: the scores of a part of the image lie on that part."""
    torch.manual_seed(0)
    network = filled(fcn(backbone, stride=stride, padding=padding))
    image = torch.zeros(1, 1, 96, 768)  # wide enough for no layer to see both the picture in it and its ends
    image[:, :, 40:64, 300:380] = torch.randn(24, 80)
    with torch.no_grad():
        here, there = network(image), network(image.roll(96, dims=3))
        there_alone = network(torch.zeros_like(image))
    assert (here - there_alone).abs().max() > 0.01
    torch.testing.assert_close(here.roll(96, dims=3)[..., 320:560], there[..., 320:560], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", [100, "same"])
@pytest.mark.parametrize("backbone", ["vgg16", "alexnet", "torchvision_alexnet"])
def test_scores_lie_on_the_pixels_that_they_are_of(backbone, padding):
    """With a trunk that only averages, the scores of a slope are that slope, unless they lie beside it."""
    network = fcn(backbone, padding=padding, out_channels=1).double().eval()
    for name in network.trunk_layers:
        layer = network.get_submodule(name)
        if isinstance(layer, torch.nn.Conv2d):
            taps = layer.weight[0].numel()
            torch.nn.init.constant_(layer.weight, 1 / taps)
        elif isinstance(layer, torch.nn.MaxPool2d):
            pool = torch.nn.AvgPool2d(layer.kernel_size, 2, layer.padding, ceil_mode=layer.ceil_mode)
            network.set_submodule(name, pool)
        elif isinstance(layer, torch.nn.LocalResponseNorm):
            network.set_submodule(name, torch.nn.Identity())
    score = network.score_fr
    torch.nn.init.constant_(score.weight, 1 / score.in_channels)
    slope = torch.arange(992.0, dtype=torch.double).expand(1, 1, 320, -1)
    with torch.no_grad():
        y, level = network(slope), network(torch.ones_like(slope))
    # Zeros around the image lower both; far from its left and right edge they cancel.
    inner = slice(480, 520)
    torch.testing.assert_close((y / level)[0, 0, 160, inner], slope[0, 0, 160, inner], rtol=0, atol=1e-6)


def test_same_padding_interpolates_as_pytorch_does():
    torch.manual_seed(0)
    network = filled(fcn(padding="same"))
    scores = []
    network.score_fr.register_forward_hook(lambda _, __, y: scores.append(y))
    with torch.no_grad():
        y = network(torch.randn(1, 1, 70, 90))
    expected = F.interpolate(scores[0], scale_factor=32, mode="bilinear", align_corners=False)
    torch.testing.assert_close(y, expected[:, :, :70, :90])


@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_less_padding_moves_the_crop_as_much(backbone):
    published = fcn(backbone).crop
    assert fcn(backbone, padding=100 - published).crop == 0
    with pytest.raises(ValueError, match=f"padding must be at least {100 - published} for {backbone}, got 12"):
        fcn(backbone, padding=12)


def test_scores_start_at_zero_and_upsampling_as_asked():
    for upsampling, learned in (("fixed", []), ("inner", ["upscore2", "upscore_pool4"]), ("learned", None)):
        network = fcn(stride=8, upsampling=upsampling)
        found = [name for name, _ in network.named_parameters() if name.startswith("upscore")]
        expected = ["upscore2", "upscore_pool4", "upscore8"] if learned is None else learned
        assert sorted(found) == sorted(f"{name}.weight" for name in expected)
        assert not network(torch.randn(1, 1, 20, 20)).any()


def test_at_once_scales_the_finer_maps():
    torch.manual_seed(0)
    plain = filled(fcn(stride=8))
    at_once = fcn(stride=8, at_once=True).eval()
    at_once.load_state_dict(plain.state_dict())
    for name, scale in (("score_pool4", 0.01), ("score_pool3", 0.0001)):
        plain.get_submodule(name).weight.data *= scale
    x = torch.randn(1, 1, 40, 50)
    with torch.no_grad():
        torch.testing.assert_close(at_once(x), plain(x))


@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_a_finer_stage_starts_from_the_coarser_one(backbone):
    torch.manual_seed(0)
    network = filled(fcn(backbone, padding="same"))
    next(network.parameters()).requires_grad_(False)
    x = torch.randn(1, 1, 96, 96)
    for stride in (16, 8):
        finer = network.refined()
        assert finer.arguments == {**network.arguments, "stride": stride} and finer.training == network.training
        new = finer.state_dict().keys() - network.state_dict().keys()
        assert all(name.startswith(("score_", "upscore")) for name in new) and f"upscore{stride}.weight" in new
        kept = network.state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in finer.state_dict().items() if key in kept)
        assert not finer.get_submodule(finer.fusions[-1].score).weight.any()
        frozen = [name for name, parameter in finer.named_parameters() if not parameter.requires_grad]
        assert frozen == [next(iter(kept))], "what was frozen, and that alone"
        with torch.no_grad():
            coarse, fine = network(x), finer(x)
        assert coarse.std() > 0 and (coarse - fine).abs().mean() < 0.1 * coarse.std()
        network = filled(finer)
    with pytest.raises(ValueError, match="a stride of 8 is the finest"):
        network.refined()


def test_biases_learn_twice_as_fast():
    network = fcn("vgg16_bn", stride=16)
    weights, biases = parameter_groups(network, 0.1)
    assert (weights["lr"], biases["lr"]) == (0.1, 0.2)
    assert len(weights["params"]) + len(biases["params"]) == len(list(network.parameters()))
    assert all(parameter.dim() == 1 for parameter in biases["params"])
    torch.optim.SGD([weights, biases], momentum=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "vgg"}, "backbone must be one of 'vgg16'"),
        ({"stride": 4}, "stride must be one of 32, 16, 8, got 4"),
        ({"upsampling": True}, "upsampling must be one of 'fixed', 'inner', 'learned', got True"),
        ({"padding": "valid"}, "padding must be 'same' or a number of pixels"),
        ({"padding": -1}, "padding must be 'same' or a number of pixels"),
        ({"width": 1 / 100}, "width must leave whole widths"),
        ({"backbone": "googlenet", "width": 0.5}, "GoogLeNet's width is fixed at 1, got 0.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fcn(**arguments)


@pytest.mark.parametrize("network", [fcn(), FCNResNet(1, 2)], ids=["fcn", "fcn_resnet"])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 0, 8), (0, 1, 8, 8)])
def test_bad_images(network, shape):
    with pytest.raises(ValueError, match=r"takes images \(batch, 1, height, width\) of at least one pixel"):
        network(torch.zeros(shape))


def test_parameters():
    with torch.device("meta"):
        counts = {
            build: sum(p.numel() for p in build(aux_loss=True).parameters()) for build in (fcn_resnet50, fcn_resnet101)
        }
        published = [FCN(stride=8), FCN(backbone="alexnet"), FCN(backbone="googlenet")]
    assert list(counts.values()) == [35_322_218, 54_314_346]
    assert [sum(p.numel() for p in n.parameters()) for n in published[:2]] == [134_362_751, 56_954_261]
    assert round(sum(p.numel() for p in published[2].parameters()), -6) == 6_000_000  # the paper's "6M"
    with pytest.raises(ValueError, match="backbone must be resnet50, resnet101 or resnet152, got 'resnet18'"):
        FCNResNet(backbone="resnet18")


def test_resnet_s_losses():
    torch.manual_seed(0)
    network = FCNResNet(1, 3, aux_loss=True, backbone_arguments={"width_per_group": 8}).eval()
    x, targets = torch.randn(2, 1, 33, 40), torch.randint(0, 3, (2, 33, 40))
    targets[:, :10] = 255
    losses, outputs = network(x, targets), network.outputs(x)
    assert list(losses) == ["out", "aux"] and list(outputs) == ["out", "aux"]
    for name, weight in (("out", 1), ("aux", AUX_WEIGHT)):
        expected = weight * F.cross_entropy(outputs[name][:, :, 10:], targets[:, 10:])
        torch.testing.assert_close(losses[name], expected)
    ignored = network(x, torch.full_like(targets, 255))
    assert ignored["out"] == 0 == ignored["aux"]
    sum(ignored.values()).backward()
    assert not any(parameter.grad.any() for parameter in network.parameters())
    assert list(FCNResNet(1, 3, backbone_arguments={"width_per_group": 8})(x, targets)) == ["out"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_resnet_s_targets_may_be_of_any_integers(dtype):
    network = FCNResNet(1, 3, backbone_arguments={"width_per_group": 8}).eval()
    x, targets = torch.randn(1, 1, 33, 40), torch.randint(0, 3, (1, 33, 40))
    targets[:, :10] = 255
    assert network(x, targets.to(dtype)) == network(x, targets)
