"""Swin UNETR: Hatamizadeh et al., "Swin UNETR: Swin transformers for semantic segmentation of brain tumors in MRI
images", BrainLes 2021, with the keywords and state_dict keys of MONAI 1.6; with ``use_v2`` He et al., "SwinUNETR-V2",
MICCAI 2023.

A Swin transformer makes feature maps at 1/2 to 1/32 of the resolution. Each passes residual convolutions and is joined
on the way up. The head gives logits.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medseg3d.layers.convolution import NameAndArguments, check_spatial_dims
from medseg3d.layers.derived import check_axes, is_symbolic
from medseg3d.layers.layout import channels_last, with_metadata_of
from medseg3d.layers.normalization import InstanceNorm
from medseg3d.layers.patches import PatchMerging
from medseg3d.layers.residual import EncoderBlock, OutBlock, UpBlock
from medseg3d.layers.transformer import recompute_in_backward
from medseg3d.networks.backbones.swin import SwinTransformer

SIZE_MULTIPLE = 32  # patches of 2, and four mergings


class SwinUNETR(nn.Module):
    """Swin transformer encoder, convolutional decoder.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one logit a class.
        patch_size: edge of a patch; the decoder is made for 2.
        depths: transformer blocks in each of the four stages.
        num_heads: heads in each stage; they divide its width.
        window_size: edge of a window in tokens, or one for each axis: 7 as published. Windows that divide the grids of
            tokens waste nothing: 6 for inputs of 96, 8 for 128.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_ratio: width of the perceptrons over that of the tokens.
        feature_size: width of the first stage; published are 12, 24 and 48.
        norm_name: norm of the convolutional blocks, "instance", "batch", "group" or (name, arguments).
        drop_rate: dropout of tokens and perceptrons.
        attn_drop_rate: dropout of attention weights.
        dropout_path_rate: greatest rate of stochastic depth.
        normalize: whether the feature maps are normalised over their channels before the decoder.
        patch_norm: layer norm after the patch embedding.
        use_checkpoint: in training, keep only what goes into a transformer block or a stage of convolutions and compute
            the rest again: less memory for more time.
        spatial_dims: 2 or 3.
        downsample: order in which patch merging takes neighbours. "legacy" is that of MONAI 0.9 to 1.4, with which
            **every public checkpoint was trained**; "merging" and "mergingv2" are those of MONAI 1.5 and later. It
            comes with our own ``state_dict``; of another, or of a plain copy, ``load_state_dict`` cannot know it and
            keeps this one. See also ``merging_order`` and ``medseg3d.checkpoints.load_checkpoint``.
        use_v2: residual convolutions before each stage.
        use_flash_attention: of no effect: attention is always fused. Taken because MONAI's configs have it.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on a size that the network cannot take.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int = 2,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        feature_size: int = 24,
        norm_name: NameAndArguments = "instance",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dropout_path_rate: float = 0.0,
        normalize: bool = True,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        downsample: str = "merging",
        use_v2: bool = False,
        use_flash_attention: bool = True,
    ) -> None:
        super().__init__()
        self.spatial_dims = n = check_spatial_dims(spatial_dims)
        if patch_size != 2:
            raise ValueError(f"patch_size must be 2, because the decoder doubles the size five times, got {patch_size}")
        rates = {"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": dropout_path_rate}
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        self.normalize = normalize
        self.swinViT = SwinTransformer(
            in_channels,
            feature_size,
            window_size,
            patch_size,
            depths,
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            patch_norm=patch_norm,
            use_checkpoint=use_checkpoint,
            spatial_dims=n,
            downsample=downsample,
            use_v2=use_v2,
            **rates,
        )
        width = feature_size
        self.encoder1 = EncoderBlock(n, in_channels, width, norm_name)
        self.encoder2 = EncoderBlock(n, width, width, norm_name)
        self.encoder3 = EncoderBlock(n, 2 * width, 2 * width, norm_name)
        self.encoder4 = EncoderBlock(n, 4 * width, 4 * width, norm_name)
        self.encoder10 = EncoderBlock(n, 16 * width, 16 * width, norm_name)
        self.decoder5 = UpBlock(n, 16 * width, 8 * width, norm_name)
        self.decoder4 = UpBlock(n, 8 * width, 4 * width, norm_name)
        self.decoder3 = UpBlock(n, 4 * width, 2 * width, norm_name)
        self.decoder2 = UpBlock(n, 2 * width, width, norm_name)
        self.decoder1 = UpBlock(n, width, width, norm_name)
        self.out = OutBlock(n, width, out_channels)
        if use_checkpoint:
            for stage in self.children():
                if isinstance(stage, EncoderBlock | UpBlock):
                    recompute_in_backward(stage)

    @property
    def merging_order(self) -> str:
        """Order in which patch merging takes neighbours: "legacy", "merging" or "mergingv2"; it may be set."""
        return next(layer.order for layer in self.modules() if isinstance(layer, PatchMerging))

    @merging_order.setter
    def merging_order(self, order: str) -> None:
        for layer in self.modules():
            if isinstance(layer, PatchMerging):
                layer.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, *spatial) of ``x_BC...``."""
        self._check_size(x)
        x = channels_last(x)
        map2, map4, map8, map16, map32 = self.swinViT(x, self.normalize)
        y = self.decoder5(self.encoder10(map32), map16)
        del map32, map16
        y = self.decoder4(y, self.encoder4(map8))
        y = self.decoder3(y, self.encoder3(map4))
        y = self.decoder2(y, self.encoder2(map2))
        y = self.decoder1(y, self.encoder1(x))
        return self.out(y) if is_symbolic(x) else with_metadata_of(x, self.out(y))

    def _check_size(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        check_axes(x, self.spatial_dims, self.encoder1, "SwinUNETR")
        spatial_shape = x.shape[2:]
        good = [max(1, -(-size // SIZE_MULTIPLE)) * SIZE_MULTIPLE for size in spatial_shape]
        rule = f"axes that are multiples of {SIZE_MULTIPLE}"
        if max(good) == SIZE_MULTIPLE and any(isinstance(part, InstanceNorm) for part in self.encoder10.modules()):
            good[0] += SIZE_MULTIPLE
            rule += ", one of them longer: instance norm needs two voxels at 1/32 of the size"
        if good != list(spatial_shape):
            raise ValueError(
                f"SwinUNETR takes {rule}; got {tuple(spatial_shape)}; "
                f"the next size that it takes is {tuple(good)}: pad the input to it"
            )
