"""Values that a network needs otherwise than a file stores them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.positions import interpolate_positions

SWIN_POSITIONS = "absolute_pos_embed"  # of its authors, in 2D
# How the names of position tables end, (1, tokens, width).
POSITIONS = ("position_embeddings", SWIN_POSITIONS)
BIAS_TABLE = "relative_position_bias_table"
FOLDED = "MONAI 0.6 stored it; it is subtracted from the running mean of the batch norm behind it, which is the same"
# V-Net of MONAI 0.6: bias of a convolution -> running mean of the batch norm that follows it.
_BIAS_AND_MEAN = (
    (re.compile(r"(.*)\.conv_block\.conv\.bias"), r"\1.conv_block.adn.N.running_mean"),
    (re.compile(r"(.*)\.down_conv\.bias"), r"\1.bn1.running_mean"),
)


def fold_biases(
    file: Mapping[str, torch.Tensor], placed: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Biases that the network lacks, taken into the batch norms behind: (x + b) - m = x - (m - b).

    Args:
        file: tensors by plain name.
        placed: plain name in the network -> plain name in the file.

    Returns:
        Other values of tensors in the file, and the names of the biases that they contain.
    """
    targets = set(placed.values())
    means: dict[str, torch.Tensor] = {}
    folded: set[str] = set()
    for name in file.keys() - targets:
        for pattern, replacement in _BIAS_AND_MEAN:
            match = pattern.fullmatch(name)
            mean = match.expand(replacement) if match else ""
            if mean in targets and file[mean].shape == file[name].shape:
                means[mean] = file[mean] - file[name]
                folded.add(name)
    return means, folded


def as_convolutions(
    file: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor], placed: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Weights of fully connected layers, (outputs, inputs), where the network has a convolution over all its inputs.

    The inputs were channels, height and width of a map, in that order.
    """
    return {
        name: file[name].reshape(network[target].shape)
        for target, name in placed.items()
        if file[name].dim() == 2
        and network[target].dim() > 2
        and len(file[name]) == len(network[target])
        and file[name].numel() == network[target].numel()
    }


def resize_positions(
    table_1NE: torch.Tensor, key: str, network: nn.Module, file_grid: Sequence[int] | None
) -> torch.Tensor:
    """A position table of the file for the grid of the network's own; the table as it is where its width is another.

    Args:
        table_1NE: (1, tokens, width).
        key: the network's key of its own table.
        network: the network.
        file_grid: tokens along each axis in the file; a cube, or in 2D a square, if not given.

    Raises:
        ValueError: a grid cannot be told from the number of tokens.
    """
    own = network.get_parameter(key)
    if table_1NE.dim() != 3 or own.dim() != 3 or table_1NE.shape[2] != own.shape[2]:
        return table_1NE
    embedding = network.get_submodule(key.rpartition(".")[0])
    new_grid = getattr(embedding, "grid", None)
    usual_axes = (0, 0) if key.endswith(SWIN_POSITIONS) else (0, 0, 0)
    axes = len(file_grid or new_grid or _conv_axes(embedding) or usual_axes)
    new_grid = new_grid or _regular_grid(own.shape[1], axes, f"the network's {key}")
    old_grid = file_grid or _regular_grid(table_1NE.shape[1], axes, f"the file's {key}")
    return interpolate_positions(table_1NE, old_grid, new_grid)


def resize_bias_table(table_RH: torch.Tensor, key: str, network: nn.Module) -> torch.Tensor:
    """A table of relative positions in square windows for the network's own 2D window, as Swin's authors resize it.

    Args:
        table_RH: (offsets within a window, heads).
        key: the network's key of its own table.
        network: the network.

    Returns:
        The table in the network's size, by bicubic interpolation; as it is if either is not of a 2D window.
    """
    window = getattr(network.get_submodule(key.rpartition(".")[0]), "window_size", ())
    edge = math.isqrt(table_RH.shape[0])
    if len(window) != 2 or table_RH.dim() != 2 or edge**2 != table_RH.shape[0]:
        return table_RH
    table_1HRR = table_RH.float().T.reshape(1, -1, edge, edge)
    size = [2 * tokens - 1 for tokens in window]
    resized = F.interpolate(table_1HRR, size=size, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.to(table_RH.dtype)


def _conv_axes(embedding: nn.Module) -> Sequence[int]:
    """The edges of a patch, of embeddings that store them as a convolution."""
    weight = getattr(getattr(embedding, "patch_embeddings", None), "weight", None)
    return () if weight is None else weight.shape[2:]


def _regular_grid(tokens: int, axes: int, whose: str) -> tuple[int, ...]:
    edge = round(tokens ** (1 / axes))
    if edge**axes != tokens:
        raise ValueError(
            f"{whose} has {tokens} tokens, which are not those of a regular grid of {axes} axes: pass position_grid, "
            "the tokens along each axis (image size / patch size) in the file"
        )
    return (edge,) * axes
