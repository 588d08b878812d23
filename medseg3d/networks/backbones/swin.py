"""Swin transformer in 2D and 3D: Liu et al., "Swin transformer: hierarchical vision transformer using shifted windows",
ICCV 2021, in the form that Swin UNETR has of it (Hatamizadeh et al., BrainLes 2021), with MONAI 1.6's state_dict keys.

Departures from the paper: patches of 2 voxels; no norm after the patch embedding unless asked for; patch merging after
every stage, the last one included; no absolute positions. With ``use_v2`` (He et al., "SwinUNETR-V2", MICCAI 2023) a
residual block of convolutions comes before each stage.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), ``x_B...E`` is (batch, *grid of tokens, width) and
windows_WNE is (windows of all images, tokens in one, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.attention import attention
from medseg3d.layers.convolution import check_spatial_dims, per_axis
from medseg3d.layers.derived import Derived
from medseg3d.layers.patches import ConvPatchEmbedding, PatchMerging
from medseg3d.layers.residual import EncoderBlock
from medseg3d.layers.transformer import INITIAL_STD, MLP, linear, recompute_in_backward
from medseg3d.layers.windows import cut_into_windows, fitting_window, relative_position_index

STAGES = 4


class SwinTransformer(nn.Module):
    """Five feature maps, from half the resolution to 1/32 (with patches of 2).

    Args:
        in_chans: channels of the image.
        embed_dim: width of the first tokens; it doubles with every stage.
        window_size: edge of a window in tokens, or one for each axis.
        patch_size: edge of a patch in voxels, or one for each axis.
        depths: blocks in each of the four stages; every second one is shifted by half a window.
        num_heads: heads in each stage; they divide its width.
        mlp_ratio: width of the perceptron over that of the tokens.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout of tokens and perceptrons.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: chance of leaving out a branch of the last block; it grows linearly from 0 at the first.
        patch_norm: layer norm after the patch embedding.
        use_checkpoint: in training, compute blocks again in the backward pass instead of keeping what they made.
        spatial_dims: 2 or 3.
        downsample: order of patch merging, "legacy", "merging" or "mergingv2"; see ``PatchMerging``.
        use_v2: residual convolutions before each stage.

    Raises:
        ValueError: other than four stages, or widths that their heads do not divide.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        window_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        downsample: str = "merging",
        use_v2: bool = False,
    ) -> None:
        super().__init__()
        n = check_spatial_dims(spatial_dims)
        if len(depths) != STAGES or len(num_heads) != STAGES:
            raise ValueError(
                f"depths and num_heads need one number for each of {STAGES} stages, got {depths}, {num_heads}"
            )
        window = per_axis(window_size, n, "window_size")
        self.use_v2 = use_v2
        self.patch_embed = ConvPatchEmbedding(n, per_axis(patch_size, n, "patch_size"), in_chans, embed_dim, patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        last = max(1, sum(depths) - 1)
        drop_path = [drop_path_rate * i / last for i in range(sum(depths))]
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            width = embed_dim * 2**i
            rates, drop_path = drop_path[:depth], drop_path[depth:]
            block: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "drop": drop_rate}
            stage = SwinStage(width, heads, window, rates, downsample, attn_drop=attn_drop_rate, **block)
            if use_checkpoint:
                for each in stage.blocks:
                    recompute_in_backward(each)
            # One of a list, because the keys have an index there.
            self.add_module(f"layers{i + 1}", nn.ModuleList([stage]))
            if use_v2:
                self.add_module(f"layers{i + 1}c", nn.ModuleList([EncoderBlock(n, width, width, "instance")]))

    def forward(self, x: torch.Tensor, normalize: bool = True) -> list[torch.Tensor]:
        """``x_BC...`` -> five maps of 1, 2, 4, 8 and 16 times ``embed_dim`` channels, channels-last in memory.

        With ``normalize`` the channels of each voxel are brought to mean 0 and variance 1.
        """
        tokens = self.pos_drop(self.patch_embed(x))
        maps = [_as_map(tokens, normalize)]
        for i in range(1, STAGES + 1):
            if self.use_v2:
                tokens = getattr(self, f"layers{i}c")[0](tokens.movedim(-1, 1)).movedim(1, -1)
            tokens = getattr(self, f"layers{i}")[0](tokens)
            maps.append(_as_map(tokens, normalize))
        return maps


