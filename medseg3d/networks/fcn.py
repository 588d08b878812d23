"""FCN: Long, Shelhamer and Darrell, "Fully convolutional networks for semantic segmentation", CVPR 2015 (PAMI 2017), in
the form and with the layer names of the published Caffe nets.

A classifier whose fully connected layers are convolutions gives class scores at 1/32 of the resolution. They are
upsampled bilinearly; at strides 16 and 8 scores of finer maps are added on the way. By how much maps are cropped to lie
on each other is derived from the layers (``layers.sampling``), and gives the numbers in the published files.

Beyond the paper: skips on AlexNet and GoogLeNet, batch norm, narrower nets, and ``padding="same"`` instead of an image
padded by 100 pixels. The initial weights are He's; the paper starts from a trained classifier.

Shape legend: ``x_BCHW`` is (batch, channels, height, width), K is the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.derived import is_symbolic
from medseg3d.layers.sampling import Sampling
from medseg3d.layers.upsampling import BilinearUpsampling
from medseg3d.networks.fcn_trunks import TRUNKS, Trunk, pad_image, pad_same

STRIDES = (32, 16, 8)
UPSAMPLINGS = ("fixed", "inner", "learned")
PUBLISHED_PADDING = 100
# What "at once" multiplies finer maps with before they are scored, as the release does.
AT_ONCE_SCALES = (0.01, 0.0001)


class Fusion(NamedTuple):
    """One addition of finer scores: names of the layers that take part, and how the maps lie on each other.

    ``crop`` entries at the beginning of the finer map lie before the first upsampled one, which lies before the finer
    map if it is negative.
    """

    upsampling: str
    map: str
    score: str
    scale: float
    crop: int


class FCN(nn.Module):
    """A convolutional classifier, class scores of up to three of its maps, and upsampling to the image's size.

    Layers have the published names: ``network.conv1_1``, ``fc6``, ``score_fr``, ``score_pool4``, ``upscore2``. The
    score layers start at zero, as in the paper. Any size of image will do.

    Args:
        in_channels: channels of the image. The public weights want BGR minus (104.00699, 116.66877, 122.67892).
        out_channels: classes, one logit each.
        backbone: a name in ``TRUNKS``: "vgg16", "vgg16_bn", "alexnet" (CaffeNet) and "googlenet" as published;
            "torchvision_alexnet" and "torchvision_googlenet" are the forms that torchvision has weights for.
        stride: 32, 16 or 8: the resolution of the finest scores.
        at_once: train all strides at once: finer maps are scaled down before they are scored.
        padding: zeros around the image, 100 in the published nets, with valid convolutions behind; or "same": every
            layer pads itself and coarse scores are continued beyond their edges. It needs a fraction of the work on
            small images. The weights are the same, their results are not.
        upsampling: "fixed" bilinear, as the release; "inner" learns all but the last, as the paper; "learned" all.
        width: factor of all hidden widths, but for GoogLeNet's.
        dropout: probability of dropout behind fc6 and fc7.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on another shape than (B, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 21,
        backbone: str = "vgg16",
        stride: int = 32,
        at_once: bool = False,
        padding: int | str = PUBLISHED_PADDING,
        upsampling: str = "fixed",
        width: float = 1.0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        _check_choice("backbone", backbone, TRUNKS)
        _check_choice("stride", stride, STRIDES)
        _check_choice("upsampling", upsampling, UPSAMPLINGS)
        if padding != "same" and not (isinstance(padding, int) and padding >= 0):
            raise ValueError(f"padding must be 'same' or a number of pixels such as 100, got {padding!r}")
        trunk = TRUNKS[backbone](in_channels, width, dropout)
        if isinstance(padding, int):
            pad_image(trunk.layers, padding)
        else:
            pad_same(trunk.layers)
        for name, layer in trunk.layers.items():
            self.add_module(name, layer)
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "backbone": backbone,
            "stride": stride,
            "at_once": at_once,
            "padding": padding,
            "upsampling": upsampling,
            "width": width,
            "dropout": dropout,
        }
        self.spatial_dims, self.in_channels, self.out_channels = 2, in_channels, out_channels
        self.trunk_layers = tuple(trunk.layers)
        self.edge = 1 if padding == "same" else 0  # entries by which coarse scores are continued
        self.fusions: list[Fusion] = []
        self.last_upsampling = "upscore" if stride == 32 else f"upscore{stride}"
        grid = self._add_scores(trunk)
        self.crop = grid.offset_of(Sampling())
        if self.crop < 0:
            assert isinstance(padding, int), "same padding reaches beyond the image"
            raise ValueError(f"padding must be at least {padding - self.crop} for {backbone}, got {padding}")
        self.reset_parameters()

    def _add_scores(self, trunk: Trunk) -> Sampling:
        """Add scores, fusions and upsampling; where the last map lies."""
        upsampling, grids = self.arguments["upsampling"], _grids(trunk.layers)
        skips = list(trunk.skips.items())[: STRIDES.index(self.arguments["stride"])]
        scales = AT_ONCE_SCALES if self.arguments["at_once"] else (1.0, 1.0)
        self.score_fr = nn.Conv2d(trunk.channels, self.out_channels, 1)
        grid, name = grids[self.trunk_layers[-1]], "upscore2"
        self.receptive_field = int(grid.field)
        for (pool, channels), scale in zip(skips, scales, strict=False):
            grid = self._add_upsampling(name, grid, grids[pool], learned=upsampling != "fixed")
            crop = grids[pool].offset_of(grid)
            self.fusions.append(Fusion(name, pool, f"score_{pool}", scale, crop))
            self.add_module(f"score_{pool}", nn.Conv2d(channels, self.out_channels, 1))
            grid = grid if crop >= 0 else grids[pool]
            name = f"upscore_{pool}"
        return self._add_upsampling(self.last_upsampling, grid, Sampling(), learned=upsampling == "learned")

    def _add_upsampling(self, name: str, grid: Sampling, onto: Sampling, learned: bool) -> Sampling:
        """Add the layer whose output's entries lie on those of ``onto``; where that output lies."""
        factor = int(grid.step / onto.step)
        for kernel in (2 * factor, 2 * factor - 1):
            up = grid.padded(self.edge).transposed(kernel, factor)
            if up.meets(onto):
                self.add_module(name, BilinearUpsampling(self.out_channels, kernel, factor, learned))
                return up
        raise AssertionError(f"neither kernel aligns {grid} with {onto}")

    def reset_parameters(self) -> None:
        """He's normal initial weights; score layers start at zero."""
        for name, layer in self.named_children():
            for module in layer.modules():
                if isinstance(module, nn.Conv2d):
                    if name.startswith("score"):
                        nn.init.zeros_(module.weight)
                    else:
                        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, H, W) of ``x_BCHW``."""
        self._check_shape(x)
        height, width = x.shape[2:]
        wanted = {fusion.map for fusion in self.fusions}
        maps: dict[str, torch.Tensor] = {}
        for name in self.trunk_layers:
            x = getattr(self, name)(x)
            if name in wanted:
                maps[name] = x
        x = self.score_fr(x)
        for fusion in self.fusions:
            finer = maps.pop(fusion.map)
            finer = getattr(self, fusion.score)(finer if fusion.scale == 1 else finer * fusion.scale)
            x = _add(self._upsampled(fusion.upsampling, x), finer, fusion.crop)
        x = self._upsampled(self.last_upsampling, x)
        return x[:, :, self.crop : self.crop + height, self.crop : self.crop + width].contiguous()

    def _upsampled(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.edge:
            x = F.pad(x, (self.edge,) * 4, mode="replicate")
        return getattr(self, name)(x)

    def _check_shape(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        if x.dim() != 4:
            raise ValueError(f"FCN takes 2 spatial axes, (batch, channels, height, width), got {tuple(x.shape)}")
        if x.shape[1] != self.in_channels or min(x.shape) < 1:
            raise ValueError(
                f"FCN takes images (batch, {self.in_channels}, height, width) of at least one pixel, got "
                f"{tuple(x.shape)}"
            )

    def refined(self) -> FCN:
        """The network of the next stride, 16 for 32 and 8 for 16, to be trained on from this one's weights.

        What is new in it adds nothing before it has learned: score layers start at zero, upsampling is bilinear. The
        logits it starts with are this network's but for the interpolation in two steps; what this one's last upsampling
        has learned is left behind, since the next one enlarges less. Parameters that were frozen stay frozen.

        Raises:
            ValueError: this network has stride 8 already.
        """
        if self.arguments["stride"] == STRIDES[-1]:
            raise ValueError(f"a stride of {STRIDES[-1]} is the finest")
        stride = STRIDES[STRIDES.index(self.arguments["stride"]) + 1]
        finer = FCN(**{**self.arguments, "stride": stride})
        own = finer.state_dict()
        kept = {key: value for key, value in self.state_dict().items() if key in own}
        finer.load_state_dict(kept, strict=False)
        trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        for name, parameter in finer.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
        return finer.train(self.training).to(next(self.parameters()))

    @property
    def crops(self) -> Mapping[str, int]:
        """Entries cut off before the first that is kept: of each finer score map, and of ``"score"``, the last map.

        Negative where it is the coarser map that loses them.
        """
        return {fusion.score: fusion.crop for fusion in self.fusions} | {"score": self.crop}


def parameter_groups(network: nn.Module, lr: float) -> list[dict[str, Any]]:
    """For ``torch.optim.SGD``: biases at twice the rate of weights, as in Caffe's recipes."""
    biases = {id(p) for name, p in network.named_parameters() if name.rpartition(".")[2] == "bias"}
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in biases], "lr": lr},
        {"params": [p for p in parameters if id(p) in biases], "lr": 2 * lr},
    ]


def _grids(layers: Mapping[str, nn.Module]) -> dict[str, Sampling]:
    """Where the map behind each layer lies in the image."""
    grids, grid = {}, Sampling()
    for name, layer in layers.items():
        grids[name] = grid = grid.through(layer)
    return grids


def _add(coarse: torch.Tensor, fine: torch.Tensor, crop: int) -> torch.Tensor:
    """The sum where the maps lie on each other, from the first entry that both have to the last."""
    coarse, fine = _from(coarse, max(0, -crop)), _from(fine, max(0, crop))
    # A slice beyond the end of a map stops there.
    return coarse[:, :, : fine.shape[2], : fine.shape[3]] + fine[:, :, : coarse.shape[2], : coarse.shape[3]]


def _from(x: torch.Tensor, first: int) -> torch.Tensor:
    return x[:, :, first:, first:]


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
