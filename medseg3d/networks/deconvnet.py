"""DeconvNet: Noh, Hong and Han, "Learning deconvolution network for semantic segmentation", ICCV 2015.

VGG16 with batch norm down to one vector, and its mirror image up: unpooling puts values back where the pooling of the
same level took them from, transposed convolutions make the map dense again. Names of layers are those of the published
Caffe net. ``inference.proposals`` applies it to object proposals, as the paper does.

Departures from the paper, each an argument: other widths, other sizes than 224x224.

Shape legend: ``x_BCHW`` is (batch, channels, height, width), K is the number of classes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.derived import is_symbolic
from medseg3d.layers.upsampling import unpool
from medseg3d.networks.backbones.vgg import VGG16

SIZE_MULTIPLE = 32
SMALLEST = 224  # fc6 sees 7x7 entries of 32x32 pixels
FC_WIDTH = 4096
NORMS = ("batch", "folded")


class DeconvNet(nn.Module):
    """Convolutions and poolings with switches, two fully connected layers, unpoolings and transposed convolutions.

    Layers have the published names: ``network.conv1_1``, ``bn1_1``, ``fc6``, ``deconv5_1``, ``fc6-deconv``; this one
    and ``seg-score-voc`` by ``network.get_submodule``.

    Args:
        in_channels: channels of the image.
        out_channels: classes, one logit each.
        norm: "batch", or "folded" as in the published net for inference: what batch norm amounts to then, a scale and
            a shift for each channel. ``folded()`` makes the second from the first.
        width: factor of all hidden widths.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on a size that the network cannot take.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 21, norm: str = "batch", width: float = 1.0) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        self.spatial_dims, self.in_channels, self.out_channels = 2, in_channels, out_channels
        self.norm, self.width = norm, width
        stages = [[_scaled(channels, width) for channels in stage] for stage in VGG16]
        fc = _scaled(FC_WIDTH, width)
        self.stages = [len(stage) for stage in stages]
        channels = in_channels
        for s, stage in enumerate(stages, start=1):
            for i, outputs in enumerate(stage, start=1):
                self._add(f"conv{s}_{i}", f"bn{s}_{i}", nn.Conv2d(channels, outputs, 3, padding=1))
                channels = outputs
        self._add("fc6", "bnfc6", nn.Conv2d(channels, fc, 7))
        self._add("fc7", "bnfc7", nn.Conv2d(fc, fc, 1))
        self._add("fc6-deconv", "fc6-deconv-bn", nn.ConvTranspose2d(fc, channels, 7))
        for s in range(len(stages), 0, -1):
            # The mirror of the stage: it gives what the stage below works with, the first what it gives itself.
            widths = [*stages[s - 1], stages[max(s - 2, 0)][-1]]
            for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
                deconv = nn.ConvTranspose2d(inputs, outputs, 3, padding=1)
                self._add(f"deconv{s}_{i}", f"debn{s}_{i}", deconv)
        self.add_module("seg-score-voc", nn.Conv2d(stages[0][-1], out_channels, 1))
        self.reset_parameters()

    def _add(self, name: str, norm_name: str, layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
        channels = layer.out_channels
        self.add_module(name, layer)
        self.add_module(norm_name, nn.BatchNorm2d(channels) if self.norm == "batch" else ScaleAndShift(channels))

    def reset_parameters(self) -> None:
        """He's normal initial weights on the way down; on the way up the paper's: 0.01, and a shift of 0.001."""
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                if isinstance(layer, nn.ConvTranspose2d) or name == "seg-score-voc":
                    nn.init.normal_(layer.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            else:
                nn.init.ones_(layer.weight)  # type: ignore[arg-type]
                nn.init.constant_(layer.bias, 0.001)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, H, W) of ``x_BCHW``, whose sides are multiples of 32, 224 or more."""
        self._check_shape(x)
        switches: list[torch.Tensor] = []
        sizes: list[tuple[int, ...]] = []
        for s, convs in enumerate(self.stages, start=1):
            for i in range(1, convs + 1):
                x = self._layer(f"conv{s}_{i}", f"bn{s}_{i}", x)
            sizes.append(tuple(x.shape[2:]))
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            switches.append(indices)
        x = self._layer("fc6", "bnfc6", x)
        x = self._layer("fc7", "bnfc7", x)
        x = self._layer("fc6-deconv", "fc6-deconv-bn", x)
        for s in range(len(self.stages), 0, -1):
            x = unpool(x, switches.pop(), sizes.pop())
            for i in range(1, self.stages[s - 1] + 1):
                x = self._layer(f"deconv{s}_{i}", f"debn{s}_{i}", x)
        return getattr(self, "seg-score-voc")(x)

    def _layer(self, name: str, norm_name: str, x: torch.Tensor) -> torch.Tensor:
        return F.relu(getattr(self, norm_name)(getattr(self, name)(x)), inplace=True)

    def _check_shape(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        if x.dim() != 4:
            raise ValueError(f"DeconvNet takes 2 spatial axes, (batch, channels, height, width), got {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"DeconvNet takes images of {self.in_channels} channels, got {tuple(x.shape)}")
        shape = tuple(x.shape[2:])
        good = tuple(max(SMALLEST, -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE) for size in shape)
        if good != shape:
            raise ValueError(
                f"DeconvNet takes sides that are multiples of {SIZE_MULTIPLE} and at least {SMALLEST}, got {shape}; "
                f"the next size that it takes is {good}: resize or pad the image to it"
            )

    def folded(self) -> DeconvNet:
        """The same network for inference, in eval mode, with a scale and a shift in place of each batch norm."""
        deployed = DeconvNet(self.in_channels, self.out_channels, "folded", self.width).to(next(self.parameters()))
        state: dict[str, torch.Tensor] = {}
        for name, layer in self.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
                state |= {f"{name}.weight": scale, f"{name}.bias": layer.bias - layer.running_mean * scale}
            else:
                state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        deployed.load_state_dict(state)
        return deployed.eval()


class ScaleAndShift(nn.Module):
    """A factor and a summand for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x_BCHW``, of the same shape and dtype."""
        return x * self.weight.to(x.dtype)[:, None, None] + self.bias.to(x.dtype)[:, None, None]


def _scaled(channels: int, width: float) -> int:
    if channels * width < 1 or channels * width != int(channels * width):
        raise ValueError(f"width must leave whole widths: {channels} * {width} is {channels * width}")
    return int(channels * width)
