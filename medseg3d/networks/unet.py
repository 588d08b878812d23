"""U-Net in 2D (Ronneberger et al., MICCAI 2015) and 3D (Cicek et al., MICCAI 2016).

Departures from the papers, each an argument: convolutions are padded unless ``padding="valid"``, so that the output has
the input's size; norm, activation, strides and widths are free.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from medseg3d.layers.convolution import (
    CONV,
    DROPOUT,
    MAX_POOL,
    TRANSPOSED_CONV,
    NameAndArguments,
    activation_layer,
    centre_crop,
    check_spatial_dims,
    norm_layer,
    per_axis,
)
from medseg3d.layers.derived import check_axes, is_hooked, is_plain_eager, is_symbolic
from medseg3d.layers.normalization import normalize_and_activate, slope_of
from medseg3d.layers.transformer import recompute_in_backward

RONNEBERGER_CHANNELS = (64, 128, 256, 512, 1024)
CICEK_CHANNELS = ((32, 64), (64, 128), (128, 256), (256, 512))


class _Convs(nn.Sequential):
    """Convolution, norm and activation, twice; where no gradient is wanted each works in the convolution's memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript would compile one long condition
            if not torch.is_grad_enabled() and is_plain_eager() and self._is_built() and not is_hooked(self):
                return self._in_place(x)
        for layer in self:
            x = layer(x)
        return x

    def _is_built(self) -> bool:
        """Whether each third layer still is a convolution, whose memory the others may take."""
        layers = list(self)
        return len(layers) % 3 == 0 and all(isinstance(conv, nn.Conv2d | nn.Conv3d) for conv in layers[::3])

    @torch.jit.unused
    def _in_place(self, x: torch.Tensor) -> torch.Tensor:
        layers = list(self)
        for conv, norm, act in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
            slope = slope_of(act)
            x = normalize_and_activate(conv(x), norm, slope, block=self)
            if slope is None:
                x = act(x)
        return x


