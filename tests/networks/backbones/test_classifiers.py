"""AlexNet, VGG, GoogLeNet and Swin for images: what the reference values do not show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.networks.backbones.alexnet import AlexNet, CaffeNet, alexnet
from medseg3d.networks.backbones.googlenet import GoogLeNet, to_inception_range
from medseg3d.networks.backbones.swin_classifier import SwinClassifier, swin_b, swin_l, swin_s, swin_t
from medseg3d.networks.backbones.vgg import make_layers, vgg11, vgg16, vgg16_bn

COUNTS = [
    (alexnet, {}, 61100840),
    (CaffeNet, {}, 60965224),
    (vgg11, {}, 132863336),
    (vgg16, {}, 138357544),
    (vgg16_bn, {}, 138365992),
    (GoogLeNet, {}, 13004888),
    (GoogLeNet, {"aux_logits": False}, 6624904),
    (GoogLeNet, {"aux_logits": False, "published": True}, 6998552),  # as Caffe's model of the paper
    (swin_t, {}, 28288354),
    (swin_s, {}, 49606258),
    (swin_b, {}, 87768224),
    (swin_l, {}, 196532476),
]
SMALL_SWIN = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def googlenet():
    torch.manual_seed(0)
    return GoogLeNet(3, init_weights=False)


@pytest.mark.parametrize(("build", "arguments", "count"), COUNTS)
def test_numbers_of_parameters(build, arguments, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build(**arguments).parameters()) == count


@pytest.mark.parametrize(
    ("build", "smallest"),
    [
        (lambda: AlexNet(2), 63),
        (lambda: CaffeNet(2), 39),
        (lambda: CaffeNet(2, padding=10), 19),
        (lambda: CaffeNet(2, padding=100), 1),
        (lambda: GoogLeNet(2, init_weights=False), 15),
        (lambda: GoogLeNet(2, init_weights=False, published=True), 31),
        (lambda: vgg11(num_classes=2, init_weights=False), 32),
    ],
)
def test_the_smallest_image(build, smallest):
    network = build().eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, smallest, smallest)).shape == (1, 2)
    with pytest.raises(ValueError, match=f"at least {smallest}x{smallest} pixels, got {smallest - 1}x99"):
        network(torch.zeros(1, 3, smallest - 1, 99))


def test_caffe_s_sizes_and_order():
    pools_first, norms_first = CaffeNet(2).features, CaffeNet(2, norm_first=True).features
    assert [type(layer).__name__ for layer in pools_first[2:4]] == ["MaxPool2d", "LocalResponseNorm"]
    assert [type(layer).__name__ for layer in norms_first[2:4]] == ["LocalResponseNorm", "MaxPool2d"]
    assert pools_first.state_dict().keys() == norms_first.state_dict().keys()
    with torch.no_grad():
        assert pools_first(torch.zeros(1, 3, 227, 227)).shape == (1, 256, 6, 6)


def test_response_norm_is_caffe_s():
    """Each value over (1 + alpha / n times the squares' sum over n channels) to the power of beta."""
    norm = CaffeNet(2).features.norm1
    x = 50 * torch.rand(1, 9, 2, 2)
    squares = torch.stack([x[:, max(0, i - 2) : i + 3].square().sum(1) for i in range(9)], 1)
    torch.testing.assert_close(norm(x), x / (1 + 1e-4 / 5 * squares) ** 0.75)


@pytest.mark.parametrize(("batch_norm", "kinds"), [(False, 3), (True, 4)])
def test_layers_of_given_widths(batch_norm, kinds):
    layers = make_layers(((4,), (6, 8)), batch_norm, in_channels=2)
    assert len({type(layer) for layer in layers}) == kinds
    assert layers(torch.zeros(1, 2, 9, 11)).shape == (1, 8, 2, 2)


def test_googlenet_in_training_gives_the_logits_of_its_heads(googlenet):
    x = torch.randn(2, 3, 64, 64)
    logits, aux2, aux1 = outputs = googlenet.train()(x)
    assert (outputs.aux_logits2, outputs.aux_logits1) == (aux2, aux1)
    assert logits.shape == aux1.shape == aux2.shape == (2, 3)
    (logits.square().sum() + aux1.square().sum() + aux2.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in googlenet.parameters())
    assert isinstance(googlenet.eval()(x), torch.Tensor)
    assert isinstance(GoogLeNet(3, aux_logits=False, init_weights=False).train()(x), torch.Tensor)


def test_the_range_of_inception():
    """What ImageNet's statistics make of a grey value is what 0.5 and 0.5 make of it."""
    value = torch.rand(1, 3, 2, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (value - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(to_inception_range(x), (value - 0.5) / 0.5)
    with pytest.raises(ValueError, match="3 colours, got in_channels=1"):
        GoogLeNet(transform_input=True, in_channels=1)


def test_published_kernels():
    network = GoogLeNet(2, aux_logits=False, published=True, init_weights=False)
    assert network.inception3a.branch3[1].conv.kernel_size == (5, 5)
    assert network.inception3a.branch3[1].conv.bias is not None
    assert network.maxpool4.kernel_size == 3
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


@pytest.mark.parametrize("build", [lambda: AlexNet(2), lambda: GoogLeNet(2, init_weights=False)])
def test_export_and_trace(build):
    network, x = build().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = network(x)
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(network, x)(x), y, rtol=1e-4, atol=1e-5)


def test_swin_takes_every_size_and_gives_the_maps_of_its_stages():
    network = SwinClassifier(**SMALL_SWIN).eval()
    with torch.no_grad():
        for height, width in ((4, 4), (5, 97), (63, 38)):
            x = torch.randn(2, 3, height, width)
            assert network(x).shape == (2, 5)
            sizes = [(8 * 2**i, -(-(height // 4) // 2**i), -(-(width // 4) // 2**i)) for i in range(3)]
            assert [tuple(y.shape[1:]) for y in network.stages(x)] == sizes


def test_the_authors_form_is_the_same_where_windows_fit():
    free, fixed = SwinClassifier(**SMALL_SWIN), SwinClassifier(**SMALL_SWIN, img_size=(48, 48))
    fixed.load_state_dict(free.state_dict())
    x = torch.randn(1, 3, 48, 48)  # grids of 12, 6 and 3 tokens, windows of 3
    with torch.no_grad():
        torch.testing.assert_close(fixed.eval()(x), free.eval()(x))


def test_the_authors_form_has_smaller_windows_on_smaller_grids():
    network = SwinClassifier(**SMALL_SWIN, img_size=(32, 64))  # the last grid is 2x4
    assert network.features[5][1].window_size == (2, 2)
    assert network.features[5][1].shift_size == (0, 0)
    assert network.features[3][1].shift_size == (1, 1)


def test_swin_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"multiple of \(16, 16\), got \(32, 40\)"):
        SwinClassifier(**SMALL_SWIN, img_size=(32, 40))
    with pytest.raises(ValueError, match="absolute_positions need img_size"):
        SwinClassifier(**SMALL_SWIN, absolute_positions=True)
    with pytest.raises(ValueError, match="a number for each stage"):
        SwinClassifier(depths=(2, 2), num_heads=(1, 2, 4))
    with pytest.raises(ValueError, match=r"built for images of \(32, 32\), got \(32, 48\): resize them"):
        SwinClassifier(**SMALL_SWIN, img_size=32)(torch.zeros(1, 3, 32, 48))


def test_a_gradient_reaches_absolute_positions():
    network = SwinClassifier(**SMALL_SWIN, img_size=32, absolute_positions=True, dropout=0.1, stochastic_depth_prob=0.3)
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert network.absolute_pos_embed.grad.any()
