"""Vision transformer: Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at scale",
ICLR 2021, for images of two or three axes, with the keywords and the state_dict keys of MONAI 1.6.

Departures from the paper, all MONAI's: no class token unless ``classification``, no bias in the query, key and value
projection unless ``qkv_bias``, a Tanh behind the classification head unless ``post_activation`` says otherwise.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), ``tokens_BNE`` is (batch, tokens, embedding width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from medseg3d.layers.convolution import TRANSPOSED_CONV
from medseg3d.layers.patches import PatchEmbedding
from medseg3d.layers.transformer import TransformerBlocks, linear


class ViT(nn.Module):
    """Patches, positions, ``num_layers`` transformer blocks and a norm.

    Args:
        in_channels: channels of the image.
        img_size: voxels along each axis, or one number for all; it sets the length of the position table.
        patch_size: edge of a patch in voxels, or one for each axis.
        hidden_size: width of the tokens, a multiple of ``num_heads``.
        mlp_dim: width inside the perceptron of a block.
        num_layers: number of blocks.
        num_heads: heads of the attention.
        proj_type: "conv" or "perceptron": how the weights of the patch embedding are stored.
        pos_embed_type: "learnable", "sincos" or "none", see ``PatchEmbedding``.
        classification: whether a class token goes in front and its output through a linear head.
        num_classes: outputs of that head.
        dropout_rate: probability of dropout of tokens, attention weights and perceptrons.
        spatial_dims: 2 or 3.
        post_activation: "Tanh" behind the head; anything else for none.
        qkv_bias: whether queries, keys and values have a bias.
        save_attn: only False: the attention matrix is never formed.
        interpolate_positions: whether inputs of other sizes are taken, multiples of the patch, with the position table
            interpolated to their grid.
        use_checkpoint: whether training keeps only what goes into a block, and computes the rest again.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on a size that does not fit, with the next that does.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        proj_type: str = "conv",
        pos_embed_type: str = "learnable",
        classification: bool = False,
        num_classes: int = 2,
        dropout_rate: float = 0.0,
        spatial_dims: int = 3,
        post_activation: str = "Tanh",
        qkv_bias: bool = False,
        save_attn: bool = False,
        *,
        interpolate_positions: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(dropout_rate, save_attn)
        self.patch_embedding = PatchEmbedding(
            in_channels,
            img_size,
            patch_size,
            hidden_size,
            proj_type,
            pos_embed_type,
            dropout_rate,
            spatial_dims,
            interpolate_positions,
        )
        widths = (hidden_size, mlp_dim, num_heads)
        self.blocks = TransformerBlocks(num_layers, *widths, dropout_rate, qkv_bias, use_checkpoint)
        self.norm = nn.LayerNorm(hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if classification else None
        self.classification_head: nn.Module | None = None
        if classification:
            head = linear(hidden_size, num_classes)
            self.classification_head = nn.Sequential(head, nn.Tanh()) if post_activation == "Tanh" else head

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Normalised tokens (B, N, E) of ``x_BC...``, or (B, num_classes) for ``classification``, and what every block
        gave, (B, N, E) each; with the class token in front N is one more."""
        tokens_BNE = self.patch_embedding(x)
        if self.cls_token is not None:
            tokens_BNE = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens_BNE], dim=1)
        states = self.blocks(tokens_BNE)
        if self.classification_head is None:
            return self.norm(states[-1]), states
        return self.classification_head(self.norm(states[-1][:, 0])), states


class ViTAutoEnc(nn.Module):
    """The transformer with two transposed convolutions back to an image, for pre-training by reconstruction.

    Args: those of ``ViT``, and
        out_channels: channels of the image that comes out.
        deconv_chns: channels between the two transposed convolutions, each of which enlarges by the square root of
            ``patch_size``.

    Raises:
        ValueError: on arguments out of range, edges of patches that are no square numbers, images that are no whole
            patches; and in ``forward`` on a size that does not fit, with the next that does.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int,
        out_channels: int = 1,
        deconv_chns: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        proj_type: str = "conv",
        dropout_rate: float = 0.0,
        spatial_dims: int = 3,
        qkv_bias: bool = False,
        save_attn: bool = False,
        *,
        interpolate_positions: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(dropout_rate, save_attn)
        self.patch_embedding = PatchEmbedding(
            in_channels,
            img_size,
            patch_size,
            hidden_size,
            proj_type,
            dropout=dropout_rate,
            spatial_dims=spatial_dims,
            interpolate=interpolate_positions,
        )
        patch, size = self.patch_embedding.patch_size, self.patch_embedding.img_size
        scale = tuple(math.isqrt(edge) for edge in patch)
        if any(root**2 != edge for root, edge in zip(scale, patch, strict=True)):
            raise ValueError(f"the edges of patch_size must be square numbers such as 4, 9 and 16, got {patch}")
        if any(voxels % edge for voxels, edge in zip(size, patch, strict=True)):
            raise ValueError(f"img_size must be a multiple of patch_size {patch} along each axis, got {size}")
        widths = (hidden_size, mlp_dim, num_heads)
        self.blocks = TransformerBlocks(num_layers, *widths, dropout_rate, qkv_bias, use_checkpoint)
        self.norm = nn.LayerNorm(hidden_size)
        transposed_conv: Callable[..., nn.Module] = TRANSPOSED_CONV[spatial_dims]
        self.conv3d_transpose = transposed_conv(hidden_size, deconv_chns, scale, scale)
        self.conv3d_transpose_1 = transposed_conv(deconv_chns, out_channels, scale, scale)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The image (B, out_channels, *spatial) of ``x_BC...``, and what every block gave, (B, N, E) each."""
        states = self.blocks(self.patch_embedding(x))
        image = self.patch_embedding.to_grid(self.norm(states[-1]), x)
        return self.conv3d_transpose_1(self.conv3d_transpose(image)), states


def check_arguments(dropout_rate: float, save_attn: bool) -> None:
    """ValueError for a rate that is no probability, and for ``save_attn``."""
    if not 0 <= dropout_rate <= 1:
        raise ValueError(f"dropout_rate must lie between 0 and 1, got {dropout_rate}")
    if save_attn:
        raise ValueError("save_attn must be False: the attention is computed without forming its matrix")