class UNet(nn.Module):
    """Contracting path of max-pooled conv pairs, expanding path of up-convolutions with skips.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output, one logit a class.
        channels: one entry a level, finest first: the width of both convolutions, or a pair of widths.
        strides: pooling between levels, one entry fewer than ``channels``; each an int or one int an axis.
        norm: ``None``, ``"batch"``, ``"instance"``, ``"group"`` or (name, arguments), before each activation.
        act: name of the activation or (name, arguments).
        padding: ``"same"`` keeps sizes; ``"valid"`` is the papers' unpadded form, whose output is smaller.
        bias: whether the convolutions have a bias; of no use before a norm, but both papers have it.
        halve_upconv: the up-convolution gives the width of the level above (Ronneberger) or keeps its own (Cicek).
        upconv_bias: whether up-convolutions have a bias.
        dropout: probability of dropping a channel at the end of the contracting path (Ronneberger, section 3.1).
        use_checkpoint: in training, compute what is inside of a pair of convolutions again in the backward pass instead
            of keeping it.

    Raises:
        ValueError: on arguments that do not fit together, and in ``forward`` on a size that the network cannot take.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int | Sequence[int]] = CICEK_CHANNELS,
        strides: Sequence[int | Sequence[int]] | None = None,
        norm: NameAndArguments | None = "batch",
        act: NameAndArguments = "relu",
        padding: str = "same",
        bias: bool = True,
        halve_upconv: bool = False,
        upconv_bias: bool = False,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        widths = [(width, width) if isinstance(width, int) else tuple(width) for width in channels]
        strides = [2] * (len(widths) - 1) if strides is None else strides
        if len(widths) < 2 or len(strides) != len(widths) - 1:
            raise ValueError(
                f"channels needs two or more levels and strides one entry fewer, got {len(widths)} and {len(strides)}"
            )
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same' or 'valid', got {padding!r}")
        self.padding = padding
        self.strides = [per_axis(stride, spatial_dims, "strides") for stride in strides]

        def conv_pair(inputs: int, pair: Sequence[int]) -> nn.Sequential:
            layers: list[nn.Module] = []
            for outputs in pair:
                layers.append(CONV[spatial_dims](inputs, outputs, 3, padding=int(padding == "same"), bias=bias))
                layers.append(norm_layer(norm, outputs, spatial_dims))
                layers.append(activation_layer(act))
                inputs = outputs
            return _Convs(*layers)

        self.encoder = nn.ModuleList(
            conv_pair(inputs, pair)
            for inputs, pair in zip([in_channels, *(w[-1] for w in widths)], widths, strict=False)
        )
        self.pools = nn.ModuleList(MAX_POOL[spatial_dims](stride, stride) for stride in self.strides)
        self.dropout = DROPOUT[spatial_dims](dropout)
        self.upconvs, self.decoder = nn.ModuleList(), nn.ModuleList()
        inputs = widths[-1][-1]
        for pair, stride in zip(widths[-2::-1], self.strides[::-1], strict=True):
            skip = pair[-1]
            raised = skip if halve_upconv else inputs
            upconv: Callable[..., nn.Module] = TRANSPOSED_CONV[spatial_dims]
            self.upconvs.append(upconv(inputs, raised, stride, stride, bias=upconv_bias))
            self.decoder.append(conv_pair(raised + skip, (skip, skip)))
            inputs = skip
        self.head = CONV[spatial_dims](inputs, out_channels, 1)
        if use_checkpoint:
            for convs in [*self.encoder, *self.decoder]:
                recompute_in_backward(convs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, *spatial) of ``x_BC...``; with ``padding="valid"`` smaller than the input."""
        if not torch.jit.is_scripting():
            self._check_size(x)
        skips: list[torch.Tensor] = []
        # The deepest level has no pool. TorchScript knows neither strict= nor an index into a list of modules.
        for convs, pool in zip(self.encoder, self.pools):  # noqa: B905
            skips.append(convs(x))
            x = pool(skips[-1])
        x = self.dropout(self.encoder[-1](x))
        for upconv, convs in zip(self.upconvs, self.decoder):  # noqa: B905
            x = upconv(x)
            x = convs(torch.cat([centre_crop(skips.pop(), x), x], dim=1))
        return self.head(x)

    def output_size(self, size: int, axis: int = 0) -> int | None:
        """Output length for an input of ``size`` voxels along ``axis``; None where the network cannot take it."""
        loss = 0 if self.padding == "same" else 4
        for stride in self.strides:
            size -= loss
            if size < 1 or size % stride[axis]:
                return None
            size //= stride[axis]
        size -= loss
        for stride in self.strides[::-1]:
            size = size * stride[axis] - loss
        return size if size > 0 else None

    def _check_size(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        check_axes(x, self.spatial_dims, self.encoder[0], "UNet")
        spatial_shape = x.shape[2:]
        good = tuple(self._next_good_size(size, axis) for axis, size in enumerate(spatial_shape))
        if good != tuple(spatial_shape):
            raise ValueError(
                f"UNet with strides {self.strides} and {self.padding} convolutions cannot take {tuple(spatial_shape)}; "
                f"the next size that it takes is {good}: pad the input to it"
            )

    def _next_good_size(self, size: int, axis: int) -> int:
        while self.output_size(size, axis) is None:
            size += 1
        return size


def ronneberger_unet(in_channels: int = 1, out_channels: int = 2, padding: str = "same", **overrides: Any) -> UNet:
    """The 2D network of Ronneberger et al. 2015, figure 1: 572x572 -> 388x388 with ``padding="valid"``."""
    figure_1: dict[str, Any] = {"channels": RONNEBERGER_CHANNELS, "halve_upconv": True, "upconv_bias": True}
    arguments = {**figure_1, "norm": None, "dropout": 0.5, **overrides}
    return UNet(2, in_channels, out_channels, padding=padding, **arguments)


def cicek_unet(in_channels: int = 3, out_channels: int = 3, padding: str = "same", **overrides: Any) -> UNet:
    """The 3D network of Cicek et al. 2016, figure 2: 132x132x116 -> 44x44x28 with ``padding="valid"``."""
    return UNet(3, in_channels, out_channels, padding=padding, **overrides)
