"""Classifiers made convolutional, for FCN: their layers in the order in which they run, by the published names.

The last layer that classifies is dropped; fully connected layers are convolutions. torchvision's GoogLeNet keeps the
names that it has there.

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from medseg3d.layers.normalization import LocalResponseNorm
from medseg3d.networks.backbones.googlenet import GoogLeNet
from medseg3d.networks.backbones.vgg import VGG16

FC_WIDTH = 4096


@dataclass
class Trunk:
    """A classifier without its last layer.

    Attributes:
        channels: of its output.
        skips: names and channels of its maps at strides 16 and 8.
        layers: name -> layer, in the order in which they run.
    """

    channels: int = 0
    skips: dict[str, int] = field(default_factory=dict)
    layers: dict[str, nn.Module] = field(default_factory=dict)


def pad_image(layers: Mapping[str, nn.Module], padding: int) -> None:
    """Let the first convolution pad the image by that much."""
    _convs(layers)[0].padding = (padding, padding)


def pad_same(layers: Mapping[str, nn.Module]) -> None:
    """Let each layer give as many entries as its input has, divided by its stride and rounded up (an even kernel of
    stride 1 one more)."""
    for conv in _convs(layers):
        conv.padding = tuple(kernel // 2 for kernel in conv.kernel_size)  # type: ignore[assignment]
    for layer in layers.values():
        if isinstance(layer, nn.MaxPool2d):
            odd = int(layer.kernel_size) % 2  # type: ignore[arg-type]
            layer.padding, layer.ceil_mode = int(layer.kernel_size) // 2 * odd, not odd  # type: ignore[arg-type]


def _convs(layers: Mapping[str, nn.Module]) -> list[nn.Conv2d]:
    return [module for layer in layers.values() for module in layer.modules() if isinstance(module, nn.Conv2d)]


def vgg16(in_channels: int, width: float, dropout: float, batch_norm: bool = False) -> Trunk:
    """Simonyan and Zisserman's 16 layers, with pools that round up."""
    trunk, layers, channels = Trunk(), dict[str, nn.Module](), in_channels
    for stage, widths in enumerate(VGG16, start=1):
        for i, outputs in enumerate(widths, start=1):
            outputs = _scaled(outputs, width)
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, outputs, 3, padding=1)
            if batch_norm:
                layers[f"bn{stage}_{i}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{stage}_{i}"] = nn.ReLU(inplace=True)
            channels = outputs
        layers[f"pool{stage}"] = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        if stage in (3, 4):
            trunk.skips = {f"pool{stage}": channels, **trunk.skips}
    trunk.layers = layers | _fully_connected(channels, 7, width, dropout)
    trunk.channels = _scaled(FC_WIDTH, width)
    return trunk


CAFFENET_WIDTHS = (96, 256, 384, 384, 256)
TORCHVISION_ALEXNET_WIDTHS = (64, 192, 384, 256, 256)


def alexnet(in_channels: int, width: float, dropout: float, torchvision: bool = False) -> Trunk:
    """CaffeNet, or torchvision's AlexNet, which has other widths, neither groups nor response norms."""
    widths = TORCHVISION_ALEXNET_WIDTHS if torchvision else CAFFENET_WIDTHS
    groups = 1 if torchvision else 2
    one, two, three, four, five = (_scaled(outputs, width, multiple=groups) for outputs in widths)

    def pool_and_norm(number: int) -> dict[str, nn.Module]:
        pool: dict[str, nn.Module] = {f"pool{number}": nn.MaxPool2d(3, stride=2, ceil_mode=True)}
        norm = LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        return pool if torchvision else {**pool, f"norm{number}": norm}

    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, one, 11, stride=4),
        "relu1": nn.ReLU(inplace=True),
        **pool_and_norm(1),
        "conv2": nn.Conv2d(one, two, 5, padding=2, groups=groups),
        "relu2": nn.ReLU(inplace=True),
        **pool_and_norm(2),
        "conv3": nn.Conv2d(two, three, 3, padding=1),
        "relu3": nn.ReLU(inplace=True),
        "conv4": nn.Conv2d(three, four, 3, padding=1, groups=groups),
        "relu4": nn.ReLU(inplace=True),
        "conv5": nn.Conv2d(four, five, 3, padding=1, groups=groups),
        "relu5": nn.ReLU(inplace=True),
        "pool5": nn.MaxPool2d(3, stride=2, ceil_mode=True),
        **_fully_connected(five, 6, width, dropout),
    }
    return Trunk(_scaled(FC_WIDTH, width), {"pool2": two, "pool1": one}, layers)


def googlenet(in_channels: int, width: float, dropout: float, torchvision: bool = False) -> Trunk:
    """Up to inception5b: no pooling over the whole map, no dropout, no fully connected layer."""
    if width != 1:
        raise ValueError(f"GoogLeNet's width is fixed at 1, got {width}")
    whole = GoogLeNet(aux_logits=False, init_weights=False, in_channels=in_channels, published=not torchvision)
    layers = dict(whole.named_children())
    names = list(layers)
    end = names.index("inception5b") + 1
    return Trunk(1024, {"maxpool3": 480, "maxpool2": 192}, {name: layers[name] for name in names[:end]})


def _fully_connected(channels: int, kernel: int, width: float, dropout: float) -> dict[str, nn.Module]:
    outputs = _scaled(FC_WIDTH, width)
    return {
        "fc6": nn.Conv2d(channels, outputs, kernel),
        "relu6": nn.ReLU(inplace=True),
        "drop6": nn.Dropout(dropout),
        "fc7": nn.Conv2d(outputs, outputs, 1),
        "relu7": nn.ReLU(inplace=True),
        "drop7": nn.Dropout(dropout),
    }


def _scaled(channels: int, width: float, multiple: int = 1) -> int:
    scaled = channels * width
    if scaled < 1 or scaled % multiple:
        raise ValueError(
            f"width must leave whole widths{f' that {multiple} divides' if multiple > 1 else ''}: "
            f"{channels} * {width} is {scaled}"
        )
    return int(scaled)


TRUNKS: dict[str, Callable[[int, float, float], Trunk]] = {
    "vgg16": vgg16,
    "vgg16_bn": partial(vgg16, batch_norm=True),
    "alexnet": alexnet,
    "googlenet": googlenet,
    "torchvision_alexnet": partial(alexnet, torchvision=True),
    "torchvision_googlenet": partial(googlenet, torchvision=True),
}
