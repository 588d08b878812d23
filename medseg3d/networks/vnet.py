"""V-Net: Milletari, Navab and Ahmadi, "V-Net: fully convolutional neural networks for volumetric medical image
segmentation", 3DV 2016: ``VNet`` in the form in which MONAI 1.6 has it, with its keywords and its state_dict keys, and
``milletari_vnet`` as published.

What MONAI's form does otherwise than the paper: batch norm after each convolution but the last; ELU instead of PReLU,
and one more before a stage's input is added; no biases; dropout; after the 16-channel stage, which has one convolution
in either, 1, 2, 3, 2 of them down and 2, 2, 1, 1 up instead of 2, 3, 3, 3 and 3, 3, 2, 1. What both forms do otherwise:
2D as well; other widths; logits instead of a softmax.

Departure from MONAI: with ``dropout_dim`` 2 or 3 whole channels are dropped in 2D and in 3D alike. MONAI's default of
3 on a 2D network takes the batch for channels and drops whole images.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.convolution import (
    CONV,
    DROPOUT,
    TRANSPOSED_CONV,
    NameAndArguments,
    activation_layer,
    check_spatial_dims,
    is_convolution,
)
from medseg3d.layers.derived import check_axes, is_hooked, is_plain_eager, is_symbolic, must_be_called
from medseg3d.layers.layout import MEMORY_FORMAT, channels_last
from medseg3d.layers.transformer import recompute_in_backward

SIZE_MULTIPLE = 16  # four halvings
# Convolutions of the four stages down after the first, and of the four up.
MONAI_CONVS = (1, 2, 3, 2, 2, 2, 1, 1)
PUBLISHED_CONVS = (2, 3, 3, 3, 3, 3, 2, 1)


class VNet(nn.Module):
    """Residual stages of 5^3 convolutions between strided convolutions down and up, with skips.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input; a divisor of ``width``, because the input is tiled to the first stage's
            channels and added to them.
        out_channels: channels of the output, one logit a class.
        act: name of the activation or (name, arguments); plain "prelu" has one slope a channel.
        dropout_prob_down: probability of dropout in the two deepest stages on the way down; None for none.
        dropout_prob_up: the same on the way up: before the two deepest up-convolutions, and on every skip.
        dropout_dim: 1 drops single voxels, 2 and 3 whole channels.
        bias: whether the convolutions down to the deepest stage and the last 5^3 one have a bias. Those on the way up
            have one only if ``published``, the up-convolutions and the 1^3 convolution always.
        width: channels of the first stage, 16 as published; 2, 4, 8 and 16 times as many follow. 8 or 12 make light
            models: operations and parameters go with its square.
        published: the paper's number of convolutions in each stage, no batch norm, no activation before a stage's
            input is added. ``milletari_vnet`` sets ``act``, ``bias`` and the dropouts as well.
        use_checkpoint: in training, compute what is inside of a stage again in the backward pass instead of keeping it.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on a size that is not a multiple of 16.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        act: NameAndArguments = ("elu", {"inplace": True}),
        dropout_prob_down: float | None = 0.5,
        dropout_prob_up: tuple[float | None, float | None] = (0.5, 0.5),
        dropout_dim: int = 3,
        bias: bool = False,
        *,
        width: int = 16,
        published: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = n = check_spatial_dims(spatial_dims)
        if dropout_dim not in (1, 2, 3):
            raise ValueError(f"dropout_dim must be 1 (voxels), 2 or 3 (whole channels), got {dropout_dim}")
        _check_width(width, in_channels)

        def dropout(probability: float | None) -> nn.Module:
            if probability is None:
                return nn.Identity()
            return nn.Dropout(probability) if dropout_dim == 1 else DROPOUT[n](probability)

        def down(scale: int, count: int, probability: float | None) -> DownStage:
            return DownStage(n, scale * width, count, act, published, dropout(probability), bias)

        def up(inputs: int, scale: int, count: int, probability: float | None) -> UpStage:
            drops = dropout(probability), dropout(on_skip)
            return UpStage(n, inputs * width, scale * width, count, act, published, *drops, bias and published)

        before_up, on_skip = dropout_prob_up
        convs = PUBLISHED_CONVS if published else MONAI_CONVS
        self.in_tr = InStage(n, in_channels, width, act, published, bias)
        # The numbers in the names, as in MONAI, are the channels at a width of 16.
        self.down_tr32 = down(2, convs[0], None)
        self.down_tr64 = down(4, convs[1], None)
        self.down_tr128 = down(8, convs[2], dropout_prob_down)
        self.down_tr256 = down(16, convs[3], dropout_prob_down)
        self.up_tr256 = up(16, 16, convs[4], before_up)
        self.up_tr128 = up(16, 8, convs[5], before_up)
        self.up_tr64 = up(8, 4, convs[6], None)
        self.up_tr32 = up(4, 2, convs[7], None)
        self.out_tr = OutStage(n, 2 * width, out_channels, act, published, bias)
        if use_checkpoint:
            for stage in self.children():
                recompute_in_backward(stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, *spatial) of ``x_BC...``, in channels-last memory format."""
        if not torch.jit.is_scripting():
            self._check_size(x)
            # A clone, because contiguous() does not mark a single channel as channels-last.
            x = x.clone(memory_format=MEMORY_FORMAT[x.dim()])
        skips = [self.in_tr(x)]
        skips.append(self.down_tr32(skips[-1]))
        skips.append(self.down_tr64(skips[-1]))
        skips.append(self.down_tr128(skips[-1]))
        x = self.down_tr256(skips[-1])
        # In two steps: what was joined is free before the convolutions ask for memory.
        x = self.up_tr256.join(x, skips.pop())
        x = self.up_tr256(x)
        x = self.up_tr128.join(x, skips.pop())
        x = self.up_tr128(x)
        x = self.up_tr64.join(x, skips.pop())
        x = self.up_tr64(x)
        x = self.up_tr32.join(x, skips.pop())
        x = self.up_tr32(x)
        return self.out_tr(x)

    def _check_size(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        check_axes(x, self.spatial_dims, self.in_tr, "VNet")
        spatial_shape = x.shape[2:]
        good = tuple(max(1, -(-size // SIZE_MULTIPLE)) * SIZE_MULTIPLE for size in spatial_shape)
        if good != tuple(spatial_shape):
            raise ValueError(
                f"VNet takes axes that are multiples of {SIZE_MULTIPLE}, got {tuple(spatial_shape)}; "
                f"the next size that it takes is {good}: pad the input to it"
            )


def milletari_vnet(in_channels: int = 1, out_channels: int = 2, **overrides: Any) -> VNet:
    """The network of Milletari et al. 2016, figure 2: 128x128x64 at 1x1x1.5 mm in the paper.

    PReLU, biases, no norm, no dropout, 20 convolutions of 5^3 in its stages instead of 15, the initial weights of the
    released code. ``overrides`` are keywords of ``VNet``.
    """
    figure_2: dict[str, Any] = {"published": True, "act": "prelu", "bias": True}
    no_dropout: dict[str, Any] = {"dropout_prob_down": None, "dropout_prob_up": (None, None)}
    network = VNet(in_channels=in_channels, out_channels=out_channels, **{**figure_2, **no_dropout, **overrides})
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            # "Xavier" of Caffe: uniform with a variance of one over the number of inputs.
            bound = (3 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


class InStage(nn.Module):
    """One convolution, to which the input is added, tiled as often as it fits."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        act: NameAndArguments,
        published: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.tiles = channels // in_channels
        self.conv_block = _conv_and_norm(spatial_dims, in_channels, channels, published, bias)
        self.act_function = activation_layer(act, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_block(x)
        x = x.to(y.dtype)
        in_place = not torch.is_grad_enabled()
        if not torch.jit.is_scripting():
            in_place = _may_overwrite(self.conv_block)
        if in_place:
            y.unflatten(1, (self.tiles, x.shape[1])).add_(x.unsqueeze(1))
        else:
            y = y + torch.cat([x] * self.tiles, dim=1)
        return self.act_function(y)


class DownStage(nn.Module):
    """Half the size and twice the channels, then a residual stage of ``convs`` convolutions."""

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        convs: int,
        act: NameAndArguments,
        published: bool,
        dropout: nn.Module,
        bias: bool,
    ) -> None:
        super().__init__()
        self.down_conv = CONV[spatial_dims](channels // 2, channels, 2, stride=2, bias=bias)
        self.bn1 = _norm(channels, published)
        self.act_function1 = activation_layer(act, channels)
        self.dropout = dropout
        self.ops = _convs(spatial_dims, channels, convs, act, published, bias)
        self.act_function2 = activation_layer(act, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        in_place = not torch.is_grad_enabled()
        if torch.jit.is_scripting():
            x = self.bn1(self.down_conv(x))
        else:
            in_place = _may_overwrite(self.ops)
            # PyTorch's convolutions of small float32 tensors do not keep the memory format.
            x = _normalize(self.bn1, channels_last(self.down_conv(x)), self.down_conv)
        x = self.act_function1(x)
        return self.act_function2(_add(self.ops(self.dropout(x)), x, in_place))


class UpStage(nn.Module):
    """Twice the size, the skip's channels beside as many of its own, then a residual stage of ``convs``."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        convs: int,
        act: NameAndArguments,
        published: bool,
        dropout: nn.Module,
        skip_dropout: nn.Module,
        bias: bool,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.up_conv = TRANSPOSED_CONV[spatial_dims](in_channels, channels // 2, 2, stride=2)
        self.bn1 = _norm(channels // 2, published)
        self.act_function1 = activation_layer(act, channels // 2)
        self.dropout2 = skip_dropout
        self.ops = _convs(spatial_dims, channels, convs, act, published, bias)
        self.act_function2 = activation_layer(act, channels)

    def join(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """What ``forward`` takes: ``x_BC...`` at twice its size, and beside it ``skip_BC...``."""
        x = self.up_conv(self.dropout(x))
        if torch.jit.is_scripting():
            x = self.bn1(x)
        else:
            x = _normalize(self.bn1, channels_last(x), self.up_conv)
        x = self.act_function1(x)
        return torch.cat([x, self.dropout2(skip)], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        in_place = not torch.is_grad_enabled()
        if not torch.jit.is_scripting():
            in_place = _may_overwrite(self.ops)
        return self.act_function2(_add(self.ops(x), x, in_place))


class OutStage(nn.Module):
    """A 5^3 and a 1^3 convolution to one logit a class."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        act: NameAndArguments,
        published: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.conv_block = _conv_and_norm(spatial_dims, in_channels, out_channels, published, bias)
        self.act_function1 = activation_layer(act, out_channels)
        self.conv2 = CONV[spatial_dims](out_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act_function1(self.conv_block(x))
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript would compile one long condition
            if not is_convolution(self.conv2, CONV[x.dim() - 2], 1) or must_be_called(self.conv2):
                return self.conv2(x)
        # As a matrix product: oneDNN's 1^3 convolution of a channels-last tensor is slow in float32.
        return F.linear(x.movedim(1, -1), self.conv2.weight.flatten(1), self.conv2.bias).movedim(-1, 1)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of 2D and 3D."""

    if TYPE_CHECKING:  # TorchScript would read annotations
        running_mean: torch.Tensor
        running_var: torch.Tensor
        num_batches_tracked: torch.Tensor
        momentum: float | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches, as PyTorch has it
                momentum = 1.0 / float(self.num_batches_tracked)
        own = self.training or self.running_mean is None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own, momentum, self.eps)

    @torch.jit.unused
    def overwrite(self, x: torch.Tensor) -> torch.Tensor:
        """The same in eval mode, in the memory of ``x``: fresh memory costs more time than the norm."""
        precision = torch.promote_types(x.dtype, torch.float32)  # the one that PyTorch's norm computes in
        weight, bias, mean, variance = (
            t.to(precision) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        unused = torch.empty(0, dtype=precision)
        torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, self.eps, out=(x, unused, unused))
        return x


class _ConvAndNorm(nn.Sequential):
    """A convolution ``conv`` and its norm, the only one in ``adn``: the keys are those of MONAI."""

    if TYPE_CHECKING:  # TorchScript would read annotations
        conv: Any
        adn: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            adn = self.adn
            if type(adn) is nn.Sequential and len(adn) == len(self) - 1 == 1 and not is_hooked(adn):
                return _normalize(adn[0], self.conv(x), self.conv)
        for layer in self:
            x = layer(x)
        return x


def _check_width(width: int, in_channels: int) -> None:
    if width < 2 or width % 2:
        raise ValueError(f"width must be an even number of 2 or more, got {width}")
    if in_channels < 1 or width % in_channels:
        divisors = ", ".join(str(n) for n in range(1, width) if width % n == 0)
        raise ValueError(f"in_channels must divide the width {width}: {divisors} or {width}, got {in_channels}")


def _norm(channels: int, published: bool) -> nn.Module:
    return nn.Identity() if published else _BatchNorm(channels)


def _normalize(norm: nn.Module, x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """The norm of ``x``, which ``conv`` has made; written over it where nothing else needs it."""
    if type(norm) is not _BatchNorm or norm.training or norm.running_mean is None or "forward" in vars(norm):
        return norm(x)
    # What is no convolution any more may have given its input.
    is_own = isinstance(conv, nn.modules.conv._ConvNd) and x.device.type == "cpu" and is_plain_eager()
    return norm.overwrite(x) if is_own and _may_overwrite(norm, conv) else norm(x)


def _may_overwrite(*makers: nn.Module) -> bool:
    """Whether what the modules made is of no further use: no gradient is asked, and no hook has seen it."""
    return not torch.is_grad_enabled() and (torch.compiler.is_compiling() or not is_hooked(*makers))


def _add(y: torch.Tensor, x: torch.Tensor, in_place: bool) -> torch.Tensor:
    """y + x; in the memory of ``y`` where that is allowed."""
    return y.add_(x) if in_place else y + x


def _conv_and_norm(
    spatial_dims: int, in_channels: int, out_channels: int, published: bool, bias: bool
) -> nn.Sequential:
    """A 5^n convolution that keeps the size, and its norm; the keys ``conv.*`` and ``adn.N.*`` are those of MONAI."""
    conv = CONV[spatial_dims](in_channels, out_channels, 5, padding=2, bias=bias)
    adn = nn.Sequential(OrderedDict(N=_norm(out_channels, published)))
    return _ConvAndNorm(OrderedDict(conv=conv, adn=adn))


def _convs(
    spatial_dims: int, channels: int, count: int, act: NameAndArguments, published: bool, bias: bool
) -> nn.Sequential:
    """``count`` times convolution, norm, activation; the keys are ``N.conv_block.*`` and ``N.act_function.*``."""

    def block(last: bool) -> nn.Sequential:
        conv_block = _conv_and_norm(spatial_dims, channels, channels, published, bias)
        activation = nn.Identity() if published and last else activation_layer(act, channels)
        return nn.Sequential(OrderedDict(conv_block=conv_block, act_function=activation))

    return nn.Sequential(*(block(last=i == count - 1) for i in range(count)))
