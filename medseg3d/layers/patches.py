"""Images to tokens, and tokens to fewer tokens.

A convolution whose stride is its kernel is a linear map of separate patches. It is computed as one: the matrix product
writes tokens in the order in which a transformer reads them, whatever the memory format of the image.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), ``x_B...E`` is (batch, *grid of tokens, width) and
``tokens_BNE`` is (batch, tokens, width), the grid in C order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.convolution import CONV, check_spatial_dims, per_axis
from medseg3d.layers.derived import is_plain_eager
from medseg3d.layers.positions import interpolate_positions, sincos_positions
from medseg3d.layers.transformer import INITIAL_STD, linear
from medseg3d.layers.upsampling import CONV_FUNCTION

SMALL_PATCH = 64  # voxels

# Which of the 2^n neighbours stands where among the concatenated channels: its offset along each axis. Weights depend
# on it and files do not tell: "legacy" is MONAI 0.9 to 1.4, which took two neighbours twice and two never; "merging"
# is MONAI from 1.5 on; "mergingv2" runs in C order.
MERGING_ORDERS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)),
}
MERGING_ORDER_2D = ((0, 0), (1, 0), (0, 1), (1, 1))  # of all three names


class PatchMerging(nn.Module):
    """Half as many tokens along each axis, of twice the width: Liu et al., "Swin transformer", ICCV 2021, section 3.1.

    The 2^n neighbours of a token are concatenated, normalised and mapped to ``2 * dim`` channels. An odd axis is padded
    with one row of zeros at its end.

    Args:
        dim: width of the tokens that come in.
        spatial_dims: 2 or 3.
        order: the order in which neighbours are concatenated, one of ``MERGING_ORDERS``; of no effect in 2D. It may be
            set later: it has no weights of its own.

    Raises:
        ValueError: the order has another name.
    """

    __jit_unused_properties__ = ("order",)

    def __init__(self, dim: int, spatial_dims: int, order: str = "merging") -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        neighbours = 2**spatial_dims
        self.reduction = linear(neighbours * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(neighbours * dim)
        self.order = order

    @property
    def order(self) -> str:
        return self._order

    @order.setter
    def order(self, name: str) -> None:
        if name not in MERGING_ORDERS:
            raise ValueError(f"the order of patch merging must be one of {', '.join(MERGING_ORDERS)}, got {name!r}")
        self._order = name
        offsets = MERGING_ORDERS[name] if self.spatial_dims == 3 else MERGING_ORDER_2D
        self._offsets = [list(offset) for offset in offsets]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The weights mean nothing without the order; PyTorch keeps metadata beside a state_dict, in every file of it.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination._metadata[prefix[:-1]]["merging_order"] = self.order

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self.order = local_metadata.get("merging_order", self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *grid, dim) -> (B, *ceil(grid / 2), 2 * dim)."""
        width = x.shape[-1]
        padding = [0, 0]
        pairs_shape = [x.shape[0]]
        for axis in range(self.spatial_dims):
            odd = x.shape[self.spatial_dims - axis] % 2
            padding += [0, odd]
            pairs_shape += [(x.shape[axis + 1] + 1) // 2, 2]
        if sum(padding) > 0:
            x = F.pad(x, padding)
        pairs_shape.append(width)
        pairs = x.reshape(pairs_shape)
        neighbours: list[torch.Tensor] = []
        for offset in self._offsets:
            neighbour = pairs
            for axis, index in enumerate(offset):
                neighbour = neighbour.select(axis + 2, index)
            neighbours.append(neighbour)
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


def patches(x: torch.Tensor, patch_size: list[int], channels_last: bool) -> torch.Tensor:
    """``x_BC...`` cut into patches: (B, *grid, values of a patch), these in the order (C, *patch) or (*patch, C).

    Voxels behind the last whole patch of an axis are left out.
    """
    shape = [x.shape[0], x.shape[1]]
    grid_axes = [0]
    patch_axes: list[int] = []
    for axis, patch in enumerate(patch_size):
        grid = x.shape[axis + 2] // patch
        if x.shape[axis + 2] != grid * patch:
            x = x.narrow(axis + 2, 0, grid * patch)
        shape += [grid, patch]
        grid_axes.append(2 * axis + 2)
        patch_axes.append(2 * axis + 3)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # so that what moves together lies together
        patch_axes.append(1)
    else:
        grid_axes.append(1)
    return x.reshape(shape).permute(grid_axes + patch_axes).flatten(len(patch_size) + 1)


class Patches(nn.Module):
    """``x_BC...`` -> (B, *grid, values of a patch), these in the order (*patch, C)."""

    def __init__(self, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = list(patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return patches(x, self.patch_size, channels_last=True)


class PatchConvolution(nn.Module):
    """A convolution whose stride is its kernel: ``x_BC...`` -> (B, *grid, out_channels), contiguous.

    Weights, their start and their keys are those of ``nn.Conv2d`` and ``nn.Conv3d``.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = list(patch_size)
        conv: Callable[..., Any] = CONV[len(patch_size)]
        convolution = conv(in_channels, out_channels, tuple(patch_size))
        self.weight, self.bias = convolution.weight, convolution.bias
        # Either the weights are put in the order that the image's memory suits or, where there are many, the other way.
        self.channels_last = math.prod(patch_size) <= SMALL_PATCH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            exact = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            if exact and torch.is_grad_enabled() and is_plain_eager():
                # Rounded as references are: it decides on which side of a kink of the activations behind a voxel falls,
                # which the output does not tell, but gradients do.
                conv = CONV_FUNCTION[x.dim() - 2]
                return conv(x, self.weight, self.bias, stride=self.patch_size).movedim(1, -1).contiguous()
        weight = self.weight.movedim(1, -1) if self.channels_last else self.weight
        return F.linear(patches(x, self.patch_size, self.channels_last), weight.flatten(1), self.bias)


class ConvPatchEmbedding(nn.Module):
    """Swin's patch embedding: a strided convolution, and a layer norm of the tokens where ``norm`` asks for one.

    Args:
        spatial_dims: 2 or 3.
        patch_size: edge of a patch in voxels, or one for each axis.
        in_channels: channels of the image.
        embed_dim: width of the tokens.
        norm: whether tokens are normalised.
    """

    def __init__(
        self, spatial_dims: int, patch_size: int | Sequence[int], in_channels: int, embed_dim: int, norm: bool
    ) -> None:
        super().__init__()
        self.patch_size = list(per_axis(patch_size, check_spatial_dims(spatial_dims), "patch_size"))
        self.proj = PatchConvolution(in_channels, embed_dim, self.patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x_BC...`` -> (B, *grid, embed_dim), contiguous; padded with zeros at the end to whole patches."""
        padding: list[int] = []
        for axis in range(len(self.patch_size) - 1, -1, -1):
            padding += [0, -x.shape[axis + 2] % self.patch_size[axis]]
        if sum(padding) > 0:
            x = F.pad(x, padding)
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class PatchEmbedding(nn.Module):
    """Patches of an image as tokens with their positions: Dosovitskiy et al., ICLR 2021, section 3.1, equation 1.

    Args:
        in_channels: channels of the image.
        img_size: voxels along each axis, or one number for all; it sets the length of the position table. Voxels behind
            the last whole patch are not looked at.
        patch_size: edge of a patch in voxels, or one for each axis.
        hidden_size: width of the tokens.
        proj_type: "conv" or "perceptron": the same linear map of a patch with its weights stored in another order.
        pos_embed_type: "learnable"; "sincos", which stays as it is; "none", which starts from zeros and, as in MONAI,
            is trained all the same.
        dropout: probability of dropping a value of a token.
        spatial_dims: 2 or 3.
        interpolate: whether ``forward`` takes other sizes, for which the table is interpolated.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on a size that does not fit, with those that do.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        hidden_size: int,
        proj_type: str = "conv",
        pos_embed_type: str = "learnable",
        dropout: float = 0.0,
        spatial_dims: int = 3,
        interpolate: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = per_axis(img_size, check_spatial_dims(spatial_dims), "img_size")
        self.patch_size = per_axis(patch_size, spatial_dims, "patch_size")
        self.grid = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        self.interpolate = interpolate
        if min(self.grid) < 1:
            raise ValueError(f"img_size must hold a patch of {self.patch_size}, got {self.img_size}")
        if proj_type == "perceptron" and self.img_size != self._whole_patches(self.img_size):
            raise ValueError(
                f"with proj_type 'perceptron' img_size must be a multiple of {self.patch_size} along each "
                f"axis, got {self.img_size}"
            )
        self.patch_embeddings = _projection(proj_type, in_channels, hidden_size, self.patch_size)
        self.position_embeddings = _position_table(pos_embed_type, self.grid, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, hidden_size) of ``x_BC...``."""
        if not torch.jit.is_scripting():
            self._check_size(x)
        x_BE = self.patch_embeddings(x)
        positions_1NE: torch.Tensor = self.position_embeddings
        if self.interpolate and not torch.jit.is_scripting():
            positions_1NE = interpolate_positions(positions_1NE, self.grid, x_BE.shape[1:-1])
        return self.dropout(x_BE.flatten(1, -2) + positions_1NE)

    def to_grid(self, tokens_BNE: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Tokens of ``x_BC...`` as (B, E, *grid) in channels-last memory format: a view."""
        grid = [x.shape[axis + 2] // patch for axis, patch in enumerate(self.patch_size)]
        return tokens_BNE.unflatten(1, grid).movedim(-1, 1)

    def _whole_patches(self, size: Sequence[int]) -> tuple[int, ...]:
        """The next size of whole patches, at least one along each axis."""
        return tuple(max(1, -(-voxels // patch)) * patch for voxels, patch in zip(size, self.patch_size, strict=True))

    def _check_size(self, x: torch.Tensor) -> None:
        if torch.jit.is_tracing():
            return
        size, built, patch = tuple(x.shape[2:]), self.img_size, self.patch_size
        if len(size) != len(built):
            raise ValueError(f"the network takes {len(built)} spatial axes, got a shape of {size}")
        good = self._whole_patches(size) if self.interpolate else built
        if size == good:
            return
        if all(voxels <= limit for voxels, limit in zip(size, good, strict=True)):
            advice = f"the next size that it takes is {good}: pad the input to it"
        else:
            advice = f"it takes {good} only: cut the input into windows"
        if self.interpolate:
            raise ValueError(f"the network takes axes that are multiples of {patch}, got {size}; {advice}")
        raise ValueError(
            f"the network has positions for inputs of {built}, got {size}; {advice}, or build the network with "
            f"interpolate_positions=True, which takes every multiple of {patch}"
        )


def _projection(proj_type: str, in_channels: int, width: int, patch_size: Sequence[int]) -> nn.Module:
    if proj_type == "conv":
        return PatchConvolution(in_channels, width, patch_size)
    if proj_type == "perceptron":
        return nn.Sequential(Patches(patch_size), linear(in_channels * math.prod(patch_size), width))
    raise ValueError(f"proj_type must be 'conv' or 'perceptron', got {proj_type!r}")


def _position_table(pos_embed_type: str, grid: Sequence[int], width: int) -> nn.Parameter:
    """Positions (1, N, width) of the grid's tokens in C order."""
    if pos_embed_type == "sincos":
        return nn.Parameter(sincos_positions(grid, width), requires_grad=False)
    table_1NE = nn.Parameter(torch.zeros(1, math.prod(grid), width))
    if pos_embed_type == "learnable":
        nn.init.trunc_normal_(table_1NE, std=INITIAL_STD)
    elif pos_embed_type != "none":
        raise ValueError(f"pos_embed_type must be 'learnable', 'sincos' or 'none', got {pos_embed_type!r}")
    return table_1NE
