"""UNETR: Hatamizadeh et al., "UNETR: transformers for 3D medical image segmentation", WACV 2022, with the keywords and
the state_dict keys of MONAI 1.6.

A vision transformer reads patches of 16 voxels along each axis. What it holds after a third, a half and three quarters
of its blocks is brought back to 1/2, 1/4 and 1/8 of the image's size, and a convolutional decoder joins it with the
last layer and the image.

Departures from the paper, all of its released code and of MONAI: the skips are taken from blocks 4, 7 and 10 (the paper
says 3, 6 and 9); 2D as well.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medseg3d.layers.convolution import NameAndArguments
from medseg3d.layers.derived import check_axes, is_symbolic
from medseg3d.layers.layout import with_metadata_of
from medseg3d.layers.residual import EncoderBlock, OutBlock, ProjectionUpBlock, UpBlock
from medseg3d.layers.transformer import recompute_in_backward
from medseg3d.networks.backbones.vit import ViT

PATCH_SIZE = 16
NUM_LAYERS = 12
SKIPS = (3, 6, 9)  # blocks whose output is a skip, counted from 0


class UNETR(nn.Module):
    """A ViT encoder whose hidden states are the skips of a convolutional decoder.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one logit a class.
        img_size: voxels along each axis, multiples of 16, or one number for all; it sets the length of the position
            table, and with it the one size that ``forward`` takes.
        feature_size: channels at full resolution; 2, 4 and 8 times as many at 1/2, 1/4 and 1/8.
        hidden_size: width of the tokens, a multiple of ``num_heads``.
        mlp_dim: width inside the perceptron of a transformer block.
        num_heads: heads of the attention.
        proj_type: "conv" or "perceptron": how the weights of the patch embedding are stored.
        norm_name: "instance", "batch", "group" or (name, arguments), of the convolutions.
        conv_block: whether a skip has convolutions each time that it is doubled in size again.
        res_block: whether pairs of convolutions have a shortcut.
        dropout_rate: probability of dropout in the transformer.
        spatial_dims: 2 or 3.
        qkv_bias: whether queries, keys and values have a bias.
        save_attn: only False: the attention matrix is never formed.
        interpolate_positions: whether every size of multiples of 16 is taken, with the position table interpolated to
            its grid.
        use_checkpoint: whether training keeps only what goes into a transformer block or a stage of convolutions, and
            computes the rest again: less memory for more time.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on a size that does not fit, with the next that does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int] | int,
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        proj_type: str = "conv",
        norm_name: NameAndArguments = "instance",
        conv_block: bool = True,
        res_block: bool = True,
        dropout_rate: float = 0.0,
        spatial_dims: int = 3,
        qkv_bias: bool = False,
        save_attn: bool = False,
        *,
        interpolate_positions: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.vit = ViT(
            in_channels,
            img_size,
            PATCH_SIZE,
            hidden_size,
            mlp_dim,
            NUM_LAYERS,
            num_heads,
            proj_type,
            dropout_rate=dropout_rate,
            spatial_dims=spatial_dims,
            qkv_bias=qkv_bias,
            save_attn=save_attn,
            interpolate_positions=interpolate_positions,
            use_checkpoint=use_checkpoint,
        )
        if any(voxels % PATCH_SIZE for voxels in self.vit.patch_embedding.img_size):
            raise ValueError(f"img_size must be a multiple of {PATCH_SIZE} along each axis, got {img_size}")

        def skip(channels: int, doublings: int) -> nn.Module:
            blocks = (norm_name, conv_block, res_block)
            return ProjectionUpBlock(spatial_dims, hidden_size, channels, doublings, *blocks)

        def up(inputs: int, channels: int) -> nn.Module:
            return UpBlock(spatial_dims, inputs, channels, norm_name, res_block)

        full, half, quarter, eighth = (feature_size * scale for scale in (1, 2, 4, 8))
        self.encoder1 = EncoderBlock(spatial_dims, in_channels, full, norm_name, res_block)
        self.encoder2 = skip(half, 2)
        self.encoder3 = skip(quarter, 1)
        self.encoder4 = skip(eighth, 0)
        self.decoder5 = up(hidden_size, eighth)
        self.decoder4 = up(eighth, quarter)
        self.decoder3 = up(quarter, half)
        self.decoder2 = up(half, full)
        self.out = OutBlock(spatial_dims, full, out_channels)
        if use_checkpoint:
            encoders = [self.encoder1, self.encoder2, self.encoder3, self.encoder4]
            for stage in [*encoders, self.decoder5, self.decoder4, self.decoder3, self.decoder2]:
                recompute_in_backward(stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, *spatial) of ``x_BC...``."""
        if not is_symbolic(x):
            check_axes(x, len(self.vit.patch_embedding.patch_size), self.encoder1, "UNETR")
        tokens_BNE, states = self.vit(x)
        half, quarter, eighth, deepest = [
            self.vit.patch_embedding.to_grid(tokens, x) for tokens in (*(states[i] for i in SKIPS), tokens_BNE)
        ]
        y = self.decoder5(deepest, self.encoder4(eighth))
        y = self.decoder4(y, self.encoder3(quarter))
        y = self.decoder3(y, self.encoder2(half))
        y = self.decoder2(y, self.encoder1(x))
        return self.out(y) if is_symbolic(x) else with_metadata_of(x, self.out(y))
