"""Feature pyramid networks: Lin et al., CVPR 2017, in the form that torchvision has of it, with its state_dict keys.

Coarse maps are enlarged to the exact size of the next finer one (nearest neighbour) and added to it. Extra levels come
from the coarsest: by subsampling (P6 of Mask R-CNN) or by convolutions (P6 and P7: Lin et al., "Focal loss for dense
object detection", ICCV 2017). With ``global_pool`` the mean of the coarsest input joins its lateral map (Xiong et al.,
"UPSNet", CVPR 2019, section 3.1; Liu et al., "ParseNet", 2015).

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.networks.backbones.resnet import (
    RESNETS,
    STAGES,
    STEM_WIDTH,
    FrozenBatchNorm2d,
    NormLayer,
    train_last_layers,
)
from medseg3d.networks.backbones.stages import IntermediateLayerGetter

Maps = tuple[list[torch.Tensor], list[str]]


class FeaturePyramidNetwork(nn.Module):
    """Maps of one width, one for each of the input maps, and those of ``extra_blocks``.

    Args:
        in_channels_list: channels of the input maps, the finest first.
        out_channels: channels of each output map.
        extra_blocks: makes further levels: ``LastLevelMaxPool()`` or ``LastLevelP6P7(...)``.
        norm_layer: norm behind each convolution, which then has no bias; None for none.
        global_pool: add a 1x1 convolution of the mean of the coarsest map to its lateral map.

    Raises:
        ValueError: a number of channels is not positive; in ``forward``, another number of maps.
    """

    _version = 2  # of the keys: in version 1, of 2021, inner_blocks.0.weight stood for inner_blocks.0.0.weight

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels: int,
        extra_blocks: LastLevelMaxPool | LastLevelP6P7 | None = None,
        norm_layer: NormLayer | None = None,
        *,
        global_pool: bool = False,
    ) -> None:
        super().__init__()
        if not in_channels_list or min(in_channels_list) < 1 or out_channels < 1:
            raise ValueError(f"numbers of channels are positive, got {list(in_channels_list)} and {out_channels}")
        self.inner_blocks = nn.ModuleList(_conv(n, out_channels, 1, norm_layer) for n in in_channels_list)
        self.layer_blocks = nn.ModuleList(_conv(out_channels, out_channels, 3, norm_layer) for _ in in_channels_list)
        self.global_block = _conv(in_channels_list[-1], out_channels, 1, None) if global_pool else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _reset_convolution(module)
        self.extra_blocks = extra_blocks

    def forward(self, x: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Maps by name, the finest first -> maps (B, out_channels, H, W) by the same names, and the extra ones."""
        names, inputs = list(x), list(x.values())
        if len(inputs) != len(self.inner_blocks):
            raise ValueError(f"this pyramid takes {len(self.inner_blocks)} maps, got {len(inputs)}: {', '.join(names)}")
        inner = self.inner_blocks[-1](inputs[-1])
        if self.global_block is not None:
            inner = inner + self.global_block(inputs[-1].mean((2, 3), keepdim=True))
        results = [self.layer_blocks[-1](inner)]
        for i in reversed(range(len(inputs) - 1)):
            lateral = self.inner_blocks[i](inputs[i])
            inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            results.insert(0, self.layer_blocks[i](inner))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, inputs, names)
        return dict(zip(names, results, strict=True))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        if (local_metadata.get("version") or 1) < 2:
            for block in ("inner_blocks", "layer_blocks"):
                for i in range(len(self.inner_blocks)):
                    for kind in ("weight", "bias"):
                        old = f"{prefix}{block}.{i}.{kind}"
                        if old in state_dict:
                            state_dict[f"{prefix}{block}.{i}.0.{kind}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[arg-type]


class LastLevelMaxPool(nn.Module):
    """One more level, every second pixel of the coarsest one, named "pool": P6 of Mask R-CNN."""

    def forward(self, results: list[torch.Tensor], inputs: list[torch.Tensor], names: list[str]) -> Maps:
        pooled = F.max_pool2d(results[-1], kernel_size=1, stride=2)
        return [*results, pooled], [*names, "pool"]


class LastLevelP6P7(nn.Module):
    """Two more levels, "p6" and "p7", by strided convolutions of the coarsest input, or of P5 where widths agree."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for module in (self.p6, self.p7):
            _reset_convolution(module)
        self.use_P5 = in_channels == out_channels

    def forward(self, results: list[torch.Tensor], inputs: list[torch.Tensor], names: list[str]) -> Maps:
        p6 = self.p6(results[-1] if self.use_P5 else inputs[-1])
        p7 = self.p7(F.relu(p6))
        return [*results, p6, p7], [*names, "p6", "p7"]


class BackboneWithFPN(nn.Module):
    """Stages of a network and a pyramid on them: ``body.*`` and ``fpn.*``, the backbone of torchvision's detectors.

    Args:
        backbone: the network.
        return_layers: its children -> names of their maps, the finest first.
        in_channels_list: their channels.
        out_channels: channels of the pyramid.
        extra_blocks: ``LastLevelMaxPool()`` if None.
        norm_layer: norm of the pyramid; None for none.
        global_pool: UPSNet's branch, see ``FeaturePyramidNetwork``.

    Attributes:
        out_channels: channels of each map.
    """

    def __init__(
        self,
        backbone: nn.Module,
        return_layers: Mapping[str, str],
        in_channels_list: Sequence[int],
        out_channels: int,
        extra_blocks: LastLevelMaxPool | LastLevelP6P7 | None = None,
        norm_layer: NormLayer | None = None,
        *,
        global_pool: bool = False,
    ) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(backbone, return_layers)
        extra_blocks = LastLevelMaxPool() if extra_blocks is None else extra_blocks
        self.fpn = FeaturePyramidNetwork(
            in_channels_list, out_channels, extra_blocks, norm_layer, global_pool=global_pool
        )
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, C, H, W) -> maps by name, the finest first."""
        return self.fpn(self.body(x))


def resnet_fpn_backbone(
    backbone_name: str = "resnet50",
    norm_layer: NormLayer = FrozenBatchNorm2d,
    trainable_layers: int = 3,
    returned_layers: Sequence[int] | None = None,
    extra_blocks: LastLevelMaxPool | LastLevelP6P7 | None = None,
    *,
    fpn_norm_layer: NormLayer | None = None,
    out_channels: int = 256,
    global_pool: bool = False,
    **resnet: Any,
) -> BackboneWithFPN:
    """A ResNet with a pyramid on stages 1 to 4, whose maps are named "0" to "3", and "pool".

    Args:
        backbone_name: one of ``RESNETS``.
        norm_layer: norm of the ResNet.
        trainable_layers: how many of conv1, layer1, ..., layer4, from the last one, are trained.
        returned_layers: the stages that the pyramid is built on, (1, 2, 3, 4) if None.
        extra_blocks: ``LastLevelMaxPool()`` if None.
        fpn_norm_layer: norm of the pyramid (``nn.BatchNorm2d`` in torchvision's v2 detectors); None for none.
        out_channels: channels of the pyramid.
        global_pool: UPSNet's branch, see ``FeaturePyramidNetwork``.
        resnet: further arguments of ``ResNet``: ``stride_in_1x1``, ``replace_stride_with_dilation``, ...

    Raises:
        ValueError: an unknown name, or stages out of range.
    """
    if backbone_name not in RESNETS:
        raise ValueError(f"there is no backbone {backbone_name!r}; there are {', '.join(RESNETS)}")
    stages = (1, 2, 3, 4) if returned_layers is None else tuple(returned_layers)
    if not stages or not set(stages) <= {1, 2, 3, 4} or list(stages) != sorted(set(stages)):
        raise ValueError(f"returned_layers are some of 1, 2, 3, 4 in this order, got {returned_layers}")
    network = RESNETS[backbone_name](norm_layer=norm_layer, **resnet)
    train_last_layers(network, trainable_layers)
    return_layers = {STAGES[stage - 1]: str(i) for i, stage in enumerate(stages)}
    expansion = network.fc.in_features // (8 * STEM_WIDTH)
    channels = [STEM_WIDTH * 2 ** (stage - 1) * expansion for stage in stages]
    return BackboneWithFPN(
        network, return_layers, channels, out_channels, extra_blocks, fpn_norm_layer, global_pool=global_pool
    )


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm_layer: Callable[..., nn.Module] | None) -> Any:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm_layer is None)
    return nn.Sequential(conv) if norm_layer is None else nn.Sequential(conv, norm_layer(out_channels))


def _reset_convolution(conv: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
