"""V-Net: Milletari, Navab and Ahmadi, "V-Net: fully convolutional neural networks for volumetric medical image
segmentation", 3DV 2016, in the form in which MONAI 1.6 has it, with its keywords and its state_dict keys.

Departures from the paper, all MONAI's: batch norm after each convolution but the last; ELU instead of PReLU unless
``act`` says otherwise; 1, 2, 3, 2 convolutions on the way down and 2, 2, 1, 1 on the way up instead of 2, 3, 3, 3 and
3, 3, 2, 1; dropout; 2D as well; logits instead of a softmax.

Departure from MONAI: with ``dropout_dim`` 2 or 3 whole channels are dropped in 2D and in 3D alike. MONAI's default of
3 on a 2D network takes the batch for channels and drops whole images.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from medseg3d.layers.convolution import (
    BATCH_NORM,
    CONV,
    DROPOUT,
    TRANSPOSED_CONV,
    NameAndArguments,
    activation_layer,
    check_spatial_dims,
    conv_and_batch_norm,
)

STEM_CHANNELS = 16
SIZE_MULTIPLE = 16  # four halvings


class VNet(nn.Module):
    """Residual stages of 5^3 convolutions between strided convolutions down and up, with skips.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input; a divisor of 16, because the input is tiled to the stem's 16 channels.
        out_channels: channels of the output, one logit a class.
        act: name of the activation or (name, arguments); plain "prelu" has one slope a channel.
        dropout_prob_down: probability of dropout in the two deepest stages on the way down; None for none.
        dropout_prob_up: the same on the way up: before the two deepest up-convolutions, and on every skip.
        dropout_dim: 1 drops single voxels, 2 and 3 whole channels.
        bias: whether the convolutions down to the deepest stage and the last 5^3 one have a bias. Those on the way up
            never have one, the up-convolutions and the 1^3 convolution always.

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
    ) -> None:
        super().__init__()
        self.spatial_dims = n = check_spatial_dims(spatial_dims)
        if in_channels < 1 or STEM_CHANNELS % in_channels:
            raise ValueError(f"in_channels must divide {STEM_CHANNELS}: 1, 2, 4, 8 or 16, got {in_channels}")
        if dropout_dim not in (1, 2, 3):
            raise ValueError(f"dropout_dim must be 1 (voxels), 2 or 3 (whole channels), got {dropout_dim}")

        def dropout(probability: float | None) -> nn.Module:
            if probability is None:
                return nn.Identity()
            return nn.Dropout(probability) if dropout_dim == 1 else DROPOUT[n](probability)

        before_up, on_skip = dropout_prob_up
        self.in_tr = InStage(n, in_channels, act, bias)
        self.down_tr32 = DownStage(n, 32, 1, act, dropout(None), bias)
        self.down_tr64 = DownStage(n, 64, 2, act, dropout(None), bias)
        self.down_tr128 = DownStage(n, 128, 3, act, dropout(dropout_prob_down), bias)
        self.down_tr256 = DownStage(n, 256, 2, act, dropout(dropout_prob_down), bias)
        self.up_tr256 = UpStage(n, 256, 256, 2, act, dropout(before_up), dropout(on_skip))
        self.up_tr128 = UpStage(n, 256, 128, 2, act, dropout(before_up), dropout(on_skip))
        self.up_tr64 = UpStage(n, 128, 64, 1, act, dropout(None), dropout(on_skip))
        self.up_tr32 = UpStage(n, 64, 32, 1, act, dropout(None), dropout(on_skip))
        self.out_tr = nn.Sequential(
            OrderedDict(
                conv_block=conv_and_batch_norm(n, 32, out_channels, 5, bias),
                act_function1=activation_layer(act, out_channels),
                conv2=CONV[n](out_channels, out_channels, 1),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, *spatial) of ``x_BC...``."""
        if not torch.jit.is_scripting():
            self._check_size(x.shape[2:])
        skip16 = self.in_tr(x)
        skip32 = self.down_tr32(skip16)
        skip64 = self.down_tr64(skip32)
        skip128 = self.down_tr128(skip64)
        x = self.down_tr256(skip128)
        x = self.up_tr256(x, skip128)
        x = self.up_tr128(x, skip64)
        x = self.up_tr64(x, skip32)
        x = self.up_tr32(x, skip16)
        return self.out_tr(x)

    def _check_size(self, spatial_shape: Sequence[int]) -> None:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        if len(spatial_shape) != self.spatial_dims:
            raise ValueError(f"VNet takes {self.spatial_dims} spatial axes, got a shape of {tuple(spatial_shape)}")
        good = tuple(max(1, -(-size // SIZE_MULTIPLE)) * SIZE_MULTIPLE for size in spatial_shape)
        if good != tuple(spatial_shape):
            raise ValueError(
                f"VNet takes axes that are multiples of {SIZE_MULTIPLE}, got {tuple(spatial_shape)}; "
                f"the next size that it takes is {good}: pad the input to it"
            )


class InStage(nn.Module):
    """One convolution to 16 channels, to which the input is added, tiled as often as it fits."""

    def __init__(self, spatial_dims: int, in_channels: int, act: NameAndArguments, bias: bool) -> None:
        super().__init__()
        self.tiles = STEM_CHANNELS // in_channels
        self.conv_block = conv_and_batch_norm(spatial_dims, in_channels, STEM_CHANNELS, 5, bias)
        self.act_function = activation_layer(act, STEM_CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act_function(self.conv_block(x) + torch.cat([x] * self.tiles, dim=1))


class DownStage(nn.Module):
    """Half the size and twice the channels, then a residual stage of ``convs`` convolutions."""

    def __init__(
        self, spatial_dims: int, channels: int, convs: int, act: NameAndArguments, dropout: nn.Module, bias: bool
    ) -> None:
        super().__init__()
        self.down_conv = CONV[spatial_dims](channels // 2, channels, 2, stride=2, bias=bias)
        self.bn1 = BATCH_NORM[spatial_dims](channels)
        self.act_function1 = activation_layer(act, channels)
        self.dropout = dropout
        self.ops = _convs(spatial_dims, channels, convs, act, bias)
        self.act_function2 = activation_layer(act, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act_function1(self.bn1(self.down_conv(x)))
        return self.act_function2(self.ops(self.dropout(x)) + x)


class UpStage(nn.Module):
    """Twice the size, the skip's channels beside as many of its own, then a residual stage of ``convs``."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        convs: int,
        act: NameAndArguments,
        dropout: nn.Module,
        skip_dropout: nn.Module,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.up_conv = TRANSPOSED_CONV[spatial_dims](in_channels, channels // 2, 2, stride=2)
        self.bn1 = BATCH_NORM[spatial_dims](channels // 2)
        self.act_function1 = activation_layer(act, channels // 2)
        self.dropout2 = skip_dropout
        self.ops = _convs(spatial_dims, channels, convs, act, bias=False)
        self.act_function2 = activation_layer(act, channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.act_function1(self.bn1(self.up_conv(self.dropout(x))))
        x = torch.cat([x, self.dropout2(skip)], dim=1)
        return self.act_function2(self.ops(x) + x)


def _convs(spatial_dims: int, channels: int, count: int, act: NameAndArguments, bias: bool) -> nn.Sequential:
    """``count`` times convolution, norm, activation; the keys are ``N.conv_block.*`` and ``N.act_function.*``."""
    return nn.Sequential(
        *(
            nn.Sequential(
                OrderedDict(
                    conv_block=conv_and_batch_norm(spatial_dims, channels, channels, 5, bias),
                    act_function=activation_layer(act, channels),
                )
            )
            for _ in range(count)
        )
    )
