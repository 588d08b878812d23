"""The FCN on a dilated ResNet that torchvision has: a head of two convolutions on a map at 1/8 of the resolution,
interpolated to the image's size. Keywords and state_dict keys are torchvision's.

Only the idea is Long et al.'s (networks/fcn.py): no skips, dilation (Yu, Koltun and Funkhouser, CVPR 2017) instead of
the last two strides, a second head on layer3 to train with (Zhao et al., "Pyramid scene parsing network", CVPR 2017).

Shape legend: ``x_BCHW`` is (batch, channels, height, width), K is the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.derived import is_symbolic
from medseg3d.networks.backbones.resnet import RESNETS, ResNet
from medseg3d.networks.backbones.stages import IntermediateLayerGetter

IGNORED = 255
AUX_WEIGHT = 0.5


class FCNResNet(nn.Module):
    """Logits of a ResNet's last map, and of layer3's for training.

    Args:
        in_channels: channels of the image; 3, normalised with ImageNet's statistics, for the public weights.
        out_channels: classes, one logit each.
        backbone: "resnet50", "resnet101" or "resnet152".
        aux_loss: have the second head.
        backbone_arguments: more keywords of ``ResNet``, such as ``norm_layer``.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on another shape than (B, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 21,
        backbone: str = "resnet50",
        aux_loss: bool = False,
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.out_channels = 2, in_channels, out_channels
        if backbone not in RESNETS or backbone in ("resnet18", "resnet34"):
            raise ValueError(f"backbone must be resnet50, resnet101 or resnet152, got {backbone!r}")
        resnet: ResNet = RESNETS[backbone](
            in_channels=in_channels,
            replace_stride_with_dilation=(False, True, True),
            **(backbone_arguments or {}),
        )
        maps = {"layer3": "aux", "layer4": "out"} if aux_loss else {"layer4": "out"}
        self.backbone = IntermediateLayerGetter(resnet, maps)
        self.classifier = FCNHead(2048, out_channels)
        self.aux_classifier = FCNHead(1024, out_channels) if aux_loss else None

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        """Logits (B, K, H, W) of ``x_BCHW``; with ``targets`` the losses instead.

        Args:
            x: ``x_BCHW``.
            targets: (B, H, W) class indices; ``IGNORED`` pixels count nothing. Where all are, losses are 0.

        Returns:
            Logits, or {"out": loss} and, with the second head, "aux": its loss by ``AUX_WEIGHT``; they are added.
        """
        self._check_shape(x)
        if targets is None:
            return self.outputs(x, only=("out",))["out"]
        weights = {"out": 1.0, "aux": AUX_WEIGHT}
        return {
            name: weights[name] * _cross_entropy(logits.float(), targets) for name, logits in self.outputs(x).items()
        }

    def outputs(self, x: torch.Tensor, only: tuple[str, ...] = ("out", "aux")) -> dict[str, torch.Tensor]:
        """Logits of ``x_BCHW`` by head, as torchvision's network returns them: "out", and "aux" if there is one."""
        maps = self.backbone(x)
        heads = {"out": self.classifier, "aux": self.aux_classifier}
        return {
            name: F.interpolate(head(maps[name]), size=x.shape[2:], mode="bilinear", align_corners=False)
            for name, head in heads.items()
            if head is not None and name in only
        }

    def _check_shape(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        if x.dim() != 4:
            raise ValueError(f"FCNResNet takes 2 spatial axes, (batch, channels, height, width), got {tuple(x.shape)}")
        if x.shape[1] != self.in_channels or min(x.shape) < 1:
            raise ValueError(
                f"FCNResNet takes images (batch, {self.in_channels}, height, width) of at least one pixel, got "
                f"{tuple(x.shape)}"
            )


def _cross_entropy(logits_BKHW: torch.Tensor, classes_BHW: torch.Tensor) -> torch.Tensor:
    """The mean over what is not ignored; 0 where all is."""
    total = F.cross_entropy(logits_BKHW, classes_BHW.long(), ignore_index=IGNORED, reduction="sum")
    return total / (classes_BHW != IGNORED).sum().clamp(min=1)


class FCNHead(nn.Sequential):
    """A 3x3 convolution to a quarter of the channels, batch norm, ReLU, dropout, a 1x1 convolution to the classes."""

    def __init__(self, in_channels: int, channels: int) -> None:
        inner = in_channels // 4
        super().__init__(
            nn.Conv2d(in_channels, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Conv2d(inner, channels, 1),
        )


def fcn_resnet50(num_classes: int = 21, aux_loss: bool = False, **arguments: Any) -> FCNResNet:
    """35,322,218 parameters with 21 classes and ``aux_loss``; ``arguments`` are those of ``FCNResNet``."""
    return FCNResNet(out_channels=num_classes, backbone="resnet50", aux_loss=aux_loss, **arguments)


def fcn_resnet101(num_classes: int = 21, aux_loss: bool = False, **arguments: Any) -> FCNResNet:
    """54,314,346 parameters with 21 classes and ``aux_loss``; ``arguments`` are those of ``FCNResNet``."""
    return FCNResNet(out_channels=num_classes, backbone="resnet101", aux_loss=aux_loss, **arguments)
