"""The network of Swin UNETR's self-supervised training: Tang et al., "Self-supervised pre-training of Swin transformers
for 3D medical image analysis", CVPR 2022, section 3.2. Its encoder goes into ``SwinUNETR`` with ``load_checkpoint``.

On the deepest feature map sit three heads: which of four rotations the sub-volume had (token 0), an embedding for the
contrast of two views (token 1), and the sub-volume itself, from which boxes were cut out.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes; tokens_BNE is (batch, tokens,
width).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from medseg3d.layers.convolution import CONV, TRANSPOSED_CONV, check_spatial_dims
from medseg3d.layers.derived import is_symbolic
from medseg3d.layers.normalization import InstanceNorm
from medseg3d.networks.backbones.swin import SwinTransformer

ROTATIONS = 4
EMBEDDING = 512
SIZE_MULTIPLE = 32
DOUBLINGS = 5
UPSAMPLING = {2: "bilinear", 3: "trilinear"}


class SSLOutput(NamedTuple):
    """What the three heads give.

    Attributes:
        rotation: (B, 4) logits of a rotation by 0, 90, 180 and 270 degrees.
        contrastive: (B, 512) embedding.
        reconstruction: (B, in_channels, *spatial) the sub-volume.
    """

    rotation: torch.Tensor
    contrastive: torch.Tensor
    reconstruction: torch.Tensor


class SSLHead(nn.Module):
    """Swin encoder (under the key ``swinViT``) with heads for rotation, contrast and reconstruction.

    Args:
        in_channels: channels of the input.
        feature_size: width of the first stage; the heads work on 16 times as many channels.
        upsample: how the reconstruction gets back to the size: "vae" (five times convolution, instance norm, leaky ReLU
            and linear interpolation), "deconv" (five transposed convolutions) or "large_kernel_deconv" (a single one).
        spatial_dims: 2 or 3.
        dropout_path_rate: greatest rate of stochastic depth.
        use_checkpoint: compute transformer blocks again in the backward pass.
        downsample: order of patch merging, see ``SwinUNETR``; the public encoder was trained with "legacy".
        window_size: edge of a window in tokens.

    Raises:
        ValueError: unknown ``upsample``, and in ``forward`` on a size that is not a multiple of 32 with at least two
            tokens at 1/32 of it.
    """

    def __init__(
        self,
        in_channels: int = 1,
        feature_size: int = 48,
        upsample: str = "vae",
        spatial_dims: int = 3,
        dropout_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        downsample: str = "merging",
        window_size: int | Sequence[int] = 7,
    ) -> None:
        super().__init__()
        self.spatial_dims = n = check_spatial_dims(spatial_dims)
        self.swinViT = SwinTransformer(
            in_channels,
            feature_size,
            window_size,
            2,
            depths=(2, 2, 2, 2),
            num_heads=(3, 6, 12, 24),
            drop_path_rate=dropout_path_rate,
            use_checkpoint=use_checkpoint,
            spatial_dims=n,
            downsample=downsample,
        )
        width = 16 * feature_size
        self.rotation_head = nn.Linear(width, ROTATIONS)
        self.contrastive_head = nn.Linear(width, EMBEDDING)
        self.conv = _decoder(upsample, n, width, in_channels)

    def forward(self, x: torch.Tensor) -> SSLOutput:
        """``x_BC...`` to what the heads give."""
        self._check_size(x)
        deepest = self.swinViT(x)[-1]
        tokens_BNE = deepest.flatten(2).transpose(1, 2)
        return SSLOutput(
            self.rotation_head(tokens_BNE[:, 0]), self.contrastive_head(tokens_BNE[:, 1]), self.conv(deepest)
        )

    def _check_size(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        spatial_shape = x.shape[2:]
        good = [max(1, -(-size // SIZE_MULTIPLE)) * SIZE_MULTIPLE for size in spatial_shape]
        if max(good) == SIZE_MULTIPLE:
            good[0] *= 2
        if len(good) != self.spatial_dims or good != list(spatial_shape):
            raise ValueError(
                f"SSLHead takes {self.spatial_dims} axes that are multiples of {SIZE_MULTIPLE}, one longer; got "
                f"{tuple(spatial_shape)}; the next size that it takes is {tuple(good)}: crop or pad to it"
            )


class SSLReconstruction(SSLHead):
    """``SSLHead`` with its arguments and keys, of which ``forward`` gives the reconstruction alone: a single tensor of
    the input's shape, as inference in windows, exporters and MONAI's bundle commands take it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``x_BC...`` to its reconstruction, the same shape."""
        self._check_size(x)
        return self.conv(self.swinViT(x)[-1])


def _decoder(upsample: str, spatial_dims: int, width: int, out_channels: int) -> nn.Module:
    if upsample == "large_kernel_deconv":
        return TRANSPOSED_CONV[spatial_dims](width, out_channels, 2**DOUBLINGS, stride=2**DOUBLINGS)
    widths = [width // 2**i for i in range(DOUBLINGS)]
    steps: list[nn.Module] = []
    if upsample == "deconv":
        for wide, narrow in itertools.pairwise([*widths, out_channels]):
            steps.append(TRANSPOSED_CONV[spatial_dims](wide, narrow, 2, stride=2))
    elif upsample == "vae":
        for wide, narrow in itertools.pairwise([*widths, widths[-1]]):
            steps += [
                CONV[spatial_dims](wide, narrow, 3, padding=1),
                InstanceNorm(narrow),
                nn.LeakyReLU(),
                nn.Upsample(scale_factor=2, mode=UPSAMPLING[spatial_dims], align_corners=False),
            ]
        steps.append(CONV[spatial_dims](widths[-1], out_channels, 1))
    else:
        raise ValueError(f"upsample must be 'vae', 'deconv' or 'large_kernel_deconv', got {upsample!r}")
    return nn.Sequential(*steps)