def _as_map(tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
    if normalize:
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
    return tokens.movedim(-1, 1)


class SwinStage(nn.Module):
    """Blocks of windowed attention, plain and shifted in turn, then patch merging unless ``downsample`` is None.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention.
        window_size: edge of a window along each axis.
        drop_path: chance of leaving out the branches of each block; as many blocks as numbers.
        downsample: order of patch merging.
        block: further arguments of ``SwinBlock``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        drop_path: Sequence[float],
        downsample: str | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        shifts = [tuple(w // 2 * (i % 2) for w in window_size) for i in range(len(drop_path))]
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, shift, drop_path=rate, **block)
            for shift, rate in zip(shifts, drop_path, strict=True)
        )
        self.downsample = None if downsample is None else PatchMerging(dim, len(window_size), order=downsample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x_B...E`` -> the same, or (B, *ceil(grid / 2), 2 E) with patch merging."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinBlock(nn.Module):
    """Attention within windows and a perceptron, each behind a norm and beside a shortcut; ``x_B...E`` to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = tuple(window_size), tuple(shift_size)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, self.window_size, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), drop)
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = self.drop_path if self.training else 0.0
        x = x + stochastic_depth(self._attend(x), rate)
        return x + stochastic_depth(self.mlp(self.norm2(x)), rate)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, *grid = (int(n) for n in x.shape[:-1])  # a tracer keeps them as they are
        window, shift = fitting_window(tuple(grid), self.window_size, self.shift_size)
        windows = cut_into_windows(batch, tuple(grid), window, shift, x.device)
        return windows.reverse(self.attn(windows.partition(self.norm1(x)), windows.kinds), like=x)


def stochastic_depth(update: torch.Tensor, rate: float) -> torch.Tensor:
    """With that chance the update of an image is left out: Huang et al., ECCV 2016. For training; 0 in eval mode."""
    if rate == 0.0:
        return update
    keep = 1 - rate
    kept = update.new_empty([len(update)] + [1] * (update.dim() - 1)).bernoulli_(keep)
    return update * kept / keep


class WindowAttention(nn.Module):
    """Attention among the tokens of a window, with a learned bias for each of their relative positions.

    Args:
        dim: width of the tokens.
        num_heads: heads; they divide ``dim``.
        window_size: edge of a window along each axis, which the table of biases is made for.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the result.
        flat_index: keep the index of relative positions in one row, as torchvision's files have it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        flat_index: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"the heads must divide the width of the tokens, got {num_heads} heads and a width of {dim}"
            )
        self.relative_position_index: torch.Tensor
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.window_size = window_size
        rows = prod(2 * w - 1 for w in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        index = relative_position_index(window_size)
        self.register_buffer("relative_position_index", index.flatten() if flat_index else index)
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INITIAL_STD)
        self._bias = Derived()

    def forward(self, windows: torch.Tensor, kinds: Sequence[tuple[int, torch.Tensor | None]]) -> torch.Tensor:
        """windows_WNE -> the same shape.

        Args:
            windows: of at most as many tokens as the window has for which the table was made.
            kinds: for consecutive windows: how many, and the mask (N, N) that is added to their scores.
        """
        count, tokens, width = windows.shape
        qkv = self.qkv(windows).view(count, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        table = self.relative_position_bias_table
        bias = self._bias(lambda table: self._by_pair(table.to(q.dtype), tokens), table, also=(tokens, q.dtype))
        dropout = self.attn_drop if self.training else 0.0
        mixed, start = [], 0
        for number, mask in kinds:
            kind = slice(start, start + number)
            masked = bias if mask is None else bias + mask.to(bias.dtype)
            out = attention(q[kind], k[kind], v[kind], masked, dropout)
            mixed.append(out.transpose(1, 2).reshape(number, tokens, width))
            start += number
        return self.proj_drop(self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0]))

    def _by_pair(self, table: torch.Tensor, tokens: int) -> torch.Tensor:
        """The bias (heads, N, N) of each pair of tokens. A window of fewer takes the first rows and columns of the
        index, as the published code does; a table of its own would have others."""
        index_NN = self.relative_position_index.view(prod(self.window_size), -1)
        index = index_NN[:tokens, :tokens].reshape(-1)
        return table.index_select(0, index).view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
