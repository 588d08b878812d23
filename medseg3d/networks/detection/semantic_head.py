"""UPSNet's semantic head: deformable convolutions shared by the levels of a pyramid (Xiong et al., 2019, section 3.2).

Shape legend: ``x_BCHW`` is a level of the pyramid, ``logits_BKHW`` has the finest level's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.deformable import DeformConv2d

TAPS = 9


class DeformableSemanticHead(nn.Module):
    """The same deformable 3x3 convolutions on every level, the levels brought to the finest, one score a class.

    Args:
        in_channels: channels of every level, 256 in the paper.
        channels: widths of the deformable convolutions; the paper has (256, 128, 128) for COCO and two for Cityscapes.
        num_classes: stuff and things.
        levels: number of levels, P2 to P5 in the paper.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: Sequence[int] = (256, 128, 128), levels: int = 4
    ) -> None:
        super().__init__()
        inputs = (in_channels, *channels[:-1])
        self.offset = nn.ModuleList(nn.Conv2d(n, 2 * TAPS, 3, padding=1) for n in inputs)
        self.conv = nn.ModuleList(DeformConv2d(n, m, 3, padding=1) for n, m in zip(inputs, channels, strict=True))
        self.score = nn.Conv2d(levels * channels[-1], num_classes, 1)
        self.levels = levels
        for offset in self.offset:  # to begin with, taps look where a plain convolution's do
            assert isinstance(offset, nn.Conv2d) and offset.bias is not None
            nn.init.zeros_(offset.weight)
            nn.init.zeros_(offset.bias)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (B, K, H, W) at the size of the first of ``levels``, each (B, C, H / 2^n, W / 2^n), finest first.

        Raises:
            ValueError: another number of levels.
        """
        if len(levels) != self.levels:
            raise ValueError(f"this head takes {self.levels} levels, finest first, got {len(levels)}")
        size = levels[0].shape[2:]
        return self.score(torch.cat([_resize(self.subnet(x), size) for x in levels], dim=1))

    def subnet(self, x: torch.Tensor) -> torch.Tensor:
        for offset, conv in zip(self.offset, self.conv, strict=True):
            x = F.relu(conv(x, offset(x)))
        return x


def _resize(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
