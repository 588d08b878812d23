"""Swin transformer for images: Liu et al., "Swin transformer: hierarchical vision transformer using shifted windows",
ICCV 2021, in the form that torchvision has of it, with its keywords and state_dict keys.

torchvision's form takes images of every size: a grid of tokens is padded to whole windows in each block and to even
numbers before patch merging, and what is left of a patch at the end of an axis is not looked at. The authors' form is
built for one ``img_size``, and windows are no larger than the shorter side of a stage's grid. At sizes at which windows
fit and every stage has more than one of them along each axis, or one along both, the two agree.

Shape legend: ``x_BCHW`` is (batch, channels, height, width), ``x_BHWE`` is (batch, *grid of tokens, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medseg3d.layers.convolution import per_axis
from medseg3d.layers.derived import is_symbolic
from medseg3d.layers.patches import PatchConvolution, PatchMerging
from medseg3d.layers.transformer import INITIAL_STD, linear
from medseg3d.layers.windows import cut_into_windows
from medseg3d.networks.backbones.stages import check_images
from medseg3d.networks.backbones.swin import WindowAttention, stochastic_depth

Size = tuple[int, ...]


class SwinClassifier(nn.Module):
    """Stages of windowed attention with patch merging between them, the mean of all tokens, and one linear layer.

    Without arguments it is Swin-T, for 224x224 pixels; see ``swin_t``, ``swin_s``, ``swin_b`` and ``swin_l``.

    Args:
        patch_size: edge of a patch in pixels, or one for each axis.
        embed_dim: width of the first tokens; it doubles with every stage.
        depths: blocks in each stage; every second one is shifted by half a window.
        num_heads: heads in each stage; they divide its width.
        window_size: edge of a window in tokens, or one for each axis.
        mlp_ratio: width of the perceptron over that of the tokens.
        dropout: of perceptrons and of what attention gives.
        attention_dropout: of attention weights.
        stochastic_depth_prob: chance of leaving out a branch of the last block; it grows linearly from 0 at the first.
        num_classes: classes, one logit each.
        in_channels: channels of the images.
        img_size: build the authors' form for images of this size, or (height, width).
        absolute_positions: add a learned position to each token; needs ``img_size``.

    Raises:
        ValueError: on arguments out of range; in ``forward``, images smaller than a patch or not of ``img_size``.
    """

    def __init__(
        self,
        patch_size: int | Sequence[int] = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.1,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        img_size: int | Sequence[int] | None = None,
        absolute_positions: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths and num_heads need a number for each stage, got {depths} and {num_heads}")
        if absolute_positions and img_size is None:
            raise ValueError("absolute_positions need img_size, the size of the images that they are for")
        window = per_axis(window_size, 2, "window_size")
        self.in_channels = in_channels
        self.patch_size = per_axis(patch_size, 2, "patch_size")
        self.img_size = None if img_size is None else per_axis(img_size, 2, "img_size")
        grids = self._grids(len(depths))
        self.grid = grids[0]  # tokens along each axis, which positions are for
        layers: list[nn.Module] = [
            nn.Sequential(
                PatchConvolution(in_channels, embed_dim, list(self.patch_size)),
                nn.Identity(),  # torchvision moves channels to the end here; ours come out there
                nn.LayerNorm(embed_dim),
            )
        ]
        rates = [stochastic_depth_prob * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        for stage, (depth, heads, grid) in enumerate(zip(depths, num_heads, grids, strict=True)):
            width = embed_dim * 2**stage
            blocks = []
            for i in range(depth):
                edges, shift = _window_and_shift(window, grid, shifted=i % 2 == 1)
                rate, rates = rates[0], rates[1:]
                blocks.append(SwinBlock(width, heads, edges, shift, mlp_ratio, dropout, attention_dropout, rate))
            layers.append(nn.Sequential(*blocks))
            if stage < len(depths) - 1:
                layers.append(PatchMerging(width, 2))
        self.features = nn.Sequential(*layers)
        width = embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, num_classes)
        self.absolute_pos_embed: nn.Parameter | None = None
        if absolute_positions and grids[0] is not None:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, math.prod(grids[0]), embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=INITIAL_STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of ``x_BCHW``."""
        x_BHWE = self.norm(self._stages(x)[-1])
        return self.head(x_BHWE.mean((1, 2)))

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x_BCHW`` -> a map of each stage, before patch merging, as (B, E, H, W): the maps of a dense network.

        Such networks put a norm behind each map; the classifier has one behind the last only, which is not applied.
        """
        return [x_BHWE.movedim(-1, 1) for x_BHWE in self._stages(x)]

    def _stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._check_size(x)
        tokens, *layers = list(self.features)
        x = tokens(x)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        maps = []
        for layer in layers:
            x = layer(x)
            if not isinstance(layer, PatchMerging):
                maps.append(x)
        return maps

    def _grids(self, stages: int) -> list[Size | None]:
        """The grid of tokens of each stage of the authors' form; none if any size is taken."""
        if self.img_size is None:
            return [None] * stages
        grid = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        if min(grid) < 1 or any(n % 2 ** (stages - 1) for n in grid):
            multiple = tuple(patch * 2 ** (stages - 1) for patch in self.patch_size)
            raise ValueError(f"with {stages} stages img_size must be a multiple of {multiple}, got {self.img_size}")
        return [tuple(n // 2**stage for n in grid) for stage in range(stages)]

    def _check_size(self, x: torch.Tensor) -> None:
        if is_symbolic(x):
            return
        check_images(x, self.in_channels, "SwinClassifier")
        size = tuple(x.shape[2:])
        if self.img_size is not None and size != self.img_size:
            raise ValueError(
                f"this SwinClassifier was built for images of {self.img_size}, got {size}: resize them, or build it "
                "without img_size, which takes every size"
            )
        if any(n < patch for n, patch in zip(size, self.patch_size, strict=True)):
            good = tuple(max(n, patch) for n, patch in zip(size, self.patch_size, strict=True))
            raise ValueError(
                f"SwinClassifier takes images of at least one patch of {self.patch_size}, got {size}; the next size "
                f"that it takes is {good}: pad the input to it"
            )


class SwinBlock(nn.Module):
    """Attention within windows and a perceptron, each behind a norm and beside a shortcut; ``x_BHWE`` to the same.

    Unlike in Swin UNETR, a grid that is smaller than the window is padded to a window, the axis unshifted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size,
        shift_size: Size,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.drop_path = window_size, shift_size, stochastic_depth_prob
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, True, attention_dropout, dropout, flat_index=True)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = self.drop_path if self.training else 0.0
        x = x + stochastic_depth(self._attend(x), rate)
        return x + stochastic_depth(self.mlp(self.norm2(x)), rate)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, *grid = (int(n) for n in x.shape[:-1])  # a tracer keeps them as they are
        shift = tuple(0 if n <= w else s for n, w, s in zip(grid, self.window_size, self.shift_size, strict=True))
        windows = cut_into_windows(batch, tuple(grid), self.window_size, shift, x.device)
        return windows.reverse(self.attn(windows.partition(self.norm1(x)), windows.kinds), like=x)


def _window_and_shift(window: Size, grid: Size | None, shifted: bool) -> tuple[Size, Size]:
    """On a known ``grid`` by the authors' rule: windows no larger than its shorter side, which do not shift if they are
    as large."""
    if grid is not None and min(grid) <= min(window):
        return (min(grid),) * 2, (0, 0)
    return window, tuple(w // 2 if shifted else 0 for w in window)


def swin_t(**arguments: Any) -> SwinClassifier:
    """28,288,354 parameters; ``arguments`` are those of ``SwinClassifier``, here and below."""
    return SwinClassifier(**{"stochastic_depth_prob": 0.2, **arguments})


def swin_s(**arguments: Any) -> SwinClassifier:
    """49,606,258 parameters."""
    return SwinClassifier(**{"depths": (2, 2, 18, 2), "stochastic_depth_prob": 0.3, **arguments})


def swin_b(**arguments: Any) -> SwinClassifier:
    """87,768,224 parameters."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "stochastic_depth_prob": 0.5}
    return SwinClassifier(**{**sizes, **arguments})


def swin_l(**arguments: Any) -> SwinClassifier:
    """196,532,476 parameters."""
    sizes = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "stochastic_depth_prob": 0.5}
    return SwinClassifier(**{**sizes, **arguments})
