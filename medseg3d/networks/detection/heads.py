"""What the detectors learn beside their backbone: the convolutions and linear layers of the RPN, box and mask heads,
with torchvision's state_dict keys. Ren et al., "Faster R-CNN", 2015; He et al., "Mask R-CNN", ICCV 2017, figure 4;
the deeper box head is that of Wu and He, "Group normalization", ECCV 2018, section 4.2.

Shape legend: ``x_BCHW`` are maps of images, ``x_RCPQ`` features of R regions; A anchors of a pixel; K classes with
background as class 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.networks.backbones.resnet import NormLayer


class RPNHead(nn.Module):
    """Objectness and regression of every anchor, by the same convolutions on every map.

    Args:
        in_channels: channels of the maps.
        num_anchors: anchors of a pixel.
        conv_depth: 3x3 convolutions before the two 1x1 ones (2 in torchvision's v2 detectors).
    """

    _version = 2  # of the keys: in version 1, of 2021, conv.weight stood for conv.0.0.weight

    def __init__(self, in_channels: int, num_anchors: int, conv_depth: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(_block(in_channels, in_channels) for _ in range(conv_depth)))
        self.cls_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * num_anchors, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(_bias(module))

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps (B, C, H, W) -> logits (B, A, H, W) and codes (B, 4 A, H, W) of each."""
        hidden = [self.conv(x_BCHW) for x_BCHW in maps]
        return [self.cls_logits(x) for x in hidden], [self.bbox_pred(x) for x in hidden]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        _rename(state_dict, local_metadata, {f"{prefix}conv.": f"{prefix}conv.0.0."})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[arg-type]


class TwoMLPHead(nn.Module):
    """Two linear layers on the flattened features of a region.

    Args:
        in_channels: features of a region, channels times bins.
        representation_size: width of both layers.
    """

    def __init__(self, in_channels: int, representation_size: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels, representation_size)
        self.fc7 = nn.Linear(representation_size, representation_size)

    def forward(self, x_RCPQ: torch.Tensor) -> torch.Tensor:
        """(R, representation_size)."""
        return F.relu(self.fc7(F.relu(self.fc6(x_RCPQ.flatten(1)))))


class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions, then linear layers.

    Args:
        input_size: (channels, bins, bins) of a region's features.
        conv_layers: width of each convolution.
        fc_layers: width of each linear layer.
        norm_layer: norm behind each convolution, which then has no bias; None for none.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        conv_layers: Sequence[int],
        fc_layers: Sequence[int],
        norm_layer: NormLayer | None = None,
    ) -> None:
        channels, height, width = input_size
        blocks: list[nn.Module] = []
        for wide in conv_layers:
            blocks.append(_block(channels, wide, norm_layer))
            channels = wide
        blocks.append(nn.Flatten())
        features = channels * height * width
        for wide in fc_layers:
            blocks += [nn.Linear(features, wide), nn.ReLU(inplace=True)]
            features = wide
        super().__init__(*blocks)
        _he_normal(self)


class FastRCNNPredictor(nn.Module):
    """Logits of the classes, and codes of a box for each class.

    Args:
        in_channels: width of a region's features.
        num_classes: classes, with background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes)

    def forward(self, x_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, F) -> (R, K) and (R, 4 K)."""
        x_RF = x_RF.flatten(1)
        return self.cls_score(x_RF), self.bbox_pred(x_RF)


class MaskRCNNHeads(nn.Sequential):
    """3x3 convolutions.

    Args:
        in_channels: channels of a region's features.
        layers: width of each convolution.
        dilation: of all of them.
        norm_layer: norm behind each one, which then has no bias; None for none.
    """

    _version = 2  # of the keys: in version 1, of 2021, mask_fcn1.weight stood for 0.0.weight

    def __init__(
        self, in_channels: int, layers: Sequence[int], dilation: int = 1, norm_layer: NormLayer | None = None
    ) -> None:
        inputs = [in_channels, *layers[:-1]]
        super().__init__(*(_block(a, b, norm_layer, dilation) for a, b in zip(inputs, layers, strict=True)))
        _he_normal(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        _rename(state_dict, local_metadata, {f"{prefix}mask_fcn{i + 1}.": f"{prefix}{i}.0." for i in range(len(self))})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[arg-type]


class MaskRCNNPredictor(nn.Sequential):
    """Twice the size, then a mask for each class.

    Args:
        in_channels: channels of the mask head.
        dim_reduced: channels of the enlarged maps.
        num_classes: classes, with background.
    """

    def __init__(self, in_channels: int, dim_reduced: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, dim_reduced, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.mask_fcn_logits = nn.Conv2d(dim_reduced, num_classes, 1)
        for weight in (self.conv5_mask.weight, self.mask_fcn_logits.weight):
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def _block(inputs: int, outputs: int, norm_layer: NormLayer | None = None, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution that keeps the size, its norm and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=norm_layer is None)
    norm = [] if norm_layer is None else [norm_layer(outputs)]
    return nn.Sequential(conv, *norm, nn.ReLU(inplace=True))


def _he_normal(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _bias(module: nn.Conv2d) -> torch.Tensor:
    assert module.bias is not None
    return module.bias


def _rename(state_dict: dict[str, Any], metadata: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """The names of 2021 in a state_dict, where it has them, to those of now."""
    if (metadata.get("version") or 1) < 2:
        for old, new in names.items():
            for kind in ("weight", "bias"):
                if old + kind in state_dict:
                    state_dict[new + kind] = state_dict.pop(old + kind)
