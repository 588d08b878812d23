"""ResNet: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, in the form that
torchvision has of it, with its keywords and state_dict keys.

The form differs from the paper in one point: in a bottleneck that halves the size, the 3x3 convolution strides and not
the first 1x1 one ("v1.5"). With ``stride_in_1x1`` it is the paper's, which Caffe's and Detectron's weights need.
``replace_stride_with_dilation`` keeps the resolution of late stages (Yu, Koltun and Funkhouser, CVPR 2017).

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.networks.backbones.stages import check_images

NormLayer = Callable[[int], nn.Module]
STEM_WIDTH = 64
STAGES = ("layer1", "layer2", "layer3", "layer4")


class FrozenBatchNorm2d(nn.Module):
    """Batch norm that never changes: statistics, scale and shift are buffers, in training as well.

    It has no counter of batches; one in a file is left aside, so files of ``nn.BatchNorm2d`` load.

    Args:
        num_features: channels.
        eps: added to the variance. The public Mask R-CNN weights of COCO need 0.0.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight: torch.Tensor
        self.bias: torch.Tensor
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, of ResNet-18 and ResNet-34."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError(
                "basic blocks take no groups, no other width than 64 and no dilation, got "
                f"groups={groups}, width_per_group={base_width}, dilation={dilation}: use a network of bottlenecks"
            )
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + shortcut)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut, of ResNet-50 and deeper ones."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, stride_1x1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride_3x3, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x + shortcut)


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Without bias; it keeps the size but for its stride."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """Without bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class ResNet(nn.Module):
    """A classifier; its stages ``layer1`` to ``layer4`` halve the size to 1/4, 1/8, 1/16 and 1/32.

    ``IntermediateLayerGetter(network, {"layer1": "0", ...})`` gives the maps of its stages.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        layers: blocks in each of the four stages.
        num_classes: classes, one logit each.
        zero_init_residual: start with blocks that do nothing (the last norm's scale is 0).
        groups: groups of the 3x3 convolutions of bottlenecks (ResNeXt).
        width_per_group: their channels in each group, for 64 of the stage.
        replace_stride_with_dilation: for ``layer2``, ``layer3`` and ``layer4``, whether it keeps its input's
            resolution and dilates its convolutions instead.
        norm_layer: makes a norm from a number of channels: ``nn.BatchNorm2d``, ``FrozenBatchNorm2d`` or a ``partial``.
        in_channels: channels of the images.
        stride_in_1x1: let the first 1x1 convolution of a bottleneck stride (Caffe, Detectron) and not the 3x3 one.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on another shape than (B, in_channels, H, W).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else tuple(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation needs a choice for each of layer2, layer3 and layer4, got "
                f"{replace_stride_with_dilation}"
            )
        if len(layers) != len(STAGES):
            raise ValueError(f"layers needs a number of blocks for each of {len(STAGES)} stages, got {layers}")
        norm_layer = norm_layer or nn.BatchNorm2d
        block_arguments: dict[str, Any] = {"groups": groups, "base_width": width_per_group, "norm_layer": norm_layer}
        block_arguments["stride_in_1x1"] = stride_in_1x1
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(STEM_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes, dilation, stages = STEM_WIDTH, 1, []
        for i, blocks in enumerate(layers):
            planes, stride = STEM_WIDTH * 2**i, 1 if i == 0 else 2
            stage_dilation = dilation
            if i > 0 and dilate[i - 1]:
                stride, stage_dilation = 1, 2 * dilation
            stages.append(_stage(block, inplanes, planes, blocks, stride, (dilation, stage_dilation), block_arguments))
            inplanes, dilation = planes * block.expansion, stage_dilation
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        self.reset_parameters(zero_init_residual)

    def reset_parameters(self, zero_init_residual: bool = False) -> None:
        """He's normal initial weights; norms that do nothing."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck | BasicBlock):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of ``x_BCHW``."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_channels, "ResNet")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int,
    dilations: tuple[int, int],
    arguments: Mapping[str, Any],
) -> nn.Sequential:
    """The blocks of a stage; ``dilations`` of the first block, which sees the input's grid, and of the others."""
    outplanes, norm_layer = planes * block.expansion, arguments["norm_layer"]
    downsample = None
    if stride != 1 or inplanes != outplanes:
        downsample = nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))
    first = block(inplanes, planes, stride, downsample, dilation=dilations[0], **arguments)
    rest = [block(outplanes, planes, dilation=dilations[1], **arguments) for _ in range(1, blocks)]
    return nn.Sequential(first, *rest)


def resnet18(**arguments: Any) -> ResNet:
    """11,689,512 parameters; ``arguments`` are those of ``ResNet`` from ``num_classes`` on, here and below."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **arguments)


def resnet34(**arguments: Any) -> ResNet:
    """21,797,672 parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **arguments)


def resnet50(**arguments: Any) -> ResNet:
    """25,557,032 parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **arguments)


def resnet101(**arguments: Any) -> ResNet:
    """44,549,160 parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **arguments)


def resnet152(**arguments: Any) -> ResNet:
    """60,192,808 parameters."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **arguments)


RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}


def train_last_layers(network: nn.Module, trainable_layers: int) -> None:
    """Freeze all parameters but those of the last ``trainable_layers`` of conv1, layer1, ..., layer4 (5: all).

    Raises:
        ValueError: ``trainable_layers`` does not lie between 0 and 5.
    """
    parts = [*reversed(STAGES), "conv1", "bn1"]
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must lie between 0 (all frozen) and 5 (none), got {trainable_layers}")
    trained = parts if trainable_layers == 5 else parts[:trainable_layers]
    for name, parameter in network.named_parameters():
        if name.partition(".")[0] not in trained:
            parameter.requires_grad_(False)
